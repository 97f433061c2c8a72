"""Make a smaller model and say what it lost.

    steadfast quantize out/model out/int8 --scheme int8 --data out/store/validation
    steadfast quantize out/model out/w4 --scheme w4a16-gptq --calibrate out/store --data heldout.jsonl --max-kl 0.1
    steadfast quantize out/model out/gguf --scheme gguf-q8_0 --llama-cpp ~/llama.cpp

int8 needs nothing else: `steadfast serve`, `steadfast eval` and `tools.model_directory` read it. The others of
compressed-tensors (for vLLM, SGLang and transformers with that package) are made by llm-compressor, in an environment
of its own that is made at the first use; pruned models are plain ones with zeros. The result is loaded again from disk,
answers, and is compared with the original on --data before it gets its name: perplexity of both, KL
divergence of the next-token distributions, share of positions with the same first choice (quality.json). With --max-kl
a model that lost more is not kept (exit code 1).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.quantizing.schemes import SCHEMES
from trainer.config.arguments import add_trust_argument
from trainer.errors import NotEqualError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tools.quantizing.quality import Quality

CALIBRATION_ROWS = 256
MOST_ROWS = 64
GROUP = 128
QUALITY_NAME = "quality.json"


@dataclass(frozen=True)
class QuantizeReport:
    """What the smaller model weighs and what it lost."""

    out: str
    scheme: str
    layers: int | None
    """Linear layers that were made smaller, where that is known."""
    bytes_before: int
    """Bytes of all weight files."""
    bytes_after: int
    quality: Quality | None
    """None when nothing here can load the result (GGUF without llama-cpp-python)."""
    prompts: int
    prompts_from: str
    seconds: float


@dataclass(frozen=True)
class _Maker:
    """How a scheme is made and looked at."""

    write: Callable[[Path], int | None]
    """Fills a directory; returns the number of layers."""
    expected_bytes: int
    compare: Callable[[Path, Sequence[Sequence[int]]], Quality] | None


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `steadfast quantize`."""
    width = max(map(len, SCHEMES))
    parser.epilog = "schemes:\n" + "\n".join(f"  {name:<{width}}  {each.meaning}" for name, each in SCHEMES.items())
    parser.add_argument("model", type=Path, metavar="MODEL", help="model directory with safetensors weights")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to make; must not exist")
    parser.add_argument("--scheme", choices=SCHEMES, required=True, metavar="SCHEME", help="see below")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help=f"compare on this: a token store, JSONL rows with messages or text, or a text file; {MOST_ROWS} rows",
    )
    parser.add_argument("--max-kl", type=float, metavar="NATS", help="mean KL divergence that is still accepted")
    parser.add_argument("--calibrate", type=Path, metavar="PATH", help="rows to calibrate on, as --data")
    parser.add_argument("--calibration-rows", type=int, default=CALIBRATION_ROWS, metavar="N", help="most of them")
    parser.add_argument("--environment", type=Path, metavar="DIR", help="environment that has llm-compressor")
    parser.add_argument("--llama-cpp", type=Path, metavar="DIR", help="checkout of llama.cpp, for GGUF")
    parser.add_argument("--gguf-pre", metavar="NAME", help="tokenizer of llama.cpp that cuts words as the model's does")
    add_trust_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Quantize and print what was lost."""
    from tools.model_directory.loading import check_model_directory, load_tokenizer, quiet_transformers
    from tools.quantizing.texts import ids_of

    if arguments.calibration_rows < 1:
        raise UsageError(f"--calibration-rows {arguments.calibration_rows} is less than 1", "give a positive number")
    check_model_directory(arguments.model)
    quiet_transformers()
    tokenizer = load_tokenizer(arguments.model)
    report = quantize_model(
        arguments.model,
        arguments.out,
        arguments.scheme,
        None if arguments.data is None else ids_of(arguments.data, tokenizer, MOST_ROWS),
        calibration=arguments.calibrate and ids_of(arguments.calibrate, tokenizer, arguments.calibration_rows),
        max_kl=arguments.max_kl,
        environment=arguments.environment,
        llama_cpp=arguments.llama_cpp,
        gguf_pre=arguments.gguf_pre,
        trusted_code=arguments.trust_remote_code,
    )
    if arguments.json:
        print(json.dumps(asdict(report)))
        return 0
    _show(report)
    return 0


def quantize_model(
    model: Path,
    out: Path,
    scheme: str = "int8",
    held_out: Sequence[Sequence[int]] | None = None,
    *,
    calibration: Sequence[Sequence[int]] | None = None,
    max_kl: float | None = None,
    environment: Path | None = None,
    llama_cpp: Path | None = None,
    gguf_pre: str | None = None,
    trusted_code: str | None = None,
) -> QuantizeReport:
    """Write the smaller form of the model directory `model` to the new directory `out`.

    `held_out` are token ids to compare on, beside the probes in `proof.json`; `calibration` those that the scheme may
    need; `trusted_code` is the revision of the model's own code that may run. Raises UsageError for a model that is
    quantized already or a scheme that lacks something, DataError when a weight is not finite or the result gives logits
    that are not, NotEqualError when it lost more than `max_kl`, CannotWriteError when `out` exists or its disk is too
    small. After an error `out` is not there.
    """
    from tools.model_directory.loading import load_tokenizer, quiet_transformers, weight_files
    from tools.model_directory.writing import describe, new_directory, write_manifest
    from trainer.durable import write_file
    from trainer.model.remote_code import trust_remote_code

    started = time.monotonic()
    _refuse(model, out, scheme)
    trust_remote_code(model, trusted_code)
    quiet_transformers()
    before = sum(path.stat().st_size for path in set(weight_files(model, "model").values()))
    prompts, prompts_from = _prompts(model, load_tokenizer(model), held_out)
    maker = _maker(model, scheme, calibration, environment, llama_cpp, gguf_pre, trusted_code)
    if max_kl is not None and maker.compare is None:
        raise UsageError(
            f"nothing here loads {scheme}, so --max-kl cannot be held", "pip install llama-cpp-python, or drop --max-kl"
        )
    with new_directory(out, maker.expected_bytes) as building:
        layers = maker.write(building)
        _copy_the_rest(model, building)
        # Done only when it was loaded from disk and has answered; a broken file fails here and never gets its name.
        quality = maker.compare(building, prompts) if maker.compare is not None else None
        if quality is not None and max_kl is not None and not quality.mean_kl <= max_kl:
            raise NotEqualError(
                f"{scheme} loses {quality.mean_kl:.3g} nats (mean KL, {prompts_from}) where {max_kl:g} is allowed",
                "nothing was written; choose a gentler scheme, or calibrate on more rows",
            )
        about = {"scheme": scheme, "prompts": len(prompts), "prompts_from": prompts_from, "allowed_mean_kl": max_kl}
        lost = {} if quality is None else asdict(quality)
        write_file(building / QUALITY_NAME, json.dumps(about | lost, indent=1) + "\n")
        write_file(building / "README.md", _model_card(out.name, model, scheme, quality, prompts_from))
        entries = {path.name: describe(path) for path in sorted(building.iterdir())}
        write_manifest(building, entries, {"kind": "quantized model", "scheme": scheme, "made_from": _origin(model)})
    after = sum(entry.bytes for name, entry in entries.items() if name.endswith((".safetensors", ".gguf")))
    return QuantizeReport(
        out=str(out),
        scheme=scheme,
        layers=layers,
        bytes_before=before,
        bytes_after=after,
        quality=quality,
        prompts=len(prompts),
        prompts_from=prompts_from,
        seconds=time.monotonic() - started,
    )


def _refuse(model: Path, out: Path, scheme: str) -> None:
    from tools.model_directory.loading import check_model_directory, is_quantized
    from tools.model_directory.writing import refuse_existing
    from trainer.model.remote_code import own_classes

    if scheme not in SCHEMES:
        raise UsageError(f"there is no scheme '{scheme}'", f"choose {', '.join(SCHEMES)}")
    refuse_existing(out)
    check_model_directory(model)
    if is_quantized(model) or "quantization_config" in json.loads((model / "config.json").read_bytes()):
        raise UsageError(f"{model} is quantized already", "quantize the export it was made from")
    if own_classes(model) and SCHEMES[scheme].maker == "llama.cpp":
        raise UsageError(f"{model} has code of its own, which llama.cpp does not run", "choose int8 or fp8")


def _copy_the_rest(model: Path, building: Path) -> None:
    """The model's small files that the maker did not write anew; none that tells of its weights."""
    from tools.model_directory.loading import WEIGHT_SUFFIXES
    from tools.model_directory.writing import copy_files

    left_out = (*WEIGHT_SUFFIXES, "manifest.json", "proof.json", "README.md")
    made = {path.name for path in building.iterdir()}
    files = [path for path in sorted(model.iterdir()) if path.is_file() and not path.name.endswith(left_out)]
    copy_files([path for path in files if path.name not in made], building)


def _maker(
    model: Path,
    scheme: str,
    calibration: Sequence[Sequence[int]] | None,
    environment: Path | None,
    llama_cpp: Path | None,
    gguf_pre: str | None,
    trusted_code: str | None,
) -> _Maker:
    import torch

    if SCHEMES[scheme].needs_gpu and not torch.cuda.is_available():
        raise UsageError(f"llm-compressor makes {scheme} on a GPU only, and there is none", "choose w4a16-gptq")
    if SCHEMES[scheme].calibrated and not calibration:
        raise UsageError(f"{scheme} is calibrated on rows like those of training", "give some: --calibrate STORE")
    if SCHEMES[scheme].maker == "embedded":
        from tools.quantizing.weight_only import WeightOnly

        int8 = WeightOnly(model)
        return _Maker(int8.write, int8.expected_bytes, partial(_compare_here, model))
    if SCHEMES[scheme].maker == "llama.cpp":
        from tools.quantizing import gguf

        file = gguf.Gguf(model, scheme.removeprefix("gguf-"), llama_cpp, gguf_pre)
        return _Maker(file.write, file.expected_bytes, partial(gguf.compare, model) if gguf.can_load() else None)
    if scheme.startswith("w4a16"):
        _refuse_odd_widths(model, scheme)
    from tools.quantizing.compressed import Compressor
    from tools.quantizing.environment import python_of

    compressor = Compressor(python_of(environment), model, trusted_code)
    rows = calibration if calibration and SCHEMES[scheme].calibrated else ()
    return _Maker(
        lambda building: compressor.compress(building, scheme, rows),
        sum(file.stat().st_size for file in model.glob("*.safetensors")),
        compressor.compare,
    )


def _refuse_odd_widths(model: Path, scheme: str) -> None:
    """UsageError for a layer whose inputs groups of weights with one scale do not divide."""
    from tools.model_directory.int8 import quantized_layers
    from tools.model_directory.loading import load_config, model_on_meta

    network = model_on_meta(load_config(model))
    for name in quantized_layers(network):
        if (inputs := int(network.get_submodule(name).in_features)) % GROUP:
            raise UsageError(
                f"{model}: {name} has {inputs} inputs, which the groups of {GROUP} weights of {scheme} do not divide",
                "choose w8a8, fp8 or int8",
            )


def _compare_here(model: Path, changed: Path, prompts: Sequence[Sequence[int]]) -> Quality:
    from tools.model_directory.loading import load_model
    from tools.quantizing.quality import quality

    return quality(load_model(model)[0], load_model(changed)[0], prompts)


def _prompts(model: Path, tokenizer: Any, held_out: Sequence[Sequence[int]] | None) -> tuple[list[list[int]], str]:
    """Token ids to compare on, and where they come from."""
    from tools.quantizing.texts import BUILT_IN_TEXTS, encoded, probes_of

    prompts, origins = probes_of(model), []
    if prompts:
        origins.append("its probes")
    if held_out:
        prompts += [list(row) for row in held_out]
        origins.append("your data")
    if not prompts:
        return [encoded(text, tokenizer) for text in BUILT_IN_TEXTS], "built-in sentences"
    return prompts, " and ".join(origins)


def _origin(model: Path) -> dict[str, Any]:
    """Name of the original and the provenance its manifest tells."""
    origin: dict[str, Any] = {"name": model.resolve().name}
    manifest = model / "manifest.json"
    if manifest.is_file():
        content = json.loads(manifest.read_bytes())
        origin |= {key: content[key] for key in ("step", "checkpoint", "provenance") if key in content}
        origin["weights"] = {name: entry for name, entry in content["files"].items() if name.endswith(".safetensors")}
    return origin


_READERS = {
    "embedded": "Read it with `steadfast serve`, `steadfast eval` or `tools.model_directory.loading`; plain "
    "transformers finds no weights under its own names and says so.",
    "llm-compressor": "Read it with vLLM, SGLang, or transformers with compressed-tensors installed.",
    "llama.cpp": "Read it with llama.cpp, or `steadfast serve FILE.gguf`.",
}


def _model_card(name: str, model: Path, scheme: str, quality: Quality | None, prompts_from: str) -> str:
    lost = (
        "It was not loaded: neither its answers nor its token ids were compared with the original's."
        if quality is None
        else f"Against the original ({prompts_from}, {quality.positions} positions): same first choice at "
        f"{quality.top1_agreement:.2%}, KL mean {quality.mean_kl:.2e}, 99th percentile {quality.p99_kl:.2e}, max "
        f"{quality.max_kl:.2e} nats; perplexity {quality.perplexity_before:.4g} -> {quality.perplexity_after:.4g}."
    )
    made = f"`{model.resolve().name}` as {scheme} ({SCHEMES[scheme].meaning}), made by `steadfast quantize`"
    return f"# {name}\n\n{made}. {_READERS[SCHEMES[scheme].maker]}\n\n{lost}\n"


def _show(report: QuantizeReport) -> None:
    from tools.model_directory.writing import readable_bytes

    layers = "" if report.layers is None else f"{report.layers} layers, "
    print(
        f"{report.scheme} in {report.seconds:.1f} s: {layers}weights {readable_bytes(report.bytes_before)} -> "
        f"{readable_bytes(report.bytes_after)} ({report.bytes_after / report.bytes_before:.0%})"
    )
    if (lost := report.quality) is None:
        print("warning: not loaded here, so neither its answers nor its token ids were compared with the original's")
        print("pip install llama-cpp-python, and quantize again, to know what it lost")
    else:
        _show_quality(report, lost)
    if SCHEMES[report.scheme].maker == "embedded":
        print(f"next: steadfast serve {report.out}")
    elif SCHEMES[report.scheme].maker == "llama.cpp":
        (file,) = Path(report.out).glob("*.gguf")
        print(f"next: steadfast serve {file}")


def _show_quality(report: QuantizeReport, lost: Quality) -> None:
    print(
        f"against the original on {report.prompts} prompts ({report.prompts_from}), {lost.positions} positions: same "
        f"first choice {lost.top1_agreement:.2%}; KL mean {lost.mean_kl:.2e}, 99 % {lost.p99_kl:.2e}, max "
        f"{lost.max_kl:.2e} nats; perplexity {lost.perplexity_before:.4g} -> {lost.perplexity_after:.4g}"
    )
    if report.prompts_from == "built-in sentences":
        print("these sentences only show that the model works; --data measures it on your own")
