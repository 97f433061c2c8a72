"""Steadfast's side of every comparison; the only file here that knows its data path."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.benchmarks.corpus import TokenDocuments
from tools.benchmarks.measure import Facts, memory_of_children, stopwatch
from trainer.checkout import ROOT
from trainer.errors import DataError

REPEATS = 8


def text_of(row: dict[str, Any]) -> str:
    """The texts of a conversation as one."""
    return "\n".join(message["content"] for message in row["messages"])


def read_messages(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], int]:
    """Conversations of the user's files as rows with `messages`, and how many others there are.

    Conversations with tools, tool calls or reasoning are others: tables of `datasets` change such rows.
    """
    from trainer.data.records import Conversation, detect_layout, to_record
    from trainer.data.sources import read_rows

    rows: list[dict[str, Any]] = []
    others = 0
    for path in paths:
        layout = None
        for raw in read_rows(path):
            layout = layout or detect_layout(raw)
            record = to_record(raw, layout)
            if not isinstance(record, Conversation):
                raise DataError(f"{raw.place}: this is no conversation", "give files of conversations with --corpus")
            plain = all(message.keys() == {"role", "content"} for message in record.messages)
            if plain and not record.tools and not record.empty_answer:
                rows.append({"messages": list(record.messages)})
            else:
                others += 1
    if not rows:
        raise DataError(f"{paths[0]}: no plain conversation", "give files of conversations without tools")
    return rows, others


def chat_template() -> str:
    """The template of the tokenizers that Steadfast trains."""
    from trainer.data.encode.templates import DEFAULT_CHAT_TEMPLATE

    return DEFAULT_CHAT_TEMPLATE


def tokenise(rows: str, tokenizer: str, digests: str, kind: str) -> Facts:
    """Measure texts to ids, or conversations to ids and mask; one digest a row goes to the file `digests`."""
    from trainer.data.encode.fast_tokenizer import Twin, verified_twin
    from trainer.data.encode.templates import Encoder
    from trainer.data.encode.tokenizer import load_tokenizer
    from trainer.data.records import PlainText, Record, detect_layout, to_record
    from trainer.data.sources import read_rows

    raw = list(read_rows(Path(rows)))
    layout = detect_layout(raw[0])
    records: list[Record] = [
        PlainText("", text_of(row.value), row.place) if kind == "texts" else to_record(row, layout) for row in raw
    ]
    loaded = load_tokenizer(Path(tokenizer))
    twin = verified_twin(loaded, Path(tokenizer))
    encoder = Encoder(loaded, twin=twin if isinstance(twin, Twin) else None)
    encoder.encode(records[0])
    with stopwatch() as watch:
        encoded = [encoder.encode(record) for record in records]
    found, tokens = [], 0
    for documents in encoded:
        ids = np.concatenate([document.ids for document in documents])
        mask = np.zeros(len(ids), dtype=np.uint8)
        begin = 0
        for document in documents:
            for start, stop in document.spans:
                mask[begin + start : begin + stop] = 1
            begin += len(document.ids)
        if kind == "texts":
            # Without the end of the text, which the others do not write.
            ids, mask = ids[:-1], np.ones(len(ids) - 1, dtype=np.uint8)
        found.append(row_digest(ids, mask))
        tokens += len(ids)
    Path(digests).write_text(json.dumps(found))
    by = f"by {twin.name}" if isinstance(twin, Twin) else str(twin)
    return {"cpu": watch.cpu, "wall": watch.wall, "work": tokens / 1e6, "tokens": tokens, "by": by}


def row_digest(ids: Any, mask: Any) -> str:
    """Digest of one row's ids and of its mask: equal digests, equal rows."""
    parts = (np.asarray(ids, dtype=np.int64), np.asarray(mask, dtype=np.uint8))
    return ":".join(hashlib.blake2b(part.tobytes(), digest_size=8).hexdigest() for part in parts)


def write_store(path: Path, documents: TokenDocuments, sequence_length: int, shard_tokens: int) -> None:
    """A token store of documents that are tokenised already."""
    from trainer.data.build.shard_writer import ShardWriter, file_entry
    from trainer.data.store.packing import PLAN_ARRAYS, PlanSpec, default_overlap, plan_rows
    from trainer.data.store.reader import MANIFEST, SCHEMA_VERSION, body_hash, manifest_text
    from trainer.data.store.shards import read_arrays, write_arrays

    count = len(documents.offsets) - 1
    each = np.arange(count + 1, dtype=np.uint64)
    path.mkdir(parents=True)
    writer = ShardWriter(path / "tokens", shard_tokens)
    writer.add(
        {
            "ids": documents.ids,
            "document_offsets": documents.offsets.astype(np.uint64),
            "loss_spans": documents.spans.astype(np.uint32),
            "span_offsets": documents.span_offsets.astype(np.uint64),
            "turn_ends": np.diff(documents.offsets).astype(np.uint32),
            "turn_offsets": each,
            "head": np.zeros(count, dtype=np.uint32),
            "source": np.zeros(count, dtype=np.uint16),
            "file": np.zeros(count, dtype=np.uint32),
            "line": each[1:].astype(np.uint32),
            "label": np.full(count, -1, dtype=np.int32),
        }
    )
    writer.flush()
    spec = PlanSpec(sequence_length, sequence_length, default_overlap(sequence_length))
    plan = plan_rows((read_arrays(path / file["name"]) for file in writer.files), spec, 1)
    (path / "plans").mkdir()
    name = f"plans/{spec.name}.safetensors"
    digest = write_arrays(path / name, {array: getattr(plan, array) for array in PLAN_ARRAYS}, {})
    manifest: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "documents": count,
        "tokens": int(documents.offsets[-1]),
        "supervised_tokens": int((documents.spans[:, 1] - documents.spans[:, 0]).sum()),
        "files": [*writer.files, file_entry(name, digest)],
        "tokenizer_fingerprint": "0" * 64,
        "template_sha256": "0" * 64,
        "vocabulary_size": 1 << 16,
        "padding_id": 0,
        "plan": asdict(spec),
        "labels": [],
        "class_weights": {},
        "sources": [{"name": "synthetic"}],
        "inputs": [{"name": "synthetic"}],
    }
    manifest["body_sha256"] = body_hash(manifest)
    (path / MANIFEST).write_text(manifest_text(manifest))


def stored_rows(path: Path, count: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The first rows of a store: ids and targets, both int32 [rows, sequence length]."""
    from trainer.data.micro_batch import make_micro_batch
    from trainer.data.store.reader import open_store

    store = open_store(path)
    plan = store.plan()
    if plan.n_rows < count:
        raise RuntimeError(f"{path} has {plan.n_rows} rows, {count} are needed")
    ids = np.empty((count, plan.sequence_length), dtype=np.int32)
    targets = np.empty_like(ids)
    for begin in range(0, count, 64):
        batch = make_micro_batch(store, plan, range(begin, min(begin + 64, count)))
        ids[begin : begin + 64], targets[begin : begin + 64] = batch.input_ids, batch.targets
    return ids, targets


def read(store: str, batch_size: int, rows: int, ahead: bool) -> Facts:
    """Measure one epoch of a store in its shuffled order, as torch tensors; see `readers.measured_pass`.

    `ahead`: as training reads, in a thread that prepares the next steps; else in the caller, as the others are read.
    """
    from tools.benchmarks.readers import measured_pass
    from trainer.data.feed import ROWS_AT_ONCE
    from trainer.data.micro_batch import Assembler, look_up
    from trainer.data.order import GlobalOrder
    from trainer.data.store.reader import open_store

    def batches() -> Iterator[tuple[Any, ...]]:
        from torch import from_numpy

        opened = open_store(Path(store), verify=False)
        plan = opened.plan()
        if ahead:
            with contextlib.closing(_feed(opened, plan, rows, batch_size)) as feed:
                for _ in range(rows // batch_size):
                    batch = feed.next_step().micro_batches[0]
                    yield from_numpy(batch.input_ids), from_numpy(batch.targets), from_numpy(batch.position_ids)
            return
        order = GlobalOrder(rows, 1).rows_at(np.arange(rows))
        assembler = Assembler(opened, plan)
        at_once = batch_size * max(1, ROWS_AT_ONCE // batch_size)
        for begin in range(0, rows, at_once):
            for layout in look_up(opened, plan, order[begin : begin + at_once].reshape(-1, batch_size)):
                batch = assembler.assemble(layout)
                yield from_numpy(batch.input_ids), from_numpy(batch.targets), from_numpy(batch.position_ids)

    return measured_pass(batches)


def _feed(store: Any, plan: Any, rows: int, batch_size: int) -> Any:
    from trainer.data.feed import Feed
    from trainer.data.order import GlobalOrder

    return Feed(
        store,
        plan,
        order=GlobalOrder(rows, 1),
        global_batch_size=batch_size,
        micro_batch_size=batch_size,
        rank=0,
        world_size=1,
    )


class Computed:
    """A column of a plan whose values follow from the index, so that a plan of any size needs no memory."""

    def __init__(self, size: int, value: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> None:
        self._size = size
        self._value = value

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            index = np.arange(*index.indices(self._size))
        found = self._value(np.asarray(index, dtype=np.int64))
        return found if found.ndim else found[()]


@dataclass(frozen=True)
class ComputedPlan:
    """A plan of `n_rows` rows, each a whole document of the store; has what a feed reads of `RowPlan`."""

    n_rows: int
    documents: int
    sequence_length: int
    spec: Any

    def __getattr__(self, name: str) -> Computed:
        values: dict[str, Callable[[NDArray[np.int64]], NDArray[np.int64]]] = {
            "document": lambda index: index % self.documents,
            "start": np.zeros_like,
            "head": np.zeros_like,
            "first_target": np.ones_like,
            "stop": lambda index: np.full_like(index, self.sequence_length),
            "tokens": lambda index: np.full_like(index, self.sequence_length),
            "supervised": lambda index: np.full_like(index, self.sequence_length - 1),
            "row_offsets": lambda index: index,
            "row_samples": lambda index: index,
        }
        if name not in values:
            raise AttributeError(name)
        return Computed(self.n_rows + (name == "row_offsets"), values[name])

    def samples_of(self, row: int) -> NDArray[np.int64]:
        """The one sample of a row."""
        return np.array([row], dtype=np.int64)


def start(store: str, rows: int, batch_size: int) -> Facts:
    """Measure opening a store and the first batch of a plan of `rows` rows, and the same far inside its third epoch."""
    from trainer.data.store.reader import open_store

    def first_batch(position: int) -> tuple[float, int]:
        with stopwatch() as watch:
            opened = open_store(Path(store), verify=False)
            plan = ComputedPlan(rows, opened.n_documents, opened.spec.sequence_length, opened.spec)
            feed = _feed(opened, plan, rows, batch_size)
            feed.load_state_dict({"position": position})
            feed.next_step()
        feed.close()
        return watch.wall, len(json.dumps(feed.state_dict()))

    # Once to import and to touch the files: what is left is what grows with the number of rows, if anything does.
    first_batch(0)
    far = 2 * rows + rows * 3 // 4
    with stopwatch() as watch:
        first = min(first_batch(0)[0] for _ in range(REPEATS))
        resumed, state_bytes = min(first_batch(far) for _ in range(REPEATS))
    return {"cpu": watch.cpu, "first_batch": first, "far_batch": resumed, "state_bytes": state_bytes}


def pack(lengths: str, capacity: int) -> Facts:
    """Measure packing over lengths."""
    from trainer.data.store.packing import pack as pack_rows

    sizes = np.load(lengths)
    pack_rows(sizes[:1000], capacity)
    best = float("inf")
    for _ in range(5):
        with stopwatch() as watch:
            rows = pack_rows(sizes, capacity)
        best = min(best, watch.cpu)
    filled = int(rows.max()) + 1
    return {"cpu": best, "work": len(sizes) / 1e3, "rows": filled, "waste": 1 - int(sizes.sum()) / (filled * capacity)}


def prepare(source: str, tokenizer: str, out: str, sequence_length: int, workers: int) -> Facts:
    """Measure `steadfast data build` with so many workers, and the digest of everything it wrote."""
    command = [sys.executable, str(ROOT / "steadfast.py"), "data", "build", "--input", source, "--tokenizer", tokenizer]
    command += ["--sequence-length", str(sequence_length), "--workers", str(workers), "--out", out]
    with stopwatch() as watch, memory_of_children() as memory:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1])
    files = sorted(file for file in Path(out).rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(out)}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return {
        "cpu": watch.cpu,
        "wall": watch.wall,
        **memory,
        "work": Path(source).stat().st_size / 1e6,
        "files": len(files),
        "sha256": digest.hexdigest(),
    }
