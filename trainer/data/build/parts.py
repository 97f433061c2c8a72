"""One chunk of input to one part on disk: the work that worker processes share out.

A part holds the documents of its chunk as arrays, what is known of every row (the columns over which `decide` decides)
and the counts for the report. It depends on the recipe and on the chunk alone, so parts made by any number of
workers, or by an earlier build that was killed, are the same.

    of documents  ids, document_offsets, loss_spans, span_offsets, turn_ends, turn_offsets, head, row
    of rows       line, byte (-1: none), key uint64 [rows, 2], group, label (index into the part's own list), time,
                  parent (of augmented rows, else -1), signature uint32 [rows, permutations] (for near duplicates)
    left_out      uint8: JSON lines, one a row that was left out
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from trainer.data.build.recipe import Recipe
from trainer.data.build.row_steps import Facts, RowSteps
from trainer.data.encode.templates import Encoded, Encoder, LostStopToken
from trainer.data.records import Conversation, Layout, Record, to_record
from trainer.data.sources import BadRow, Chunk, RawRow
from trainer.data.store.report import SourceReport, source_report
from trainer.data.store.shards import id_dtype, ragged, write_arrays
from trainer.durable import write_errors
from trainer.errors import DataError
from trainer.tensor_file import TensorFile

BAD_ROW, LOST_STOP = "bad rows", "rows whose stop token is lost"
NO_ANSWER, EMPTY_ANSWER = "rows without an assistant turn", "rows with an empty answer"
NOTHING_TRAINED = "rows in which nothing is trained on"
UNKNOWN = "unknown tokens: the tokenizer cannot write some of this text"
NEUTRALISED = "control-token texts kept as plain text"
REFUSED = (BAD_ROW, LOST_STOP)


@dataclass(frozen=True)
class Task:
    """One chunk to encode: `number` counts over the whole build, `source` and `file` index its lists."""

    number: int
    source: int
    file: int
    file_name: str
    layout: Layout
    chunk: Chunk

    @property
    def name(self) -> str:
        """File name of the part: equal for equal rows at the same place, read in the same layout."""
        read_as = f"{self.file_name}\0{self.layout}\0{self.chunk.key()}"
        return f"{self.number:07d}-{self.source}-{self.file}-{xxhash.xxh3_128_hexdigest(read_as.encode())}.safetensors"


@dataclass(frozen=True)
class Part:
    """A part opened for reading: arrays are views into the file."""

    source: int
    file: int
    report: SourceReport
    labels: list[str]
    arrays: dict[str, NDArray[Any]]

    @property
    def left_out(self) -> list[dict[str, Any]]:
        """The rows that were left out, as they will be listed."""
        return [json.loads(line) for line in self.arrays["left_out"].tobytes().splitlines()]


def read_part(path: Path) -> Part:
    """Open a part; DataError when it is not whole."""
    _, source, file, _ = path.name.split("-")
    content = TensorFile(path)
    facts = json.loads(content.metadata["facts"])
    arrays = {name: content.array(name) for name in content.entries}
    return Part(int(source), int(file), source_report(facts["report"]), facts["labels"], arrays)


@dataclass
class _Growing:
    """What a part will hold, row by row and document by document."""

    facts: list[Facts] = field(default_factory=list)
    rows: list[RawRow] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    documents: list[Encoded] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)


class PartEncoder:
    """Encodes chunks with one tokenizer; every worker process makes one."""

    def __init__(self, recipe: Recipe, tokenizer: Any, encoder: Encoder, steps: RowSteps) -> None:
        self._recipe = recipe
        self._encoder = encoder
        self._steps = steps
        self._unknown: int | None = tokenizer.unk_token_id
        self._dtype = id_dtype(len(tokenizer))

    def write(self, task: Task, directory: Path) -> SourceReport:
        """Encode one chunk into `directory / task.name`, which appears complete or not at all; returns its counts.

        Raises:
            DataError: a bad row under the policy `fail`, or an input that cannot be read on.
            CannotWriteError: no space, no permission.
            TwinMismatch: the tokenizer's twin gave other ids.
        """
        report, part = SourceReport(name=""), _Growing()
        self._encoder.check_again()
        for row in task.chunk.rows():
            report.rows += 1
            try:
                self._add(row, task.layout, report, part)
            except LostStopToken as error:
                self._refuse(row, LOST_STOP, error, report, part)
            except DataError as error:
                self._refuse(row, BAD_ROW, error, report, part)
        labels = list(dict.fromkeys(facts.label for facts in part.facts))
        facts = {"report": asdict(report), "labels": labels}
        temporary = directory / f".{task.name}.writing"
        temporary.unlink(missing_ok=True)
        write_arrays(temporary, self._arrays(part, labels), {"facts": json.dumps(facts, ensure_ascii=False)})
        with write_errors(temporary):
            temporary.rename(directory / task.name)
        return report

    def _add(self, row: RawRow | BadRow, layout: Layout, report: SourceReport, part: _Growing) -> None:
        """Put one row, and its augmented copies, into the part, or list it as left out."""
        if isinstance(row, BadRow):
            raise row.error()
        record = to_record(row, layout)
        reason = _unanswered(record)
        if reason is None:
            record, reason = self._steps.clean(record, row.place, report.changed)
        if reason is not None:
            _leave_out(row, reason, report, part)
            return
        facts = self._steps.facts(row, record)
        documents = self._encode(record)
        if not documents:
            _leave_out(row, NOTHING_TRAINED, report, part)
            return
        first = len(part.facts)
        for number, (copy_facts, copy) in enumerate([(facts, documents), *self._copies(record, facts)]):
            part.rows.append(row)
            part.facts.append(copy_facts)
            part.parents.append(first if number else -1)
            part.documents += copy
            part.owners += [first + number] * len(copy)
        for document in documents:
            report.methods[document.method] = report.methods.get(document.method, 0) + 1
            for text in document.neutralised:
                report.notes.add(f"{NEUTRALISED}: {text}", row.place)
            if self._unknown is not None:
                report.notes.add(UNKNOWN, row.place, int(np.count_nonzero(document.ids == self._unknown)))

    def _encode(self, record: Record) -> list[Encoded]:
        return [document for document in self._encoder.encode(record) if document.spans]

    def _copies(self, record: Record, facts: Facts) -> Iterator[tuple[Facts, list[Encoded]]]:
        for copy in self._steps.copies(record, facts):
            yield facts, self._encode(copy)

    def _refuse(
        self, row: RawRow | BadRow, reason: str, error: DataError, report: SourceReport, part: _Growing
    ) -> None:
        """A row that cannot be read or encoded: the end of the build, or left out, as the recipe says."""
        if self._recipe.bad_rows.policy == "fail":
            raise error
        more = {"fact": error.fact, "remedy": error.remedy}
        if self._recipe.bad_rows.policy == "quarantine":
            more["raw"] = _raw(row)
        _leave_out(row, reason, report, part, **more)

    def _arrays(self, part: _Growing, labels: Sequence[str]) -> dict[str, NDArray[Any]]:
        documents = part.documents
        arrays: dict[str, NDArray[Any]] = {
            "ids": _joined([document.ids.astype(self._dtype) for document in documents], self._dtype),
            "document_offsets": ragged([len(document.ids) for document in documents]),
            "loss_spans": np.array(
                [span for document in documents for span in document.spans], dtype=np.uint32
            ).reshape(-1, 2),
            "span_offsets": ragged([len(document.spans) for document in documents]),
            "turn_ends": np.array([end for document in documents for end in document.turn_ends], dtype=np.uint32),
            "turn_offsets": ragged([len(document.turn_ends) for document in documents]),
            "head": np.array([document.head for document in documents], dtype=np.uint32),
            "row": np.array(part.owners, dtype=np.uint32),
            "line": np.array([row.line for row in part.rows], dtype=np.uint32),
            "byte": np.array([-1 if row.byte is None else row.byte for row in part.rows], dtype=np.int64),
            "key": np.array([facts.key for facts in part.facts], dtype=np.uint64).reshape(-1, 2),
            "group": np.array([facts.group for facts in part.facts], dtype=np.uint64),
            "label": np.array([labels.index(facts.label) for facts in part.facts], dtype=np.int32),
            "time": np.array([facts.time for facts in part.facts], dtype=np.float64),
            "parent": np.array(part.parents, dtype=np.int64),
            "left_out": np.frombuffer(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part.left_out).encode(), dtype=np.uint8
            ),
        }
        if self._recipe.duplicates.near != "off":
            signatures = [facts.signature for facts in part.facts if facts.signature is not None]
            arrays["signature"] = np.stack(signatures) if signatures else np.empty((0, 0), dtype=np.uint32)
        return arrays


def _unanswered(record: Record) -> str | None:
    """Why a conversation would teach nothing, or teach silence."""
    if not isinstance(record, Conversation):
        return None
    if not any(message["role"] == "assistant" for message in record.messages):
        return NO_ANSWER
    return EMPTY_ANSWER if record.empty_answer else None


def _leave_out(row: RawRow | BadRow, reason: str, report: SourceReport, part: _Growing, **more: str) -> None:
    place = f"{row.file}:{row.line}"
    report.left_out.add(reason, place)
    part.left_out.append({"place": place, "byte": row.byte, "reason": reason, **more})


def _raw(row: RawRow | BadRow) -> str:
    if isinstance(row, BadRow):
        return row.raw.decode("utf-8", errors="backslashreplace")
    return json.dumps(row.value, ensure_ascii=False, default=str)


def _joined(parts: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)
