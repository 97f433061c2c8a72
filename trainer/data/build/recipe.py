"""How a token store is built: everything that decides its content, as one frozen document.

`steadfast data build` makes a recipe from a YAML file, `section.key=value` words and its options; the resolved recipe
is part of the store's manifest. Two builds with the same recipe and the same inputs give the same bytes, whatever the
number of worker processes, which is therefore no part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.config.load import document_from_text, load_document
from trainer.config.schema import Count, CountOrZero, Flag, Fraction, NonNegativeFloat, PositiveFloat, Section
from trainer.data.store.packing import LongText

Format = Literal["alpaca", "sharegpt", "messages", "completion", "continuation", "text", "preference", "tokens"]
Script = Literal["han", "latin", "kana", "hangul", "cyrillic", "arabic", "other"]
PiiKind = Literal["email", "phone", "cn_mobile", "cn_id", "card", "iban", "ipv4", "ipv6", "api_key"]


class Source(Section):
    """One named input: files that are read alike and can be weighted together."""

    path: str | list[str]
    """Files, directories, globs or URLs (http, s3, ...)."""
    name: str | None = None
    """Name in reports and mixtures; default: the file's name without its endings."""
    format: Format | None = None
    """What a row means; default: detected from each file's first row."""
    map: dict[str, str] = Field(default={})
    """Columns under other names: {prompt: question, completion: answer}."""
    documents: Literal["file", "line", "paragraph"] = "file"
    """What one document of a plain text file is."""

    @property
    def patterns(self) -> list[str]:
        """The paths as a list."""
        return [self.path] if isinstance(self.path, str) else list(self.path)


class Rows(Section):
    """Rows of training: how long, packed or not, and what happens to documents that do not fit."""

    sequence_length: Annotated[Count, Field(examples=[4096])]
    """Tokens in a row. Another length later only makes a new plan: nothing is tokenised again."""
    packing: Flag = True
    """Put several samples into one row (they cannot see each other)."""
    long_text: LongText = "windows"
    """Documents longer than a window: cut into windows, truncated, dropped, or refused."""


class Windows(Section):
    """Overlapping windows of long documents; every supervised token is a target exactly once."""

    length: Annotated[Count | None, Field(examples=[4096])] = None
    """Tokens in a window; default: the sequence length."""
    overlap: Annotated[Count | None, Field(examples=[512])] = None
    """Tokens that neighbouring windows share; default: an eighth of the window."""
    pin_prefix: Flag = False
    """Repeat the system message (or the instruction of an alpaca row) unsupervised at the head of every window."""


class Mask(Section):
    """What is trained on. Flags of single messages (weight, train) always win."""

    train_on: Literal["all", "last"] = "all"
    """All assistant turns of a conversation, or the last one only."""


class BadRows(Section):
    """Rows that cannot be read, or not with this tokenizer and template."""

    policy: Literal["fail", "skip", "quarantine"] = "fail"
    """Stop at the first one, leave them out, or leave them out and keep their bytes in reports/quarantine.jsonl."""
    budget: NonNegativeFloat = 0.01
    """The build fails beyond this many bad rows: below 1 a share of all rows, else a number."""


class Clean(Section):
    """Missing and abnormal values."""

    missing: Literal["keep", "drop", "fail"] = "keep"
    """Rows with an empty or placeholder text ("N/A"), broken characters or endless repetition."""
    repair: Flag = False
    """Remove control characters (not tabs and line ends) and compose characters (Unicode NFC)."""
    pii: list[PiiKind] = Field(default=[])
    """Kinds of personal data that become placeholders like [EMAIL]."""
    pii_salt: Annotated[str, Field(examples=["pepper"])] = ""
    """With a salt equal values get equal placeholders: [EMAIL_1a2b3c4d]."""


class Keep(Section):
    """Which rows are kept; the others are counted by reason."""

    min_characters: CountOrZero = 0
    """Shortest conversation, characters of its user and assistant texts."""
    max_characters: Annotated[Count | None, Field(examples=[100_000])] = None
    """Longest conversation."""
    min_answer_characters: CountOrZero = 0
    """Shortest answer."""
    scripts: list[Script] = Field(default=[])
    """Writing systems a text must mainly consist of."""
    script_share: Fraction = 0.8
    """Share of the letters that must be of these scripts."""
    hook: Annotated[str | None, Field(examples=["my_filters:keep"])] = None
    """Your own function `module:function`, called with the text; true keeps the row."""


class Duplicates(Section):
    """Rows whose user and assistant texts were there before."""

    exact: Literal["keep", "drop"] = "keep"
    """Same text after Unicode and white-space normalisation. Kept ones are counted too."""
    near: Literal["off", "keep", "drop"] = "off"
    """Similar text (MinHash over 5-word shingles). `keep` finds and counts them, and splits by their clusters."""
    threshold: Annotated[PositiveFloat, Field(le=1)] = 0.8
    """Similarity (Jaccard) from which two rows are near duplicates."""


class Decontaminate(Section):
    """Rows that contain text of evaluation files are left out."""

    against: list[str] = Field(default=[])
    """Evaluation files, in any readable format."""
    max_share: Fraction = 0.0
    """Share of a row's words that may stand in runs of 13 words (20 characters of Han text) of the evaluation files."""


class Split(Section):
    """Several stores from one build. A group of rows that belong together is never torn apart."""

    shares: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        default={}, examples=[{"train": 0.98, "validation": 0.01, "test": 0.01}]
    )
    """E.g. {train: 0.98, validation: 0.01, test: 0.01}; each becomes a store OUT/<name>, the first is trained on."""
    folds: Annotated[int, Field(ge=0)] = 0
    """Instead of shares: K pairs of stores OUT/fold-0/train and OUT/fold-0/validation, ... for cross-validation."""
    group_by: Annotated[str | None, Field(examples=["user_id"])] = None
    """Column whose equal values stay together (a document or user id); default: near-duplicate clusters, else texts."""
    stratify_by: Annotated[Literal["source", "label"] | None, Field(examples=["source"])] = None
    """Keep the shares within every source or label."""
    time_column: Annotated[str | None, Field(examples=["date"])] = None
    """Split by time instead: the oldest rows train, the newest test."""

    @model_validator(mode="after")
    def _one_way(self) -> Split:
        if self.shares and self.folds:
            raise ValueError("give either split.shares or split.folds")
        if self.folds == 1:
            raise ValueError("split.folds: 1 is no split; give 2 or more")
        if self.shares and abs(sum(self.shares.values()) - 1) > 1e-6:
            raise ValueError(f"split.shares add up to {sum(self.shares.values()):g} instead of 1")
        if self.shares and not all(name.replace("-", "").replace("_", "").isalnum() for name in self.shares):
            raise ValueError("names in split.shares are directory names: letters, digits, '-' and '_'")
        if self.time_column and (self.folds or self.stratify_by or self.group_by):
            raise ValueError("split.time_column goes with split.shares only")
        if (self.group_by or self.stratify_by or self.time_column) and not (self.shares or self.folds):
            raise ValueError("give split.shares or split.folds")
        return self


class Label(Section):
    """A column that says what kind of row it is, for stratified splits and class balance."""

    column: Annotated[str | None, Field(examples=["topic"])] = None
    """Name of the column."""
    values: list[str] = Field(default=[])
    """All labels that may occur; another one is a bad row. Default: whatever occurs."""


class Augment(Section):
    """Changed copies of rows, for the training split only. User texts change, assistant texts never do."""

    copies: CountOrZero = 0
    """Changed copies of every row."""
    swap: Fraction = 0.0
    """Share of words that change places."""
    drop: Fraction = 0.0
    """Share of words that are left out."""
    synonyms: Fraction = 0.0
    """Share of known words replaced by one of their synonyms."""
    synonym_file: Annotated[str | None, Field(examples=["synonyms.tsv"])] = None
    """Your synonyms: a word and its synonyms a line, separated by tabs, or JSON {word: [synonyms]}."""


class Balance(Section):
    """Unequal numbers of rows per label (or per source, without labels)."""

    method: Literal["none", "over", "under"] = "none"
    """Repeat the rare ones, or leave out some of the frequent ones."""
    ratio: PositiveFloat = 1.0
    """Size to reach: times the largest class (over, at most 1), times the smallest one (under, at least 1)."""

    @model_validator(mode="after")
    def _ratio_fits(self) -> Balance:
        if (self.method == "over" and self.ratio > 1) or (self.method == "under" and self.ratio < 1):
            raise ValueError(f"balance.ratio {self.ratio:g}: at most 1 for over, at least 1 for under")
        return self


class Limits(Section):
    """Thresholds that fail the build: shares between 0 and 1, per source."""

    min_supervised: Fraction = 0.0
    """Supervised share of the tokens."""
    max_truncated: Fraction = 1.0
    """Share of the supervised tokens lost to truncation or dropping."""
    max_without_answer: Fraction = 1.0
    """Share of the rows in which nothing is supervised."""


class Recipe(Section):
    """A whole build."""

    sources: Annotated[list[Source], Field(min_length=1, examples=[[{"path": "chat.jsonl"}]])]
    """The inputs: a list of {path, name, format, map, documents}."""
    tokenizer: Annotated[str, Field(examples=["models/qwen3-8b"])]
    """Local directory with tokenizer and chat template."""
    rows: Rows
    windows: Windows = Windows()
    mask: Mask = Mask()
    bad_rows: BadRows = BadRows()
    clean: Clean = Clean()
    keep: Keep = Keep()
    duplicates: Duplicates = Duplicates()
    decontaminate: Decontaminate = Decontaminate()
    split: Split = Split()
    label: Label = Label()
    augment: Augment = Augment()
    balance: Balance = Balance()
    limits: Limits = Limits()
    seed: CountOrZero = 0
    """Seed of splits, balance and augmentation."""

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        window = self.windows.length or self.rows.sequence_length
        if window > self.rows.sequence_length:
            raise ValueError(f"windows.length {window} is longer than rows.sequence_length {self.rows.sequence_length}")
        if self.split.stratify_by == "label" and self.label.column is None:
            raise ValueError("split.stratify_by: label needs label.column")
        if self.label.values and self.label.column is None:
            raise ValueError("label.values needs label.column")
        if self.augment.copies and not (self.augment.swap or self.augment.drop or self.augment.synonyms):
            raise ValueError("augment.copies needs augment.swap, augment.drop or augment.synonyms")
        if self.augment.synonyms and self.augment.synonym_file is None:
            raise ValueError("augment.synonyms needs augment.synonym_file")
        names = [source.name for source in self.sources if source.name]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two sources have the name {twice[0]!r}")
        return self


def load_recipe(path: Path | None, words: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file (None: all of it is in the words) with `section.key=value` words applied in order.

    Raises ConfigError with every problem found, or MissingInputError when the file cannot be opened.
    """
    if path is None:
        return document_from_text("", "the command line", words, Recipe)
    return load_document(path, words, Recipe)
