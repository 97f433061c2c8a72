"""Write down what a teacher predicts for a token store, for a smaller model to learn from.

    steadfast teach out/large out/store out/store-teacher --top-k 32
    steadfast train student.yaml data.train=out/store data.teacher=out/store-teacher train.teacher_share=0.5

For every supervised token the teacher's k most probable tokens and their probabilities are kept (and what is left for
all others), about 4 bytes each: the teacher is not needed while the student trains. They belong to the tokens of the
store, so every sequence length, packing and number of ranks reads the same; the teacher reads long documents in the
windows that the store was built with. Teacher and student have one tokenizer. A teacher that was killed goes on with
the shard it was at when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.arguments import add_trust_argument
from trainer.errors import DataError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from trainer.data.store.shards import Arrays


@dataclass(frozen=True)
class TeachReport:
    """What was written, and how sure the teacher is of this data."""

    out: str
    shards: int
    targets: int
    bytes: int
    top_k: int
    temperature: float
    held: float
    """Mean probability of the k tokens together, at the temperature."""
    agrees: float
    """Share of the targets that are the teacher's first choice."""
    seconds: float


@dataclass(frozen=True)
class _Samples:
    """Samples of one shard, int64 [samples] each: as in a `RowPlan`, and where their documents begin in the ids."""

    begin: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    first_target: NDArray[np.int64]
    head: NDArray[np.int64]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `steadfast teach`."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="the teacher: a model directory, e.g. an export")
    parser.add_argument("store", type=Path, metavar="STORE", help="token store that the student will train on")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to make; must not exist")
    parser.add_argument("--top-k", type=int, default=32, metavar="K", help="tokens kept a target")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="what logits are divided by")
    add_trust_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Teach and say what was written."""
    from tools.model_directory.writing import readable_bytes
    from trainer.model.remote_code import trust_remote_code

    trust_remote_code(arguments.model, arguments.trust_remote_code)
    report = teach(arguments.model, arguments.store, arguments.out, arguments.top_k, arguments.temperature)
    if arguments.json:
        print(json.dumps(asdict(report)))
        return 0
    print(
        f"{report.targets:,} targets in {report.seconds:.1f} s, {readable_bytes(report.bytes)}: the best "
        f"{report.top_k} tokens hold {report.held:.2%} of the probability, the first is the data's at "
        f"{report.agrees:.2%}"
    )
    print(f"next: steadfast train CONFIG data.train={arguments.store} data.teacher={arguments.out}")
    return 0


def teach(model: Path, store: Path, out: Path, top_k: int = 32, temperature: float = 1.0) -> TeachReport:
    """Write the predictions of the model directory `model` for the store at `store` to the new directory `out`.

    Raises UsageError for settings that cannot be, DataError when the tokenizers differ or a prediction is not finite,
    CannotWriteError when `out` exists or its disk is too small.
    """
    import numpy as np

    from tools.evaluation.forward import refuse_other_tokenizer
    from tools.model_directory.loading import load_model
    from tools.model_directory.writing import UNFINISHED_NAME, new_directory, refuse_existing
    from trainer.data.store import open_store
    from trainer.data.store.shards import read_arrays
    from trainer.data.teacher import finished_shard, write_shard, write_teacher_manifest
    from trainer.weight_files import weights_fingerprint

    started = time.monotonic()
    opened = open_store(store)
    refuse_existing(out)
    vocabulary = opened.vocabulary_size
    if not 1 <= top_k < vocabulary:
        raise UsageError(f"--top-k {top_k} is not between 1 and the {vocabulary} tokens there are", "give 8 to 64")
    if not 0 < temperature < float("inf"):
        raise UsageError(f"--temperature {temperature} is no temperature", "give a positive number, e.g. 2")
    teacher, tokenizer = load_model(model)
    refuse_other_tokenizer(opened, tokenizer, model)
    about = {
        "store": opened.fingerprint,
        "teacher": model.resolve().name,
        "weights": weights_fingerprint(model),
        "top_k": top_k,
        "temperature": temperature,
    }
    expected = int(opened.manifest["supervised_tokens"]) * (4 + top_k * 4 + (top_k + 1) * 2)
    # Whatever training does with long documents, all their tokens have a context as long as a window of the store.
    plan = opened.plan(replace(opened.spec, long_text="windows"))
    longest = int((plan.head.astype(np.int64) + plan.stop - plan.start).max())
    if longest > (context := teacher.config.get_text_config().max_position_embeddings):
        raise DataError(
            f"samples of {longest} tokens do not fit the {context} positions of {model}",
            "build it with shorter windows",
        )
    shards, documents = opened.locate(plan.document)
    seen = targets = 0
    held = agreed = 0.0
    files = []
    with new_directory(out, expected, about) as building:
        for number in range(opened.n_shards):
            arrays = opened.shard(number)
            file = finished_shard(building, number)
            if file is None:
                mine = shards == number
                begin = arrays["document_offsets"][documents[mine]].astype(np.int64)
                columns = (plan.start, plan.stop, plan.first_target, plan.head)
                samples = _Samples(begin, *(column[mine].astype(np.int64) for column in columns))
                predicted = _predictions(teacher, arrays, samples, vocabulary, top_k, temperature)
                file = write_shard(building, number, *predicted, vocabulary)
                seen += len(predicted[0])
            files.append(file)
            found = read_arrays(file)
            targets += len(found["token"])
            held += float((1 - np.exp(found["log_probabilities"][:, -1].astype(np.float64))).sum())
            agreed += int((found["candidates"][:, 0] == arrays["ids"][found["token"]]).sum())
            rate = seen / (time.monotonic() - started)
            _say(f"shard {number + 1} of {opened.n_shards}: {targets:,} targets, {rate:,.0f} a second")
        write_teacher_manifest(building, files, about)
        (building / UNFINISHED_NAME).unlink()
    return TeachReport(
        out=str(out),
        shards=opened.n_shards,
        targets=targets,
        bytes=sum(file.stat().st_size for file in out.iterdir()),
        top_k=top_k,
        temperature=temperature,
        held=held / max(targets, 1),
        agrees=agreed / max(targets, 1),
        seconds=time.monotonic() - started,
    )


def _predictions(
    teacher: Any, arrays: Arrays, samples: _Samples, vocabulary: int, top_k: int, temperature: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Where the targets lie in the shard's ids, their candidates, the log-probabilities of these and of all others."""
    import numpy as np
    import torch

    from tools.evaluation.forward import batches_of_like_length, logits_of
    from trainer.data.teacher import targets_of_shard

    ids, token = arrays["ids"], targets_of_shard(arrays)
    candidates = np.empty((len(token), top_k), dtype=np.int64)
    log_probabilities = np.full((len(token), top_k + 1), np.nan, dtype=np.float32)
    lengths = (samples.head + samples.stop - samples.start).tolist()
    for batch in batches_of_like_length(lengths, int(teacher.config.get_text_config().vocab_size)):
        parts = [samples.begin[batch], samples.start[batch], samples.stop[batch]]
        parts += [samples.first_target[batch], samples.head[batch]]
        rows = list(zip(*(part.tolist() for part in parts), strict=True))
        logits = logits_of(
            teacher,
            [
                [*ids[begin : begin + head].tolist(), *ids[begin + start : begin + stop].tolist()]
                for begin, start, stop, _, head in rows
            ],
        )
        for row, (begin, start, stop, first_target, head) in enumerate(rows):
            mine = slice(*token.searchsorted([begin + first_target, begin + stop]).tolist())
            # What stands at p is predicted at p - 1. Ids that the tokenizer has not are padding of the head.
            places = torch.from_numpy(token[mine] - (begin + start) + head - 1).to(logits.device)
            found = (logits[row, places, :vocabulary] / temperature).log_softmax(dim=1)
            best, chosen = found.topk(top_k, dim=1)
            rest = found.scatter_(1, chosen, -torch.inf).logsumexp(dim=1, keepdim=True)
            candidates[mine] = chosen.cpu().numpy()
            log_probabilities[mine] = torch.cat([best, rest], dim=1).cpu().numpy()
    if not np.isfinite(log_probabilities[:, :-1]).all():
        raise DataError("the teacher's predictions are not finite", "the model is broken: verify it")
    return token, candidates, log_probabilities


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
