import io
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from trainer.data.quality.card import DataCard, card_html, length_figures, show_card, unaccounted

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202ered\x00\"'&"
VOID = {"meta", "br", "line"}


def card(**changes: object) -> DataCard:
    source = {
        "name": "chat.jsonl",
        "format": "messages",
        "rows": 1000,
        "kept": 960,
        "documents": 980,
        "tokens": 50_000,
        "supervised_tokens": 20_000,
        "dropped": {"near duplicate": 30, "empty": 10},
        "changed": {"email": 7},
    }
    whole = {
        "title": "Tea chats",
        "facts": {"tokenizer": "tea-bpe 32,000"},
        "sources": [source],
        "lengths": length_figures(np.random.default_rng(0).lognormal(5, 1, 980).astype(np.int64) + 1),
        "splits": [
            {"name": "train", "documents": 900, "tokens": 45_000, "supervised_tokens": 18_000},
            {"name": "test", "documents": 80, "tokens": 5_000, "supervised_tokens": 2_000},
        ],
        "duplicates": {
            "exact": 0,
            "near": 30,
            "examples": [{"kept": "chat.jsonl:1", "dropped": "chat.jsonl:9", "kind": "near"}],
        },
        "examples": [
            {
                "place": "chat.jsonl:3",
                "source": "chat",
                "parts": [
                    {"text": "<|user|>\nwhere is tea?\n<|assistant|>\n", "supervised": False},
                    {"text": "on the shelf<|end|>", "supervised": True},
                ],
            }
        ],
        "notes": ["one note"],
    }
    return whole | changes  # type: ignore[return-value]


class Page(HTMLParser):
    """Checks nesting and unique ids, collects texts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.marked = self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "mark" in self.open:
            self.marked += data


def terminal(given: DataCard, width: int = 120) -> str:
    out = io.StringIO()
    show_card(given, Console(file=out, width=width, highlight=False))
    return out.getvalue()


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    page = Page(card_html(card()))
    assert page.tags[:2] == ["html", "head"]
    assert page.tags.count("main") == page.tags.count("h1") == page.tags.count("title") - page.tags.count("rect") == 1
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href", "onclick"} & {name for name, _ in page.attributes}
    assert "url(" not in card_html(card())
    assert "prefers-color-scheme: dark" in card_html(card())
    tables, captions = page.tags.count("table"), page.tags.count("caption")
    assert captions == tables - 1, "every table has a caption, that of the histogram its figure's"
    for words in ("50,000", "40.0%", "near duplicate", "chat.jsonl:9", "tea-bpe 32,000", "one note"):
        assert words in page.text


def test_the_supervised_part_is_marked_and_nothing_else() -> None:
    page = Page(card_html(card()))
    assert page.marked == "marked and underlinedon the shelf<|end|>"
    assert "↵\n" in page.text


def test_hostile_text_is_shown_not_obeyed() -> None:
    source = card()["sources"][0] | {"name": HOSTILE, "dropped": {HOSTILE: 40}}
    examples = [{"place": HOSTILE, "source": HOSTILE, "parts": [{"text": HOSTILE, "supervised": True}]}]
    hostile = card(
        title=HOSTILE, facts={HOSTILE: HOSTILE}, sources=[source], examples=examples, notes=[HOSTILE], splits=[]
    )
    page = Page(card_html(hostile))
    assert "script" not in page.tags
    assert "<script>alert(1)</script>␛[31m‹202E›red␀\"'&" in page.marked
    for text in (page.text, terminal(hostile)):
        assert not set(text) & {"\x1b", "\u202e", "\x00"}


@given(st.text(st.characters(exclude_categories=())))
@settings(max_examples=60, deadline=None)
def test_any_text_makes_a_page(text: str) -> None:
    examples = [{"place": "a:1", "source": "a", "parts": [{"text": text, "supervised": True}]}]
    html = card_html({"title": "t", "facts": {}, "sources": [], "examples": examples})  # type: ignore[typeddict-item]
    Page(html)
    html.encode()


def test_rows_that_vanished_are_an_alarm() -> None:
    source = card()["sources"][0] | {"kept": 950}
    assert unaccounted(source) == 10  # type: ignore[arg-type]
    assert unaccounted(card()["sources"][0]) == 0
    silent = card(sources=[source])
    assert "+10 unaccounted for" in Page(card_html(silent)).text
    assert "+10" in terminal(silent)
    assert "unaccounted" not in Page(card_html(card())).text + terminal(card())


def test_the_terminal_says_the_same() -> None:
    shown = terminal(card())
    for words in (
        "Tea chats",
        "50,000",
        "40.0%",
        "near duplicate",
        "chat.jsonl:9",
        "⟦on the shelf<|end|>⟧",
        "one note",
    ):
        assert words in shown
    assert max(map(len, terminal(card(), width=60).splitlines())) <= 60


def test_a_card_with_next_to_nothing() -> None:
    bare: DataCard = {
        "title": "empty",
        "facts": {},
        "sources": [],
        "lengths": length_figures(np.array([], dtype=np.int64)),
    }
    Page(card_html(bare))
    assert "empty" in terminal(bare)


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=50))
@settings(max_examples=60, deadline=None)
def test_the_histogram_counts_every_document(lengths: list[int]) -> None:
    figures = length_figures(np.array(lengths, dtype=np.int64))
    assert sum(figures["counts"]) == len(lengths)
    assert len(figures["edges"]) == len(figures["counts"]) + 1
    assert figures["counts"][0] > 0
    assert figures["counts"][-1] > 0
    assert figures["edges"][0] <= min(lengths)
    assert max(lengths) < figures["edges"][-1]
    assert figures["percentiles"]["max"] == max(lengths)


@pytest.mark.parametrize("lengths", [[1], [7, 7, 7], [0, 1, 2, 100_000]])
def test_histograms_of_few(lengths: list[int]) -> None:
    figures = length_figures(np.array(lengths, dtype=np.int64))
    assert sum(figures["counts"]) == len(lengths)
