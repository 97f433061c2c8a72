import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from trainer.config.document import parse
from trainer.config.explain import explain, explanations, json_schema
from trainer.config.words import keys
from trainer.data.build.recipe import Recipe, load_recipe
from trainer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "configs/data/store.yaml"
NEEDED = ["sources=[{path: a.jsonl}]", "tokenizer=tok", "rows.sequence_length=64"]


def problems(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, [*NEEDED, *words])
    return "\n".join(caught.value.problems)


def test_the_shipped_recipe_loads_and_fits_the_shipped_schema() -> None:
    text = SHIPPED.read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    recipe = load_recipe(SHIPPED)
    assert [source.name for source in recipe.sources] == ["chat", "math", "books"]
    schema = json_schema(Recipe, "Steadfast recipe of a token store")
    assert json.loads((SHIPPED.parent / "schema.json").read_text()) == schema, (
        "run: python steadfast.py data recipe --json > configs/data/schema.json"
    )
    jsonschema.Draft202012Validator(schema).validate(parse(text, str).value)


def test_words_change_a_file_and_the_last_one_wins() -> None:
    recipe = load_recipe(SHIPPED, ["rows.sequence_length=128", "windows.overlap=5", "windows.overlap=6"])
    assert (recipe.rows.sequence_length, recipe.windows.overlap) == (128, 6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rows.seqence_length=1"], "did you mean 'rows.sequence_length'?"),
        (["sources=[{pth: a}]"], "unknown key 'sources.0.pth'"),
        (["sources=[]"], "sources"),
        (["sources=[{path: a, name: x}, {path: b, name: x}]"], "two sources have the name 'x'"),
        (["windows.length=65"], "windows.length 65 is longer than rows.sequence_length 64"),
        (["split.shares={train: 0.5, test: 0.4}"], "add up to 0.9"),
        (["split.shares={../train: 1}"], "directory names"),
        (["split.folds=1"], "no split"),
        (["split.folds=2", "split.shares={train: 1.0}"], "either split.shares or split.folds"),
        (["split.group_by=user"], "give split.shares or split.folds"),
        (["augment.copies=1"], "augment.copies needs"),
        (["augment.copies=1", "augment.synonyms=0.5"], "augment.synonym_file"),
        (["balance.method=over", "balance.ratio=2.0"], "at most 1 for over"),
        (["label.values=[a]"], "label.column"),
        (["clean.pii=[shoe_size]"], "clean.pii"),
    ],
)
def test_what_makes_no_sense_is_said(words: list[str], said: str) -> None:
    assert said in problems(*words)


def test_all_problems_come_at_once() -> None:
    text = problems("rows.long_text=cut", "mask.train_on=most", "keep.script_share=2")
    assert all(key in text for key in ("rows.long_text", "mask.train_on", "keep.script_share"))


def test_every_key_is_explained_with_an_example_that_loads() -> None:
    text = explain(None, Recipe)
    needs: dict[str, list[str]] = {
        "split.group_by": ["split.folds=2"],
        "split.time_column": ["split.shares={train: 0.9, test: 0.1}"],
        "split.stratify_by": ["split.folds=2"],
        "windows.length": ["rows.sequence_length=4096"],
    }
    for entry in explanations(None, Recipe):
        assert entry["meaning"], entry["key"]
        assert entry["key"] in text
        load_recipe(None, [*NEEDED, *needs.get(entry["key"], []), entry["example"].strip("'")])
    assert {entry["key"] for entry in explanations(None, Recipe)} == set(keys(Recipe))


def test_a_resolved_recipe_reads_back_equal() -> None:
    recipe = load_recipe(SHIPPED)
    plain: dict[str, Any] = json.loads(json.dumps(recipe.model_dump(mode="json")))
    assert Recipe.model_validate(plain) == recipe
