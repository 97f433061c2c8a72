"""Parts to stores: shards, packing plan, tokenizer, report and manifest of every store that a build makes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.cli import VERSION
from trainer.data.build.decide import Decision, RowTable, StorePlan
from trainer.data.build.parts import Part
from trainer.data.build.recipe import Recipe
from trainer.data.build.shard_writer import ShardWriter, file_entry, take_documents
from trainer.data.encode.tokenizer import TOKENIZER_FILES, fingerprint, load_tokenizer, padding_id, template_hash
from trainer.data.quality.balance import class_weights
from trainer.data.store.packing import PLAN_ARRAYS, PlanSpec, RowPlan, default_overlap
from trainer.data.store.reader import (
    MANIFEST,
    SCHEMA_VERSION,
    TokenStore,
    body_hash,
    content_fingerprint,
    manifest_text,
)
from trainer.data.store.report import SourceReport, Tally
from trainer.data.store.shards import write_arrays
from trainer.durable import sha256_of_file, write_errors, write_file, xxh3_of_file
from trainer.errors import DataError, SteadfastError


def plan_spec(recipe: Recipe) -> PlanSpec:
    """The plan that the recipe asks for."""
    length = recipe.rows.sequence_length
    window = recipe.windows.length or length
    return PlanSpec(
        sequence_length=length,
        window=window,
        overlap=default_overlap(window) if recipe.windows.overlap is None else recipe.windows.overlap,
        pin_prefix=recipe.windows.pin_prefix,
        long_text=recipe.rows.long_text,
        packing=recipe.rows.packing,
    )


@dataclass(frozen=True)
class Build:
    """All that the stores of a build are made of: encoded parts, what was decided over their rows, and the reports."""

    recipe: Recipe
    tokenizer: Any
    inputs: Sequence[Mapping[str, Any]]
    sources: Sequence[SourceReport]
    parts: Sequence[Part]
    table: RowTable
    decision: Decision
    shard_tokens: int


def write_stores(directory: Path, build: Build) -> dict[str, Any]:
    """Write every store of the decision into `directory` (or below it, when there are several); returns the report.

    The report is {stores: [{name, ...the manifest without its files}]}.

    Raises:
        DataError: a store in which nothing is supervised, or a limit of the recipe is exceeded.
        CannotWriteError: no space.
    """
    reports = [_with_decision(index, source, build) for index, source in enumerate(build.sources)]
    manifests = []
    for store in build.decision.stores:
        place = directory / store.name
        with write_errors(place):
            place.mkdir(parents=True, exist_ok=True)
        first = store is build.decision.stores[0]
        manifests.append({"name": store.name, **_write_store(place, store, build, reports, with_lists=first)})
    return {"stores": [_summary(manifest) for manifest in manifests]}


def _write_store(
    place: Path, store: StorePlan, build: Build, sources: Sequence[SourceReport], *, with_lists: bool
) -> dict[str, Any]:
    recipe, tokenizer, table = build.recipe, build.tokenizer, build.table
    _copy_tokenizer(Path(recipe.tokenizer), tokenizer, place / "tokenizer")
    writer = ShardWriter(place / "tokens", build.shard_tokens)
    copies = build.decision.copies_in(store, table)
    chosen = _add_documents(writer, copies, build)
    here = _counted(sources, chosen)
    if not chosen["supervised"].sum():
        raise DataError(_nothing_supervised(store, sources), "check the roles, the format (--format) or the split")
    spec = plan_spec(recipe)
    manifest: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "steadfast": VERSION,
        "documents": len(chosen["length"]),
        "tokens": int(chosen["length"].sum()),
        "supervised_tokens": int(chosen["supervised"].sum()),
        "plan": asdict(spec),
        "tokenizer_fingerprint": fingerprint(tokenizer),
        "template_sha256": template_hash(tokenizer),
        "vocabulary_size": len(tokenizer),
        "padding_id": padding_id(tokenizer),
        "labels": list(table.labels),
        "class_weights": _class_weights(table, copies),
        "sources": [asdict(source) for source in here],
        "inputs": [dict(entry) for entry in build.inputs],
        "recipe": _without_salt(recipe.model_dump(mode="json")),
        "files": [*_entries(place, "tokenizer"), *writer.files],
    }
    plan = TokenStore(str(place), place, manifest).compute_plan(spec)
    if plan.n_rows == 0:
        raise DataError(
            f"no supervised token in any row of {spec.sequence_length} tokens", "no row would train anything"
        )
    _count_plan(plan, spec, chosen, here)
    _check_limits(recipe, here)
    manifest |= {
        "rows": plan.n_rows,
        "samples": plan.n_samples,
        "windows_dropped": int(plan.dropped.sum()),
        "supervised_lost": int(plan.lost.sum()),
        "padding_share": round(plan.padding_share, 6),
        "sources": [asdict(source) for source in here],
    }
    manifest["files"].append(_write_plan(place, plan))
    if with_lists:
        _write_lists(place / "reports", build)
        manifest["files"] += _entries(place, "reports")
    manifest["files"].sort(key=lambda entry: str(entry["name"]))
    manifest["body_sha256"] = body_hash(manifest)
    write_file(place / MANIFEST, manifest_text(manifest))
    return manifest


def _write_plan(place: Path, plan: RowPlan) -> dict[str, Any]:
    """Store the plan; returns its manifest entry."""
    name = f"plans/{plan.spec.name}.safetensors"
    with write_errors(place):
        (place / "plans").mkdir()
    arrays = {array: getattr(plan, array) for array in PLAN_ARRAYS}
    return file_entry(name, write_arrays(place / name, arrays, {"schema": str(SCHEMA_VERSION)}))


def _without_salt(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe as it may be told: who knows the salt of pseudonyms can find out the names behind them."""
    hidden = "[redacted]" if recipe["clean"]["pii_salt"] else ""
    return recipe | {"clean": recipe["clean"] | {"pii_salt": hidden}}


def _nothing_supervised(store: StorePlan, sources: Sequence[SourceReport]) -> str:
    place = f"{sources[0].files[0]}:1"
    where = f"the split {store.name}" if store.name else f"{sum(source.rows for source in sources)} rows"
    reasons = [f"{count} {name}" for source in sources for name, count in source.left_out.counts.items()]
    return f"{place}: no supervised token in {where}" + (f" ({', '.join(reasons)})" if reasons else "")


def _add_documents(writer: ShardWriter, copies: NDArray[np.int32], build: Build) -> dict[str, NDArray[Any]]:
    """Write the documents of one store; returns their `length`, `supervised` tokens and `source`, in order.

    Repeated rows come again after all rows have come once, so that copies do not share a row of training.
    """
    table = build.table
    lengths, supervised, source = [], [], []
    for copy in range(int(copies.max(initial=0))):
        for part, first in zip(build.parts, table.first_of_part, strict=False):
            row = part.arrays["row"].astype(np.int64) + first
            chosen = np.flatnonzero(copies[row] > copy)
            if not len(chosen):
                continue
            documents = take_documents(part.arrays, chosen)
            rows = row[chosen]
            documents |= {
                "source": table.source[rows],
                "file": table.file[rows],
                "line": table.line[rows],
                "label": table.label[rows],
            }
            writer.add(documents)
            lengths.append(np.diff(documents["document_offsets"].astype(np.int64)))
            supervised.append(_supervised(documents))
            source.append(documents["source"])
    writer.flush()
    empty = [np.empty(0, dtype=np.int64)]
    return {
        "length": np.concatenate(lengths or empty),
        "supervised": np.concatenate(supervised or empty),
        "source": np.concatenate(source or empty),
    }


def _supervised(documents: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
    """Supervised tokens of every document."""
    spans = documents["loss_spans"].astype(np.int64)
    before = np.concatenate([[0], np.cumsum(spans[:, 1] - spans[:, 0])])
    counted: NDArray[np.int64] = np.diff(before[documents["span_offsets"].astype(np.int64)])
    return counted


def _with_decision(index: int, source: SourceReport, build: Build) -> SourceReport:
    """The counts of a source with what was decided over all rows."""
    left_out, notes = Tally(), Tally()
    left_out.merge(source.left_out)
    notes.merge(source.notes)
    for tally, found, ending in ((left_out, build.decision.left_out, ""), (notes, build.decision.kept, " kept")):
        for reason, rows in found:
            mine = rows[build.table.source[rows] == index]
            if len(mine):
                tally.add(f"{reason}{ending}", _place(int(mine[0]), build), len(mine))
    kept = int(np.count_nonzero(build.decision.kept_rows(build.table) & (build.table.source == index)))
    if kept + sum(left_out.counts.values()) != source.rows:
        raise SteadfastError(
            f"source {source.name}: {source.rows} rows were read, {kept} kept and "
            f"{sum(left_out.counts.values())} left out: they do not add up",
            "this is a bug of ours: report it",
        )
    return replace(source, kept=kept, left_out=left_out, notes=notes)


def _place(row: int, build: Build) -> str:
    return f"{build.inputs[int(build.table.file[row])]['name']}:{int(build.table.line[row])}"


def _counted(sources: Sequence[SourceReport], chosen: Mapping[str, NDArray[Any]]) -> list[SourceReport]:
    """The reports with the documents and tokens that are in this store."""

    def per_source(weights: NDArray[Any] | None) -> NDArray[np.int64]:
        return np.bincount(chosen["source"], weights=weights, minlength=len(sources)).astype(np.int64)

    documents, tokens, supervised = (per_source(w) for w in (None, chosen["length"], chosen["supervised"]))
    return [
        replace(source, documents=int(documents[i]), tokens=int(tokens[i]), supervised_tokens=int(supervised[i]))
        for i, source in enumerate(sources)
    ]


def _count_plan(
    plan: RowPlan, spec: PlanSpec, chosen: Mapping[str, NDArray[Any]], sources: Sequence[SourceReport]
) -> None:
    """Put what the plan lost into the reports."""

    def per_source(weights: NDArray[Any]) -> NDArray[np.int64]:
        return np.bincount(chosen["source"], weights=weights, minlength=len(sources)).astype(np.int64)

    long_documents = per_source(chosen["length"] > spec.window)
    dropped, lost = per_source(plan.dropped), per_source(plan.lost)
    for index, source in enumerate(sources):
        source.long_documents = int(long_documents[index])
        source.windows_dropped, source.supervised_lost = int(dropped[index]), int(lost[index])


def _check_limits(recipe: Recipe, sources: Sequence[SourceReport]) -> None:
    for source in sources:
        if not source.tokens:
            continue
        share = source.supervised_tokens / source.tokens
        if share < recipe.limits.min_supervised:
            raise DataError(
                f"source {source.name} ({source.files[0]}): {share:.1%} of the tokens are supervised, less than "
                f"limits.min_supervised={recipe.limits.min_supervised:g}",
                "look at the mask with steadfast data inspect, or lower the limit",
            )
        lost = source.supervised_lost / max(source.supervised_tokens, 1)
        if lost > recipe.limits.max_truncated:
            raise DataError(
                f"source {source.name} ({source.files[0]}): {lost:.1%} of the supervised tokens are lost to "
                f"rows.long_text={recipe.rows.long_text}, more than limits.max_truncated="
                f"{recipe.limits.max_truncated:g}",
                "take rows.long_text=windows or a longer rows.sequence_length, or raise the limit",
            )


def _class_weights(table: RowTable, copies: NDArray[np.int32]) -> dict[str, float]:
    """Inverse frequency of every label in a store, mean 1; empty without labels."""
    labelled = table.label >= 0
    if not labelled.any():
        return {}
    counts = np.bincount(table.label[labelled], weights=copies[labelled], minlength=len(table.labels))
    return class_weights({name: int(count) for name, count in zip(table.labels, counts, strict=True) if count})


def _write_lists(directory: Path, build: Build) -> None:
    """reports/left_out.jsonl: rows left out and duplicates, and why; quarantine.jsonl: bad rows and their bytes."""
    listed: dict[str, list[dict[str, Any]]] = {"left_out": [], "quarantine": []}
    for part in build.parts:
        for row in part.left_out:
            listed["quarantine" if "raw" in row else "left_out"].append(row)
    for kept, found in ((False, build.decision.left_out), (True, build.decision.kept)):
        for reason, rows in found:
            for row in rows.tolist():
                repeats = int(build.decision.repeats[row])
                more = {"repeats": _place(repeats, build)} if repeats != row else {}
                listed["left_out"].append({"place": _place(row, build), "reason": reason, "kept": kept, **more})
    for name, entries in listed.items():
        if entries:
            with write_errors(directory):
                directory.mkdir(exist_ok=True)
            lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
            write_file(directory / f"{name}.jsonl", lines)


def _copy_tokenizer(source: Path, tokenizer: Any, target: Path) -> None:
    """Copy the tokenizer's files and check that the copy behaves like the original."""
    with write_errors(target):
        target.mkdir()
        if not (source / "tokenizer.json").is_file():
            # A lone SentencePiece model: the store gets the tokenizer that was proved to have its ids.
            tokenizer.save_pretrained(target)
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                write_file(target / name, (source / name).read_bytes())
    copy = load_tokenizer(target)
    if fingerprint(copy) != fingerprint(tokenizer) or template_hash(copy) != template_hash(tokenizer):
        raise DataError(
            f"the tokenizer in {source} needs files beyond {', '.join(TOKENIZER_FILES[:4])}, ...",
            "save it again with tokenizer.save_pretrained(...)",
        )


def _entries(place: Path, folder: str) -> list[dict[str, Any]]:
    """Manifest entries of the files in one folder of the store."""
    return [
        {
            "name": file.relative_to(place).as_posix(),
            "bytes": file.stat().st_size,
            "xxh3": xxh3_of_file(file),
            "sha256": sha256_of_file(file),
        }
        for file in sorted((place / folder).glob("*"))
        if file.is_file()
    ]


def _summary(manifest: Mapping[str, Any]) -> dict[str, Any]:
    left_away = ("files", "recipe", "inputs", "body_sha256", "steadfast", "schema")
    short = {key: value for key, value in manifest.items() if key not in left_away}
    return {**short, "fingerprint": content_fingerprint(manifest)}
