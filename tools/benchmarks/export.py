"""Exports beside DeepSpeed's own way out of a checkpoint: `zero_to_fp32`, lazy, to safetensors.

Both read the same random weights with two Adam moments, in their own format, saved by RANKS ranks: ours as committed
slices, DeepSpeed's as ZeRO-3. Peak memory is that of the process above what it had after its imports; time is wall
clock until the files are on the disk (for DeepSpeed's, which does not see to that, with an fsync of each at the end),
from files that are not in memory. Ours with --no-verify: the other checks nothing either. What checking adds, and the
proof is more than that, has a line of its own.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.benchmarks.measure import Facts, Line, Say, run_apart, stopwatch

SECTION = "export"
RANKS = 4
MEMORY_GOAL = 2.0
"""Growth of peak memory: half of DeepSpeed's, at most."""
TIME_GOAL = 1.0
SHARD_SIZE = "5GB"
SHARD_BYTES = 5 * 10**9
_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Case:
    """A model to export; what is frozen has no moments."""

    hidden: int
    inner: int
    layers: int
    vocabulary: int
    tied: bool = False
    frozen: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """config.json of a Llama."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
        }


FULL = Case(2048, 8192, 14, 64_000)
QUICK = Case(64, 128, 2, 1000)


def run(work: Path, quick: bool, rounds: int, seed: int, say: Say) -> list[Line]:
    """Memory and time of both on the large model, then what becomes of a tied and of a partly frozen one."""
    checkpoints = _make(work, "model", QUICK if quick else FULL, seed, say)
    found: dict[str, list[Facts]] = {"ours": [], "deepspeed": [], "check": []}
    for number in range(rounds):
        for name, facts in found.items():
            say(f"{SECTION}: {name}, round {number + 1} of {rounds}")
            facts.append(_measured(name, checkpoints, work / "out"))
    lines = _lines(found)
    for kind, case in (
        ("tied", Case(64, 128, 2, 1000, tied=True)),
        ("partly frozen", Case(64, 128, 2, 1000, frozen=True)),
    ):
        checkpoints = _make(work, kind.replace(" ", "-"), case, seed, say)
        for name in ("ours", "deepspeed"):
            lines.append(_line_of_a_kind(name, kind, checkpoints, work / "out"))
    return lines


def _measured(name: str, checkpoints: Path, out: Path) -> Facts:
    for file in checkpoints.rglob("*.*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        return run_apart(f"tools.benchmarks.export:export_{name}", {"checkpoints": str(checkpoints), "out": str(out)})
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _lines(found: dict[str, list[Facts]]) -> list[Line]:
    best = {name: min(facts, key=lambda each: float(each["wall"])) for name, facts in found.items()}
    ours, peer = best["ours"], best["deepspeed"]
    size = f"{ours['bytes'] / 1e9:.2f} GB of fp32 weights, largest tensor {ours['largest'] / 1e6:,.0f} MB"

    def memory(facts: Facts) -> str:
        return f"{facts['anonymous'] / 1e6:,.0f} MB of it anonymous (not mapped files)"

    def seconds(facts: Facts) -> str:
        return f"CPU {facts['cpu']:.1f} s; {facts['bytes'] / 1e6 / facts['wall']:,.0f} MB/s written"

    title = {"ours": "Steadfast", "deepspeed": f"DeepSpeed {peer['version']} zero_to_fp32, lazy"}
    return [
        Line(
            SECTION,
            f"{title['ours']}: memory",
            ours["peak"] / 1e6,
            "MB more",
            note=f"{memory(ours)}; {size}",
            facts=ours,
        ),
        Line(
            SECTION,
            f"{title['deepspeed']}: memory",
            peer["peak"] / 1e6,
            "MB more",
            ratio=peer["peak"] / max(ours["peak"], 1),
            goal=MEMORY_GOAL,
            note=memory(peer),
            facts=peer,
        ),
        Line(
            SECTION,
            f"{title['ours']}: time",
            ours["wall"],
            "s",
            note=f"{seconds(ours)}; sha256 of every file, every value found finite",
            facts=ours,
        ),
        Line(
            SECTION,
            f"{title['deepspeed']}: time",
            peer["wall"],
            "s",
            ratio=peer["wall"] / ours["wall"],
            goal=TIME_GOAL,
            note=f"{seconds(peer)}; {peer['unsynced']:.1f} s before its files were synced; nothing checked",
            facts=peer,
        ),
        Line(
            SECTION,
            "Steadfast: checking the checkpoint first",
            best["check"]["wall"],
            "s",
            note=f"every byte of {best['check']['bytes'] / 1e9:.1f} GB, moments too; CPU {best['check']['cpu']:.1f} s",
            facts=best["check"],
        ),
    ]


def _line_of_a_kind(name: str, kind: str, checkpoints: Path, out: Path) -> Line:
    """Whether it makes a model of that kind at all, and whether transformers loads it complete."""
    title = {"ours": "Steadfast", "deepspeed": "DeepSpeed zero_to_fp32, lazy"}[name]
    try:
        facts = run_apart(
            f"tools.benchmarks.export:export_{name}",
            {"checkpoints": str(checkpoints), "out": str(out), "load": True},
        )
        note = f"loads with transformers; {facts['wrong']} of {facts['tensors']} tensors wrong"
        if facts["wrong"] or facts["missing"]:
            note += f", missing: {', '.join(facts['missing']) or 'none'}"
    except RuntimeError as error:
        facts, note = {}, f"failed: {error}"
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return Line(SECTION, f"{title}: {kind}", None, "", note=note, facts=facts)


def export_ours(checkpoints: str, out: str, load: bool = False) -> Facts:
    """`steadfast export` without the proof, in this process."""
    import torch
    import transformers  # noqa: F401 - imports are not what is measured

    from tools.export import export_checkpoint
    from tools.model_directory.loading import load_config, model_on_meta

    del torch
    source = next(Path(checkpoints, "ours").glob("step-*"))
    model_on_meta(load_config(source / "model"))
    with _peak_memory() as memory, stopwatch() as watch:
        export_checkpoint(source, Path(out), verify=False, max_shard_bytes=SHARD_BYTES)
    return _facts(Path(out), memory, watch) | (_loaded(Path(out), Path(checkpoints)) if load else {})


def export_check(checkpoints: str, out: str) -> Facts:
    """What --verify does before an export; `out` is not used."""
    from trainer.checkpoint.verify import verify_checkpoint

    source = next(Path(checkpoints, "ours").glob("step-*"))
    with stopwatch() as watch:
        manifest = verify_checkpoint(source)
    return {"wall": watch.wall, "cpu": watch.cpu, "bytes": sum(entry["bytes"] for entry in manifest.files.values())}


def export_deepspeed(checkpoints: str, out: str, load: bool = False) -> Facts:
    """DeepSpeed's own converter, in this process; its files are synced at the end of the measured time."""
    import deepspeed
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict
    from huggingface_hub import split_torch_state_dict_into_shards  # noqa: F401 - imported here, not while measured
    from safetensors.torch import save_file  # noqa: F401

    with _peak_memory() as memory, stopwatch() as watch:
        try:
            convert_zero_checkpoint_to_state_dict(
                str(Path(checkpoints, "deepspeed")), out, max_shard_size=SHARD_SIZE, safe_serialization=True
            )
        except RuntimeError as error:
            # What it is comes first; the last line is a link.
            raise RuntimeError(" ".join(str(error).split())) from error
        unsynced = watch.so_far()
        for file in Path(out).iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    facts = _facts(Path(out), memory, watch) | {"unsynced": unsynced, "version": deepspeed.__version__}
    if load:
        shutil.copyfile(next(Path(checkpoints, "ours").glob("step-*/model/config.json")), Path(out, "config.json"))
        facts |= _loaded(Path(out), Path(checkpoints))
    return facts


def _facts(out: Path, memory: Facts, watch: Any) -> Facts:
    from tools.model_directory.tensors import ModelTensors

    shapes = ModelTensors(out).shapes
    return {
        **memory,
        "wall": watch.wall,
        "cpu": watch.cpu,
        "bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
        "largest": 4 * max(map(math.prod, shapes.values())),
        "tensors": len(shapes),
    }


def _loaded(out: Path, checkpoints: Path) -> Facts:
    """Whether plain transformers loads it, and how many of its weights are not the ones that were saved."""
    import torch
    from transformers import AutoModelForCausalLM

    from trainer.checkpoint.slices import SliceReader

    reader = SliceReader(next((checkpoints / "ours").glob("step-*")))
    model, report = AutoModelForCausalLM.from_pretrained(out, local_files_only=True, output_loading_info=True)
    state = model.state_dict()
    wrong = sum(
        not torch.equal(state[name].reshape(-1), torch.from_numpy(reader.read("master", name)))
        for name in reader.parameters
    )
    return {"wrong": wrong, "missing": sorted(report["missing_keys"])}


@contextmanager
def _peak_memory() -> Iterator[Facts]:
    """Growth of the resident memory of this process during a block, in bytes, and of its anonymous part (sampled)."""
    found: Facts = {}
    ended = threading.Event()
    start = _status()
    largest = [start["RssAnon"]]

    def sample() -> None:
        while not ended.wait(_SAMPLE_SECONDS):
            largest[0] = max(largest[0], _status()["RssAnon"])

    # Sets the high-water mark to what is resident now (proc(5), clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield found
    finally:
        ended.set()
        sampler.join()
    found |= {"peak": _status()["VmHWM"] - start["VmRSS"], "anonymous": largest[0] - start["RssAnon"]}


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS", "RssAnon")}


def _make(work: Path, name: str, case: Case, seed: int, say: Say) -> Path:
    """The same weights as a slice checkpoint in `ours/` and as a ZeRO-3 checkpoint in `deepspeed/`."""
    say(f"{SECTION}: making two checkpoints of the {name} model")
    directory = work / name
    run_apart(
        "tools.benchmarks.export:make_checkpoints", {"directory": str(directory), "case": case.__dict__, "seed": seed}
    )
    return directory


def make_checkpoints(directory: str, case: dict[str, Any], seed: int) -> Facts:
    """Write both checkpoints; called in a process of its own."""
    from tools.model_directory.loading import model_on_meta

    settings = Case(**case)
    (model_files := Path(directory, "model-files")).mkdir(parents=True)
    (model_files / "config.json").write_text(json.dumps(settings.config, indent=1) + "\n")
    from tools.model_directory.loading import load_config

    model = model_on_meta(load_config(model_files))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    frozen = {name for name in shapes if settings.frozen and "layers.0." in name}
    _write_ours(Path(directory, "ours"), model_files, shapes, frozen, settings.tied, seed)
    _write_deepspeed(Path(directory, "deepspeed"), shapes, frozen, settings.tied, seed)
    return {}


def _slices(shapes: dict[str, tuple[int, ...]], seed: int, rank: int) -> Iterator[tuple[str, int, Any]]:
    """The elements that `rank` owns of each parameter: (name, first element, fp32 values drawn from the seed)."""
    import numpy as np

    for index, (name, shape) in enumerate(shapes.items()):
        count = math.prod(shape) // RANKS
        generator = np.random.default_rng((seed, index, rank))
        values = generator.random(count, dtype=np.float32)
        values -= 0.5
        yield name, rank * count, values


def _write_ours(
    directory: Path, model_files: Path, shapes: dict[str, tuple[int, ...]], frozen: set[str], tied: bool, seed: int
) -> None:
    from trainer.checkpoint.slices import KINDS, rank_file, slice_key
    from trainer.checkpoint.verify import MANIFEST_NAME, Manifest, manifest_text, step_directory
    from trainer.durable import sync_file, xxh3_of_file
    from trainer.tensor_file import TensorFileWriter

    path = step_directory(directory, 1)
    (path / "model").mkdir(parents=True)
    shutil.copy(model_files / "config.json", path / "model" / "config.json")
    for rank in range(RANKS):
        header = {
            slice_key(kind, rank * (math.prod(shape) // RANKS), name): ("F32", (math.prod(shape) // RANKS,))
            for name, shape in shapes.items()
            for kind in (KINDS[:1] if name in frozen else KINDS)
        }
        with TensorFileWriter(path / rank_file(rank, RANKS), header) as writer:
            for name, start, values in _slices(shapes, seed, rank):
                for kind in KINDS[:1] if name in frozen else KINDS:
                    writer.write(slice_key(kind, start, name), values)
    for file in path.rglob("*.*"):
        sync_file(file)
    names = [f"model/{file.name}" for file in (path / "model").iterdir()]
    names += [rank_file(rank, RANKS) for rank in range(RANKS)]
    manifest = Manifest(
        step=1,
        world_size=RANKS,
        files={name: {"bytes": (path / name).stat().st_size, "xxh3_128": xxh3_of_file(path / name)} for name in names},
        parameters={
            name: {"shape": list(shape), "dtype": "float32", **({"frozen": True} if name in frozen else {})}
            for name, shape in shapes.items()
        },
        tied={"lm_head.weight": "model.embed_tokens.weight"} if tied else {},
        buffers={},
        identity={},
        provenance={},
    )
    (path / MANIFEST_NAME).write_text(manifest_text(manifest))


def _write_deepspeed(
    directory: Path, shapes: dict[str, tuple[int, ...]], frozen: set[str], tied: bool, seed: int
) -> None:
    """As DeepSpeedEngine.save_checkpoint lays out ZeRO-3: what zero_to_fp32 reads, and Adam's moments."""
    import deepspeed
    import torch

    tag = directory / "global_step1"
    tag.mkdir(parents=True)
    (directory / "latest").write_text(tag.name)
    for rank in range(RANKS):
        pieces = {name: torch.from_numpy(values) for name, _, values in _slices(shapes, seed, rank)}
        flat = torch.cat([pieces[name] for name in shapes if name not in frozen])
        model_states = {
            "module": {},
            "buffer_names": [],
            "param_shapes": [{name: torch.Size(shape) for name, shape in shapes.items() if name not in frozen}],
            "frozen_param_shapes": {name: torch.Size(shapes[name]) for name in shapes if name in frozen} or None,
            "frozen_param_fragments": {name: pieces[name] for name in shapes if name in frozen} or None,
            "shared_params": {"lm_head.weight": "model.embed_tokens.weight"} if tied else {},
            "ds_version": deepspeed.__version__,
        }
        del pieces
        optimizer = {"state": {0: {"exp_avg": flat * 1e-3, "exp_avg_sq": flat.square()}}, "param_groups": []}
        states = {
            "optimizer_state_dict": {
                "zero_stage": 3,
                "partition_count": RANKS,
                "fp32_flat_groups": [flat],
                "optimizer_state_dict": optimizer,
            }
        }
        torch.save(model_states, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        torch.save(states, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    for file in tag.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
