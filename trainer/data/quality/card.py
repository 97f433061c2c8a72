"""The data card: what is in a token store, what was left out and why, and what is trained on.

One plain dict (`DataCard`) gives two views: a page of HTML that needs nothing but itself, and text for a terminal. Both
say when rows are unaccounted for: read, but neither kept nor dropped with a reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


class SourceFigures(TypedDict):
    """One source. rows = kept + the sum of `dropped`; `documents` may be more than `kept` (turns, copies) or fewer.

    `dropped` counts rows by reason, `changed` what was replaced or put right, by what it is.
    """

    name: str
    format: str
    rows: int
    kept: int
    documents: int
    tokens: int
    supervised_tokens: int
    dropped: Mapping[str, int]
    changed: Mapping[str, int]


class LengthFigures(TypedDict):
    """Histogram of document lengths: counts[i] documents have edges[i] <= tokens < edges[i + 1]."""

    edges: Sequence[int]
    counts: Sequence[int]
    percentiles: Mapping[str, int]


class SplitFigures(TypedDict):
    """One split."""

    name: str
    documents: int
    tokens: int
    supervised_tokens: int


class DuplicatePair(TypedDict):
    """One dropped document and the one that was kept in its place."""

    kept: str
    dropped: str
    kind: str


class DuplicateFigures(TypedDict):
    """Dropped duplicates by kind, with some examples."""

    exact: int
    near: int
    examples: Sequence[DuplicatePair]


class MaskPart(TypedDict):
    """A piece of text; `supervised`: its tokens are targets."""

    text: str
    supervised: bool


class MaskExample(TypedDict):
    """A document as training sees it, in order."""

    place: str
    source: str
    parts: Sequence[MaskPart]


class DataCard(TypedDict):
    """Everything on the card. `facts` are free lines such as tokenizer, template, seed; `notes` free sentences."""

    title: str
    facts: Mapping[str, str]
    sources: Sequence[SourceFigures]
    lengths: NotRequired[LengthFigures]
    splits: NotRequired[Sequence[SplitFigures]]
    duplicates: NotRequired[DuplicateFigures]
    examples: NotRequired[Sequence[MaskExample]]
    notes: NotRequired[Sequence[str]]


def length_figures(lengths: NDArray[np.int64]) -> LengthFigures:
    """Histogram of document lengths in tokens, two bins to each power of two, and p5, p50, p95, p99 and max."""
    if not len(lengths):
        return {"edges": [0, 1], "counts": [0], "percentiles": {}}
    largest = int(lengths.max())
    # Steps of sqrt(2), so that bars of equal width are equal ratios of lengths.
    candidates = sorted({0, *(round(2 ** (step / 2)) for step in range(2 * largest.bit_length() + 1))})
    low = max(index for index, edge in enumerate(candidates) if edge <= int(lengths.min()))
    high = min(index for index, edge in enumerate(candidates) if edge > largest)
    edges = candidates[low : high + 1]
    counts = np.histogram(lengths, bins=edges)[0]
    quantiles = np.percentile(lengths, [5, 50, 95, 99], method="lower").astype(np.int64).tolist()
    names = ("p5", "p50", "p95", "p99", "max")
    return {
        "edges": edges,
        "counts": counts.tolist(),
        "percentiles": dict(zip(names, [*quantiles, largest], strict=True)),
    }


def unaccounted(source: SourceFigures) -> int:
    """Rows that were read, but neither kept nor dropped for a reason; 0 when the books are right."""
    return source["rows"] - source["kept"] - sum(source["dropped"].values())


# --- characters that cannot be seen -----------------------------------------------------------------------------------

# C0, DEL and C1; soft hyphen; zero-width, direction and line separators; the byte order mark; half surrogates.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\uffff\ud800-\udfff]")


def _visible(text: str) -> Iterator[tuple[str, str]]:
    """(text, "") for what can be seen and (stand-in, "U+000A") for what cannot; a line feed also breaks the line."""
    last = 0
    for match in _UNSEEN.finditer(text):
        if last < match.start():
            yield text[last : match.start()], ""
        character, last = match.group(), match.end()
        code = ord(character)
        stand_in = {"\n": "↵", "\t": "→", "\x7f": "␡", "\ufffd": "\ufffd"}.get(character)
        if stand_in is None:
            stand_in = chr(0x2400 + code) if code < 0x20 else f"‹{code:04X}›"
        yield stand_in, f"U+{code:04X}"
        if character in "\n\t":
            yield character, ""
    if last < len(text):
        yield text[last:], ""


# --- HTML -------------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --ground: #fbfbf9; --panel: #ffffff; --ink: #1c1d1f; --quiet: #5c6168;
  --line: #dfe1e4; --accent: #1f6f5c; --mark: #d3f0e4; --mark-ink: #0b3b2e; --alarm: #a4262c; --unseen: #8a4b08; }
@media (prefers-color-scheme: dark) { :root { --ground: #15171a; --panel: #1d2024; --ink: #e8e9eb; --quiet: #a2a8b0;
  --line: #343940; --accent: #5fc7a9; --mark: #144a3b; --mark-ink: #d8f7ec; --alarm: #ff8f8f; --unseen: #e0a35a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: .95rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
p { max-width: 46rem; } .quiet, caption, figcaption, dt { color: var(--quiet); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.tiles div { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem; }
.tiles dt { font-size: .85rem; } .tiles dd { margin: 0; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 1rem 0; font-size: .9rem; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; }
.scroll:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
caption { text-align: left; padding: .6rem .9rem; font-size: .85rem; }
th, td { padding: .45rem .9rem; text-align: left; border-top: 1px solid var(--line); vertical-align: top; }
thead th { font-weight: 600; white-space: nowrap; } tbody th { font-weight: 500; overflow-wrap: anywhere; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.alarm { color: var(--alarm); font-weight: 600; }
.bar { display: block; height: .35rem; border-radius: .2rem; background: var(--line); margin-top: .3rem; }
.bar i { display: block; height: 100%; border-radius: inherit; background: var(--accent); }
figure { margin: 0; background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; }
figure svg { display: block; width: 100%; height: auto; } figcaption { font-size: .85rem; margin-top: .5rem; }
svg text { fill: var(--quiet); font: 11px system-ui, sans-serif; } svg rect { fill: var(--accent); }
svg line { stroke: var(--line); }
details { margin-top: .5rem; } summary { cursor: pointer; }
article { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; }
article + article { margin-top: .75rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.6 ui-monospace, monospace; }
mark { background: var(--mark); color: var(--mark-ink); border-bottom: 2px solid var(--accent); }
.unseen { color: var(--unseen); font-size: .8em; }
@media print { .scroll, figure, article { break-inside: avoid; } }
"""


def card_html(card: DataCard) -> str:
    """The card as one HTML document: no script, no outside asset, dark and light, every text of the data escaped."""
    sections = [
        _sources_html(card["sources"]),
        _changes_html(card["sources"]),
        _lengths_html(card["lengths"]) if "lengths" in card else "",
        _splits_html(card["splits"]) if card.get("splits") else "",
        _duplicates_html(card["duplicates"]) if "duplicates" in card else "",
        _examples_html(card["examples"]) if card.get("examples") else "",
    ]
    notes = "".join(f"<li>{_html(note)}</li>" for note in card.get("notes", ()))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_html(card['title'])}: data card</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{_html(card['title'])}</h1>\n"
        '<p class="quiet">Data card: what is in it, what was left out and why, what is trained on.</p>\n'
        f"{_tiles_html(card)}{_facts_html(card['facts'])}"
        + "".join(section for section in sections if section)
        + (f"<section>\n<h2>Notes</h2>\n<ul>{notes}</ul>\n</section>\n" if notes else "")
        + "</main>\n</body>\n</html>\n"
    )


def _html(text: str) -> str:
    """Text of the data, escaped, what cannot be seen made visible."""
    return "".join(
        f'<span class="unseen" title="{code}">{escape(piece)}</span>' if code else escape(piece)
        for piece, code in _visible(text)
    )


def _tiles_html(card: DataCard) -> str:
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd class={'alarm' if alarm else 'figure'}>{escape(value)}</dd></div>"
        for name, value, alarm in _headline(card)
    )
    return f'<dl class="tiles">{tiles}</dl>\n'


def _facts_html(facts: Mapping[str, str]) -> str:
    lines = "".join(f"<dt>{_html(name)}</dt><dd>{_html(value)}</dd>" for name, value in facts.items())
    return f'<dl class="facts">{lines}</dl>\n' if lines else ""


def _table_html(title: str, caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: int) -> str:
    """A section with one table; the last `numbers` columns are figures. Cells are HTML already, titles are not."""
    first_number = len(columns) - numbers

    def kind(column: int) -> str:
        return ' class="number"' if column >= first_number else ""

    head = "".join(f'<th scope="col"{kind(column)}>{escape(name)}</th>' for column, name in enumerate(columns))
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{cell}</th>' if column == 0 else f"<td{kind(column)}>{cell}</td>"
            for column, cell in enumerate(row)
        )
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<section>\n<h2>{escape(title)}</h2>\n<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(title)}">\n<table>\n<caption>{escape(caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n</section>\n"
    )


def _share_html(part: int, whole: int) -> str:
    share = part / max(whole, 1)
    return f'{share:.1%}<span class="bar" aria-hidden="true"><i style="width:{min(share, 1):.1%}"></i></span>'


def _sources_html(sources: Sequence[SourceFigures]) -> str:
    columns = ("Source", "Format", "Rows", "Kept", "Dropped", "Documents", "Tokens", "Supervised")
    rows = [
        (
            _html(source["name"]),
            _html(source["format"]),
            f"{source['rows']:,}",
            f"{source['kept']:,}",
            f"{sum(source['dropped'].values()):,}" + _unaccounted_html(unaccounted(source)),
            f"{source['documents']:,}",
            f"{source['tokens']:,}",
            _share_html(source["supervised_tokens"], source["tokens"]),
        )
        for source in sources
    ]
    return _table_html("Sources", "Supervised: share of the tokens that are targets.", columns, rows, 6)


def _unaccounted_html(rows: int) -> str:
    return f'<br><span class="alarm">{rows:+,} unaccounted for</span>' if rows else ""


def _changes_html(sources: Sequence[SourceFigures]) -> str:
    rows = [
        (_html(source["name"]), kind, _html(reason), f"{count:,}", share)
        for source in sources
        for kind, counts in (("dropped", source["dropped"]), ("changed", source["changed"]))
        for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        for share in [f"{count / max(source['rows'], 1):.2%}" if kind == "dropped" else ""]
        if count
    ]
    caption = "Dropped: rows that are not in the data. Changed: how often something was replaced or put right."
    columns = ("Source", "What happened", "Reason", "Count", "Of its rows")
    return _table_html("Left out and changed", caption, columns, rows, 2) if rows else ""


def _lengths_html(lengths: LengthFigures) -> str:
    edges, counts = lengths["edges"], lengths["counts"]
    width, height, left, bottom = 760, 220, 10, 36
    slot = (width - 2 * left) / max(len(counts), 1)
    tallest = max(max(counts, default=0), 1)
    total = max(sum(counts), 1)
    bars, labels, rows = [], [], []
    every = -(-len(counts) // 14)
    for index, count in enumerate(counts):
        tall = (height - bottom - 18) * count / tallest
        x, y = left + index * slot, height - bottom - tall
        span = f"{edges[index]:,} to {edges[index + 1] - 1:,}"
        if count:
            bars.append(
                f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{max(slot - 2, 1):.1f}" height="{tall:.1f}" rx="2">'
                f"<title>{span} tokens: {count:,} documents ({count / total:.1%})</title></rect>"
            )
        if index % every == 0:
            labels.append(f'<text x="{x:.1f}" y="{height - bottom + 15}">{edges[index]:,}</text>')
        rows.append(f'<tr><th scope="row">{span}</th><td class="number">{count:,}</td></tr>')
    known = ", ".join(f"{name} {value:,}" for name, value in lengths["percentiles"].items())
    summary = f"{sum(counts):,} documents by length in tokens" + (f": {known}" if known else "")
    return (
        "<section>\n<h2>Lengths</h2>\n<figure>\n"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(summary)}">\n'
        f'<line x1="{left}" y1="{height - bottom}" x2="{width - left}" y2="{height - bottom}"/>\n'
        + "\n".join([*bars, *labels])
        + f'\n<text x="{width - left}" y="{height - 4}" text-anchor="end">tokens of a document (log scale)</text>\n'
        "</svg>\n"
        f"<figcaption>{escape(summary)}</figcaption>\n"
        "<details><summary>As a table</summary>\n<table>\n"
        '<thead><tr><th scope="col">Tokens</th><th scope="col" class="number">Documents</th></tr></thead>\n'
        f"<tbody>{''.join(rows)}</tbody>\n</table>\n</details>\n</figure>\n</section>\n"
    )


def _splits_html(splits: Sequence[SplitFigures]) -> str:
    total = sum(split["documents"] for split in splits)
    rows = [
        (
            _html(split["name"]),
            f"{split['documents']:,}",
            _share_html(split["documents"], total),
            f"{split['tokens']:,}",
            f"{split['supervised_tokens']:,}",
        )
        for split in splits
    ]
    columns = ("Split", "Documents", "Share", "Tokens", "Supervised tokens")
    return _table_html("Splits", "Documents of one group are never in two splits.", columns, rows, 4)


def _duplicates_html(duplicates: DuplicateFigures) -> str:
    said = f"{duplicates['exact']:,} exact and {duplicates['near']:,} near duplicates were left out."
    if not duplicates["examples"]:
        return f"<section>\n<h2>Duplicates</h2>\n<p>{said}</p>\n</section>\n"
    rows = [(_html(pair["dropped"]), _html(pair["kept"]), _html(pair["kind"])) for pair in duplicates["examples"]]
    columns = ("Left out", "Kept instead", "Kind", "Similarity")
    return _table_html("Duplicates", f"{said} Some of them:", columns, rows, 1)


def _examples_html(examples: Sequence[MaskExample]) -> str:
    articles = []
    for example in examples:
        body = "".join(
            f"<mark>{_html(part['text'])}</mark>" if part["supervised"] else _html(part["text"])
            for part in example["parts"]
        )
        articles.append(
            f'<article>\n<h3>{_html(example["place"])} <span class="quiet">{_html(example["source"])}</span></h3>\n'
            f'<pre tabindex="0">{body}</pre>\n</article>\n'
        )
    return (
        "<section>\n<h2>What is trained on</h2>\n<p>Documents as training sees them. Targets are "
        "<mark>marked and underlined</mark>; the rest is context. ↵, → and ‹200B› stand for what cannot be seen.</p>\n"
        + "".join(articles)
        + "</section>\n"
    )


# --- terminal ---------------------------------------------------------------------------------------------------------


def show_card(card: DataCard, console: Console | None = None) -> None:
    """The card on a terminal (or any rich console); nothing in the data can steer it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False)

    def table(title: str, *columns: str, numbers: int) -> Table:
        result = Table(title=title, title_justify="left", title_style="bold")
        for index, name in enumerate(columns):
            result.add_column(name, justify="right" if index >= len(columns) - numbers else "left", overflow="fold")
        return result

    console.print(Text.assemble((_plain(card["title"]), "bold"), "  data card"))
    for name, value, alarm in _headline(card):
        console.print(Text.assemble((f"  {name:<20}", "dim"), (value, "bold red" if alarm else "")))
    for name, value in card["facts"].items():
        console.print(Text.assemble((f"  {_plain(name):<20}", "dim"), _plain(value)))

    sources = table(
        "Sources", "source", "format", "rows", "kept", "dropped", "documents", "tokens", "supervised", numbers=6
    )
    changes = table("Left out and changed", "source", "", "reason", "count", numbers=1)
    for source in card["sources"]:
        named = Text(_plain(source["name"]))
        dropped = Text(f"{sum(source['dropped'].values()):,}")
        if missing := unaccounted(source):
            dropped.append(f" {missing:+,} unaccounted for", "bold red")
        numbers = (f"{source['documents']:,}", f"{source['tokens']:,}")
        share = f"{source['supervised_tokens'] / max(source['tokens'], 1):.1%}"
        form = Text(_plain(source["format"]))
        sources.add_row(named, form, f"{source['rows']:,}", f"{source['kept']:,}", dropped, *numbers, share)
        for kind, counts in (("dropped", source["dropped"]), ("changed", source["changed"])):
            for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
                if count:
                    changes.add_row(named, kind, Text(_plain(reason)), f"{count:,}")
    console.print(sources)
    if changes.row_count:
        console.print(changes)
    if "lengths" in card:
        _show_lengths(card["lengths"], console)
    if card.get("splits"):
        splits = table("Splits", "split", "documents", "tokens", "supervised tokens", numbers=3)
        for split in card["splits"]:
            figures = (split["documents"], split["tokens"], split["supervised_tokens"])
            splits.add_row(Text(_plain(split["name"])), *(f"{figure:,}" for figure in figures))
        console.print(splits)
    if duplicates := card.get("duplicates"):
        console.print(Text(f"Duplicates left out: {duplicates['exact']:,} exact, {duplicates['near']:,} near", "bold"))
        for pair in duplicates["examples"]:
            line = f"  {pair['dropped']} = {pair['kept']} ({pair['kind']})"
            console.print(Text(_plain(line)))
    if examples := card.get("examples"):
        console.print(Text.assemble(("What is trained on: ", "bold"), ("⟦targets⟧", "green")))
        for example in examples:
            console.print(Text(f"-- {_plain(example['place'])} {_plain(example['source'])}", "dim"))
            console.print(_marked(example["parts"]))
    for note in card.get("notes", ()):
        console.print(Text(f"note  {_plain(note)}"))


def _marked(parts: Sequence[MaskPart]) -> Text:
    from rich.text import Text

    text = Text()
    for part in parts:
        if part["supervised"]:
            text.append(f"⟦{_plain(part['text'])}⟧", "green")
        else:
            text.append(_plain(part["text"]))
    return text


def _show_lengths(lengths: LengthFigures, console: Console) -> None:
    from rich.text import Text

    counts = lengths["counts"]
    known = ", ".join(f"{name} {value:,}" for name, value in lengths["percentiles"].items())
    console.print(Text.assemble(("Lengths in tokens", "bold"), f"  {known}"))
    for first, after, count in zip(lengths["edges"], lengths["edges"][1:], counts, strict=False):
        eighths = round(40 * 8 * count / max(max(counts, default=0), 1))
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        console.print(Text.assemble((f"  {first:>9,} to {after - 1:>9,} ", "dim"), f"{count:>11,} ", (bar, "green")))


def _plain(text: str) -> str:
    return "".join(piece for piece, _ in _visible(text))


def _headline(card: DataCard) -> list[tuple[str, str, bool]]:
    """(name, value, whether it is an alarm) of the figures that come first."""
    sources = card["sources"]
    tokens = sum(source["tokens"] for source in sources)
    supervised = sum(source["supervised_tokens"] for source in sources)
    rows = sum(source["rows"] for source in sources)
    dropped = sum(sum(source["dropped"].values()) for source in sources)
    missing = sum(abs(unaccounted(source)) for source in sources)
    headline = [
        ("Documents", f"{sum(source['documents'] for source in sources):,}", False),
        ("Tokens", f"{tokens:,}", False),
        ("Supervised", f"{supervised / max(tokens, 1):.1%}", bool(tokens) and not supervised),
        ("Rows read", f"{rows:,}", False),
        ("Rows dropped", f"{dropped:,} ({dropped / max(rows, 1):.1%})", False),
    ]
    return [*headline, ("Rows unaccounted for", f"{missing:,}", True)] if missing else headline
