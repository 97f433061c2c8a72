"""Other readers of training rows: each written in its own format, read in shuffled order in batches.

All of them hold the same rows: ids (int32, Megatron-style uint16) and a mask (uint8) that says which tokens are
trained on. With `ready` a batch becomes what training needs, as Steadfast's feed gives it: input ids, targets (padding
and prompts ignored) and position ids, all int64; without, ids and mask are handed on as they lie in the file.

A format has two forms: "usual" as its documentation shows it, columns of tensors or arrays and a loader that makes
batches of them; "fast" what a patient user may find, columns of raw bytes (litdata reads them several times faster than
tensors) or whole batches at a call. Megatron-style files have one.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.machinery import ModuleSpec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.benchmarks.measure import Facts, stopwatch

SHUFFLE_BUFFER = 1000
SHARD_BYTES = 16 << 20
IGNORED = -100
MASK_BIT = 20
IDS, MASK = "ids.npy", "mask.npy"

Stored = Callable[[], Iterable[tuple[Any, Any]]]
Batches = Callable[[], Iterable[tuple[Any, ...]]]


def read(reader: str, directory: str, batch_size: int, ready: bool) -> Facts:
    """Measure one epoch of the named reader over what `write` put into `directory`."""
    batches = READERS[reader](Path(directory) / reader, batch_size)
    return measured_pass((lambda: _ready(batches())) if ready else batches)


def write(reader: str, directory: str) -> Facts:
    """Write the rows in `directory` in the format of the named reader."""
    ids: NDArray[np.int32] = np.load(Path(directory, IDS))
    mask: NDArray[np.uint8] = np.load(Path(directory, MASK))
    target = Path(directory, reader)
    target.mkdir()
    with stopwatch() as watch:
        WRITERS[reader](target, ids, mask)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    return {"cpu": watch.cpu, "bytes": size}


def measured_pass(batches: Batches) -> Facts:
    """CPU seconds of one epoch from opening to the last batch, and wall seconds until its first batch.

    An epoch before it, not measured, imports what is needed, warms the page cache and gives checksums. These do not
    depend on the order of the rows, so readers that give the same rows give the same sums.
    """
    import torch

    torch.set_num_threads(1)
    sums = [sum(column) for column in zip(*(_sums(*batch[:2]) for batch in batches()), strict=True)]
    tokens = rows = 0
    first: float | None = None
    with stopwatch() as watch:
        for ids, *_ in batches():
            if first is None:
                first = watch.so_far()
            tokens += ids.numel()
            rows += len(ids)
    return {
        "cpu": watch.cpu,
        "wall": watch.wall,
        "work": tokens / 1e6,
        "rows": rows,
        "first_batch": first,
        "sums": sums,
    }


def _sums(ids: Any, targets: Any) -> tuple[int, int]:
    import torch

    weights = torch.arange(1, ids.shape[1] + 1)
    return int((ids.long() * weights).sum()), int((targets.long().clamp(min=0) * weights).sum())


def _ready(batches: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any, Any]]:
    import torch

    positions = torch.empty(0, 0)
    for stored, mask in batches:
        ids = stored.long()
        targets = torch.full_like(ids, IGNORED)
        chosen = mask.view(torch.bool) if mask.dtype == torch.uint8 else mask.bool()
        torch.where(chosen[:, 1:], ids[:, 1:], targets[:, 1:], out=targets[:, :-1])
        if positions.shape != ids.shape:
            positions = torch.arange(ids.shape[1]).repeat(len(ids), 1)
        yield ids, targets, positions


def _as_bytes(ids: NDArray[np.int32], mask: NDArray[np.uint8]) -> Iterator[tuple[bytes, bytes]]:
    for row in range(len(ids)):
        yield ids[row].tobytes(), mask[row].tobytes()


def _loaded(dataset: Any, batch_size: int) -> Iterator[tuple[Any, Any]]:
    """Batches of a data set whose samples are dictionaries of tensors or arrays, by torch's own loader."""
    from torch.utils.data import DataLoader

    return ((batch["ids"], batch["mask"]) for batch in DataLoader(dataset, batch_size=batch_size))


def _batched(samples: Iterable[tuple[bytes, bytes]], batch_size: int) -> Iterator[tuple[Any, Any]]:
    """Rows of raw bytes as batches of tensors."""
    import torch

    iterator = iter(samples)
    while chunk := list(islice(iterator, batch_size)):
        ids = np.stack([np.frombuffer(row, dtype=np.int32) for row, _ in chunk])
        mask = np.stack([np.frombuffer(row, dtype=np.uint8) for _, row in chunk])
        yield torch.from_numpy(ids), torch.from_numpy(mask)


# --- Megatron-style: flat files, an index of lengths and places, a permuted index of rows ---


def _write_megatron(target: Path, ids: NDArray[np.int32], mask: NDArray[np.uint8]) -> None:
    for name, rows in (("ids", ids.astype(np.uint16)), ("mask", mask)):
        rows.tofile(target / f"{name}.bin")
        lengths = np.full(len(rows), rows.shape[1], dtype=np.int32)
        places = np.arange(len(rows), dtype=np.int64) * rows.shape[1] * rows.itemsize
        (target / f"{name}.idx").write_bytes(len(rows).to_bytes(8, "little") + lengths.tobytes() + places.tobytes())


class _MappedRows:
    def __init__(self, stem: Path, dtype: type[Any]) -> None:
        index = np.memmap(stem.with_suffix(".idx"), mode="r", dtype=np.uint8)
        count = int(index[:8].view(np.int64)[0])
        self._lengths = np.frombuffer(index, dtype=np.int32, count=count, offset=8)
        self._places = np.frombuffer(index, dtype=np.int64, count=count, offset=8 + 4 * count)
        self._bytes = memoryview(np.memmap(stem.with_suffix(".bin"), mode="r", dtype=np.uint8))  # type: ignore[arg-type]
        self._dtype = dtype

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, row: int) -> NDArray[Any]:
        length, place = int(self._lengths[row]), int(self._places[row])
        return np.frombuffer(self._bytes, dtype=self._dtype, count=length, offset=place)


def _read_megatron(target: Path, batch_size: int) -> Stored:
    def batches() -> Iterator[tuple[Any, Any]]:
        import torch

        ids, mask = _MappedRows(target / "ids", np.uint16), _MappedRows(target / "mask", np.uint8)
        order = np.random.default_rng(1).permutation(len(ids))
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size].tolist()
            stacked = np.stack([ids[row] for row in rows]).astype(np.int64)
            yield torch.from_numpy(stacked), torch.from_numpy(np.stack([mask[row] for row in rows]))

    return batches


# --- litdata ---


def _write_litdata(fast: bool, target: Path, ids: NDArray[np.int32], mask: NDArray[np.uint8]) -> None:
    import torch
    from litdata.streaming.cache import Cache

    tensors = zip(torch.from_numpy(ids), torch.from_numpy(mask), strict=True)
    cache = Cache(str(target), chunk_bytes=SHARD_BYTES)
    for row, (one, other) in enumerate(_as_bytes(ids, mask) if fast else tensors):
        cache[row] = {"ids": one, "mask": other}
    cache.done()
    cache.merge(1)


def _read_litdata(fast: bool, target: Path, batch_size: int) -> Stored:
    def batches() -> Iterator[tuple[Any, Any]]:
        from litdata import StreamingDataLoader, StreamingDataset

        dataset = StreamingDataset(str(target), shuffle=True, seed=1)
        if fast:
            return _batched(((sample["ids"], sample["mask"]) for sample in dataset), batch_size)
        return ((batch["ids"], batch["mask"]) for batch in StreamingDataLoader(dataset, batch_size=batch_size))

    return batches


def _write_litdata_tokens(target: Path, ids: NDArray[np.int32], mask: NDArray[np.uint8]) -> None:
    import torch
    from litdata.streaming.cache import Cache
    from litdata.streaming.item_loader import TokensLoader

    # Its loader of tokens knows one array: the mask goes into a bit that no id uses.
    both = torch.from_numpy(ids | (mask.astype(np.int32) << MASK_BIT))
    cache = Cache(str(target), chunk_bytes=SHARD_BYTES, item_loader=TokensLoader(ids.shape[1]))
    for row, tokens in enumerate(both):
        cache[row] = tokens.clone()
    cache.done()
    cache.merge(1)


def _read_litdata_tokens(target: Path, batch_size: int) -> Stored:
    def batches() -> Iterator[tuple[Any, Any]]:
        from litdata import StreamingDataLoader, StreamingDataset
        from litdata.streaming.item_loader import TokensLoader

        first = json.loads((target / "index.json").read_bytes())["chunks"][0]
        loader = TokensLoader(first["dim"] // first["chunk_size"])
        dataset = StreamingDataset(str(target), item_loader=loader, shuffle=True, seed=1)
        for batch in StreamingDataLoader(dataset, batch_size=batch_size):
            yield batch & ((1 << MASK_BIT) - 1), batch >> MASK_BIT

    return batches


# --- mosaicml-streaming ---


def _import_streaming() -> Any:
    """The package imports torchvision for its image data sets; rows of tokens do without where it is not installed."""
    try:
        import torchvision  # noqa: F401
    except Exception:
        for name in (
            "torchvision",
            "torchvision.datasets",
            "torchvision.transforms",
            "torchvision.transforms.functional",
        ):
            module = types.ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            module.__path__ = []
            sys.modules[name] = module
        sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
        sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
    import streaming

    return streaming


def _write_mosaic(fast: bool, target: Path, ids: NDArray[np.int32], mask: NDArray[np.uint8]) -> None:
    # With its shape an array is decoded faster than without.
    length = ids.shape[1]
    columns = {"ids": f"ndarray:int32:{length}", "mask": f"ndarray:uint8:{length}"}
    if fast:
        columns = dict.fromkeys(columns, "bytes")
    with _import_streaming().MDSWriter(out=str(target), columns=columns, size_limit=SHARD_BYTES) as writer:
        for one, other in _as_bytes(ids, mask) if fast else zip(ids, mask, strict=True):
            writer.write({"ids": one, "mask": other})


def _read_mosaic(fast: bool, target: Path, batch_size: int) -> Stored:
    # One object for all passes: it registers itself with the machine's shared memory.
    opened: list[Any] = []

    def batches() -> Iterator[tuple[Any, Any]]:
        if not opened:
            opened.append(
                _import_streaming().StreamingDataset(
                    local=str(target), shuffle=True, shuffle_algo="py1e", shuffle_seed=1, batch_size=batch_size
                )
            )
        if fast:
            return _batched(((sample["ids"], sample["mask"]) for sample in opened[0]), batch_size)
        return _loaded(opened[0], batch_size)

    return batches


def index_tables(rows: int, batch_size: int) -> Facts:
    """Measure what mosaicml-streaming computes before the first sample of an epoch: partition and py1e shuffle."""
    _import_streaming()
    from streaming.base.partition.orig import get_partitions_orig
    from streaming.base.shuffle import get_shuffle

    shards = np.full(max(1, rows // 1000), min(rows, 1000), dtype=np.int64)
    with stopwatch() as watch:
        get_partitions_orig(rows, 1, 1, 1, 1, batch_size)
        get_shuffle("py1e", shards, 1, 1, 0)
    return {"cpu": watch.cpu, "wall": watch.wall}


def permuted_index(rows: int) -> Facts:
    """Measure a table of all rows in random order, what Megatron makes (and keeps in a file) for every epoch."""
    with stopwatch() as watch:
        np.random.default_rng(1).permutation(rows)
    return {"cpu": watch.cpu, "wall": watch.wall}


# --- datasets, streaming from Parquet ---


def _write_datasets(target: Path, ids: NDArray[np.int32], mask: NDArray[np.uint8]) -> None:
    import pyarrow
    import pyarrow.parquet

    length = ids.shape[1]
    for number, begin in enumerate(range(0, len(ids), 1024)):
        columns = {
            name: pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows[begin : begin + 1024].ravel()), length)
            for name, rows in (("ids", ids), ("mask", mask))
        }
        # As the other formats: nothing is compressed.
        pyarrow.parquet.write_table(
            pyarrow.table(columns),
            target / f"rows-{number:03d}.parquet",
            row_group_size=256,
            compression="NONE",
            use_dictionary=False,
        )


def _read_datasets(fast: bool, target: Path, batch_size: int) -> Stored:
    def batches() -> Iterator[tuple[Any, Any]]:
        from datasets import load_dataset

        files = sorted(map(str, target.glob("*.parquet")))
        dataset = load_dataset("parquet", data_files=files, split="train", streaming=True)
        shuffled = dataset.shuffle(seed=1, buffer_size=SHUFFLE_BUFFER).with_format("torch")
        if fast:
            return ((batch["ids"], batch["mask"]) for batch in shuffled.iter(batch_size=batch_size))
        return _loaded(shuffled, batch_size)

    return batches


# --- webdataset ---


def _write_webdataset(fast: bool, target: Path, ids: NDArray[np.int32], mask: NDArray[np.uint8]) -> None:
    import webdataset

    end = "bin" if fast else "npy"
    with webdataset.ShardWriter(str(target / "rows-%03d.tar"), maxcount=1024, verbose=0) as writer:
        for row, (one, other) in enumerate(_as_bytes(ids, mask) if fast else zip(ids, mask, strict=True)):
            writer.write({"__key__": f"{row:08d}", f"ids.{end}": one, f"mask.{end}": other})


def _read_webdataset(fast: bool, target: Path, batch_size: int) -> Stored:
    def batches() -> Iterator[tuple[Any, Any]]:
        import torch
        import webdataset

        files = sorted(map(str, target.glob("*.tar")))
        dataset = webdataset.WebDataset(files, shardshuffle=len(files), seed=1).shuffle(SHUFFLE_BUFFER)
        if fast:
            return _batched(((sample["ids.bin"], sample["mask.bin"]) for sample in dataset), batch_size)
        decoded = dataset.decode().to_tuple("ids.npy", "mask.npy").batched(batch_size)
        return ((torch.as_tensor(ids), torch.as_tensor(mask)) for ids, mask in decoded)

    return batches


WRITERS: dict[str, Callable[[Path, NDArray[np.int32], NDArray[np.uint8]], None]] = {
    "megatron": _write_megatron,
    "litdata": partial(_write_litdata, False),
    "litdata-fast": partial(_write_litdata, True),
    "litdata-tokens": _write_litdata_tokens,
    "mosaic": partial(_write_mosaic, False),
    "mosaic-fast": partial(_write_mosaic, True),
    "datasets": _write_datasets,
    "datasets-fast": _write_datasets,
    "webdataset": partial(_write_webdataset, False),
    "webdataset-fast": partial(_write_webdataset, True),
}
READERS: dict[str, Callable[[Path, int], Stored]] = {
    "megatron": _read_megatron,
    "litdata": partial(_read_litdata, False),
    "litdata-fast": partial(_read_litdata, True),
    "litdata-tokens": _read_litdata_tokens,
    "mosaic": partial(_read_mosaic, False),
    "mosaic-fast": partial(_read_mosaic, True),
    "datasets": partial(_read_datasets, False),
    "datasets-fast": partial(_read_datasets, True),
    "webdataset": partial(_read_webdataset, False),
    "webdataset-fast": partial(_read_webdataset, True),
}
