"""What a build read, kept and left out: counts with the place where each first happened, per source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

DUPLICATE, NEAR_DUPLICATE = "exact duplicates", "near duplicates"


@dataclass
class Tally:
    """Counts by name, each with the place (`file:line`) of its first occurrence."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, place: str = "", count: int = 1) -> None:
        """Count `name` once more, or `count` times."""
        if count:
            self.counts[name] = self.counts.get(name, 0) + count
            if place:
                self.first.setdefault(name, place)

    def merge(self, later: Tally) -> None:
        """Add the counts of what came after."""
        for name, count in later.counts.items():
            self.add(name, later.first.get(name, ""), count)


@dataclass
class SourceReport:
    """Counts of one source.

    `rows` were read, `kept` of them are in a store of the build, `left_out` counts the others by reason, `changed` what
    was changed in rows on the way, `notes` what is worth knowing about kept rows. Documents and tokens are those of one
    store; `methods` counts documents by how their mask was found. The last three are of the plan that is stored.
    """

    name: str
    files: list[str] = field(default_factory=list)
    bytes: int = 0
    format: str = ""
    mapping: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    kept: int = 0
    documents: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    methods: dict[str, int] = field(default_factory=dict)
    left_out: Tally = field(default_factory=Tally)
    changed: Tally = field(default_factory=Tally)
    notes: Tally = field(default_factory=Tally)
    long_documents: int = 0
    windows_dropped: int = 0
    supervised_lost: int = 0

    def merge(self, part: SourceReport) -> None:
        """Add the counts of a later part of the same source."""
        self.rows += part.rows
        for name, count in part.methods.items():
            self.methods[name] = self.methods.get(name, 0) + count
        for mine, more in ((self.left_out, part.left_out), (self.changed, part.changed), (self.notes, part.notes)):
            mine.merge(more)


def source_report(value: Mapping[str, Any]) -> SourceReport:
    """Back from plain values (`dataclasses.asdict`)."""
    tallies = {name: Tally(**value[name]) for name in ("left_out", "changed", "notes")}
    return SourceReport(**{**value, **tallies})


def source_lines(sources: list[dict[str, Any]]) -> Iterator[str]:
    """The mask report of every source for a terminal."""
    for source in sources:
        share = source["supervised_tokens"] / max(source["tokens"], 1)
        found = source["methods"]
        methods = f"by {next(iter(found))}" if len(found) == 1 else _counted_methods(found)
        files = source["files"]
        mapping = ", ".join(f"{key} from {column}" for key, column in source["mapping"].items() if key != column)
        yield f"{source['name']}: {files[0]}" + (f" and {len(files) - 1} more files" if len(files) > 1 else "")
        yield (
            f"  format     {source['format']}"
            + (f" ({mapping})" if mapping else "")
            + (f", {source['rows']:,} rows -> {source['documents']:,} documents")
        )
        yield f"  tokens     {source['tokens']:,}, of them supervised {source['supervised_tokens']:,} ({share:.1%})"
        if methods:
            yield f"  loss mask  {methods}"
        for kind, word in (("left_out", "left out"), ("changed", "changed"), ("notes", "note")):
            for name, count in source[kind]["counts"].items():
                place = source[kind]["first"].get(name)
                yield f"  {word:<10} {count:,} {name}" + (f", first {place}" if place else "")
        if source["windows_dropped"]:
            yield f"  note       {source['windows_dropped']:,} windows without a target dropped"
        if source["supervised_lost"]:
            lost = source["supervised_lost"] / max(source["supervised_tokens"], 1)
            yield f"  note       {source['supervised_lost']:,} supervised tokens ({lost:.2%}) lost to long_text"


def _counted_methods(found: Mapping[str, int]) -> str:
    """How masks were found, the most frequent way first; counted when encoded, before duplicates are left out."""
    ranked = sorted(found.items(), key=lambda item: -item[1])
    return ", ".join(f"{count:,} by {name}" for name, count in ranked)


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report of a build for a terminal: every source once, then a line or two a store."""
    stores = report["stores"]
    yield from source_lines([_over_all_stores(number, stores) for number in range(len(stores[0]["sources"]))])
    for store in stores:
        plan = store["plan"]
        name = f"{store['name']:<10}" if store["name"] else "store     "
        yield (
            f"{name} {store['documents']:,} documents, {store['tokens']:,} tokens, "
            f"{store['supervised_tokens']:,} supervised"
        )
        yield (
            f"  rows     {store['rows']:,} of {plan['sequence_length']:,} tokens from {store['samples']:,} samples, "
            f"{store['padding_share']:.1%} padding; windows overlap by {plan['overlap']} tokens, "
            f"{store['windows_dropped']:,} without a target dropped"
        )
    yield f"written to {report['path']}"


def _over_all_stores(number: int, stores: list[dict[str, Any]]) -> dict[str, Any]:
    """One source's counts summed over the stores of a split; what was read is the same in each."""
    mine: list[dict[str, Any]] = [store["sources"][number] for store in stores]
    summed = ("documents", "tokens", "supervised_tokens", "windows_dropped", "supervised_lost", "long_documents")
    return mine[0] | {name: sum(source[name] for source in mine) for name in summed}
