"""Write the documents of a token store in another tool's format; what is written appears complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainer.data.sources.megatron import MASK
from trainer.data.store.interop.megatron import write_megatron
from trainer.data.store.reader import TokenStore
from trainer.durable import sync_directory, sync_file, write_errors
from trainer.errors import CannotWriteError

IGNORED_LABEL = -100
ROWS_A_GROUP = 4096
Target = Literal["parquet", "megatron", "datasets"]


def export_store(store: TokenStore, out: Path, target: Target) -> dict[str, Any]:
    """Write all documents of `store` to `out` and say what was written: {format, path, documents, tokens, files}.

    `parquet` makes the file `out`, `datasets` the directory `out` (for `datasets.load_from_disk`), `megatron` the files
    out.bin, out.idx, out.loss_mask.bin and out.loss_mask.idx.

    Raises:
        CannotWriteError: `out` is taken or cannot be written.
    """
    writers = {"parquet": _parquet, "datasets": _datasets, "megatron": _megatron}
    files = writers[target](store, out)
    return {
        "format": target,
        "path": str(out),
        "documents": store.n_documents,
        "tokens": int(store.manifest["tokens"]),
        "files": [str(file) for file in files],
    }


def documents(store: TokenStore) -> Iterator[dict[str, Any]]:
    """Every document as {input_ids, labels, source}: int32, int32, name of its source."""
    sources = [source["name"] for source in store.manifest["sources"]]
    of_document = store.column("source")
    for index in range(store.n_documents):
        ids, spans = store.document(index)
        labels = np.full(len(ids), IGNORED_LABEL, dtype=np.int32)
        for start, stop in spans.tolist():
            labels[start:stop] = ids[start:stop]
        yield {"input_ids": ids.astype(np.int32), "labels": labels, "source": sources[int(of_document[index])]}


def _parquet(store: TokenStore, out: Path) -> list[Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("source", pa.string())])
    temporary = _beside(out)
    try:
        with write_errors(out), pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            group: list[dict[str, Any]] = []
            for document in documents(store):
                group.append(document)
                if len(group) == ROWS_A_GROUP:
                    writer.write_table(pa.Table.from_pylist(group, schema))
                    group.clear()
            writer.write_table(pa.Table.from_pylist(group, schema))
        _publish(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return [out]


def _datasets(store: TokenStore, out: Path) -> list[Path]:
    from datasets import Dataset, Features, List, Value

    features = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "source": Value("string")})
    temporary = _beside(out)
    with write_errors(out), tempfile.TemporaryDirectory(dir=temporary.parent, prefix=".exporting-") as cache:
        try:
            dataset = Dataset.from_generator(
                documents,
                gen_kwargs={"store": store},
                features=features,
                cache_dir=cache,
                fingerprint=store.fingerprint[:16],
            )
            dataset.save_to_disk(str(temporary))
            temporary.rename(out)
            sync_directory(out.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return [out]


def _megatron(store: TokenStore, out: Path) -> list[Path]:
    wide = np.dtype(np.uint16) if store.vocabulary_size <= 1 << 16 else np.dtype(np.int32)

    def masks() -> Iterator[NDArray[Any]]:
        for index in range(store.n_documents):
            ids, spans = store.document(index)
            mask = np.zeros(len(ids), dtype=np.uint8)
            for start, stop in spans.tolist():
                mask[start:stop] = 1
            yield mask

    def ids_of_all() -> Iterator[NDArray[Any]]:
        for index in range(store.n_documents):
            yield store.document(index)[0].astype(wide)

    written = []
    for stem, arrays, dtype in (
        (f"{out.name}.{MASK}", masks(), np.dtype(np.uint8)),
        (out.name, ids_of_all(), wide),
    ):
        names = [out.with_name(f"{stem}{ending}") for ending in (".bin", ".idx")]
        temporary = [_beside(name) for name in names]
        try:
            with write_errors(out):
                write_megatron(temporary[0], temporary[1], arrays, dtype)
            for half, name in zip(temporary, names, strict=True):
                _publish(half, name)
        finally:
            for half in temporary:
                half.unlink(missing_ok=True)
        written += names
    return written


def _beside(out: Path) -> Path:
    """A free name beside `out`; CannotWriteError when `out` is taken."""
    if out.exists():
        raise CannotWriteError(f"{out} exists", "choose another name, or remove it first")
    with write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    return out.with_name(f".{out.name}.{os.getpid()}.exporting")


def _publish(temporary: Path, out: Path) -> None:
    sync_file(temporary)
    with write_errors(out):
        temporary.rename(out)
        sync_directory(out.parent)
