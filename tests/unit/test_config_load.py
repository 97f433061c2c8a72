"""The loader finds every problem at once, names its place, and never fails in another way."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from trainer.config.document import dump, parse
from trainer.config.load import config_as_yaml, config_from_text, load_config
from trainer.config.schema import Config
from trainer.config.words import NEAR_WORDS, NOT_KEYS, keys, sections
from trainer.errors import ConfigError, MissingInputError

GOOD = """\
run: {dir: runs/x}
model:
  path: models/x
data:
  train: out/store
train:
  max_steps: 10
"""


def problems_of(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config_from_text(text, "c.yaml", overrides)
    return caught.value.problems


def test_a_minimal_configuration_has_every_default_and_reads_back_equal() -> None:
    config = config_from_text(GOOD, "c.yaml")
    assert config.train.max_steps == 10
    assert config.optimizer.learning_rate == 1e-5
    again = config_from_text(config_as_yaml(config), "again.yaml")
    assert again == config


def test_all_problems_are_reported_at_once_with_their_lines() -> None:
    text = GOOD.replace("  path:", "  dtyp: float32\n  path:").replace("max_steps: 10", "max_steps: ten\n  lr: 3")
    problems = problems_of(text, "train.max_stepz=4", "nonsense")
    assert problems == [
        "override 'nonsense': write section.key=value, e.g. train.max_steps=100",
        "c.yaml:3: unknown key 'model.dtyp'; did you mean 'model.dtype'?",
        "c.yaml:8: train.max_steps: input should be a valid integer (got 'ten')",
        "c.yaml:9: unknown key 'train.lr'; did you mean 'optimizer.learning_rate'?",
        "override 'train.max_stepz=4': unknown key 'train.max_stepz'; did you mean 'train.max_steps'?",
    ]


@pytest.mark.parametrize("section", [*sections()])
def test_a_typo_in_any_section_gets_a_hint_from_that_section(section: str) -> None:
    key = [*sections()[section].model_fields][-1]
    (problem,) = [line for line in problems_of(GOOD, f"{section}.{key}x=1") if "unknown" in line]
    assert f"did you mean '{section}.{key}'?" in problem


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("train.batch_size", "train.global_batch_size"),
        ("bs", "train.global_batch_size"),
        ("data.max_length", "data.sequence_length"),
        ("data.max_len", "data.sequence_length"),
        ("data.stride", "data.overlap"),
        ("train.epochs", "train.max_steps"),
        ("train.grad_accum", "follows from"),
        ("learning_rate", "optimizer.learning_rate"),
        ("trian.max_steps", "'train'"),
    ],
)
def test_words_of_other_trainers_lead_to_ours(word: str, meant: str) -> None:
    (problem,) = problems_of(GOOD, f"{word}=1")
    assert meant in problem


def test_every_near_word_points_at_a_key_that_exists_and_is_none_itself() -> None:
    assert set(NEAR_WORDS.values()) <= set(keys())
    own = {key.partition(".")[2] for key in keys()} | set(sections())
    assert not own & {*NOT_KEYS}


def test_a_key_given_twice_is_refused_with_both_places() -> None:
    assert problems_of(GOOD + "run: {dir: b}\n") == ["c.yaml:8: key 'run' was already given at c.yaml:1"]


def test_missing_keys_are_named_with_their_section_and_meaning() -> None:
    problems = problems_of("model: {path: m}\n")
    assert [line.split(" is missing")[0] for line in problems] == [
        "c.yaml: 'run.dir'",
        "c.yaml: 'data.train'",
        "c.yaml: 'train.max_steps'",
    ]
    assert "Token store to train on." in problems[1]


def test_an_empty_section_means_its_defaults() -> None:
    assert config_from_text(GOOD + "optimizer:\n", "c.yaml").optimizer.beta1 == 0.9


def test_overrides_win_in_order_and_reach_into_mappings() -> None:
    config = config_from_text(
        GOOD,
        "c.yaml",
        ["train.max_steps=20", "train.max_steps=30", "model.path=null", "model.config.model_type=llama",
         "model.config.layers=[1, 2]", "data.eval="],
    )  # fmt: skip
    assert config.train.max_steps == 30
    assert config.model.path is None
    assert config.model.config == {"model_type": "llama", "layers": [1, 2]}
    assert config.data.eval is None


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("train.max_steps.x=1", "holds a single value"),
        ("train={max_steps: 1}", "override one key at a time, e.g. train.max_steps"),
        ("train.max_steps=[1", "not valid YAML"),
        (".=1", "write section.key=value"),
        ("train..max_steps=1", "write section.key=value"),
        ("=", "write section.key=value"),
        ("model==", "override one key at a time"),
        ("run.dir=!!python/object:os.system x", "tag"),
        ('run.dir="a\\0b"', "NUL"),
    ],
)
def test_bad_overrides_are_named(override: str, fragment: str) -> None:
    problems = problems_of(GOOD, override)
    assert len(problems) >= 1
    assert problems[0].startswith("override ")
    assert fragment in problems[0]


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("run.seed=no", "valid integer (got 'no')"),
        ("run.seed=1:30", "valid integer (got '1:30')"),
        ("run.seed=true", "valid integer (got True)"),
        ("optimizer.learning_rate=true", "valid number (got True)"),
        ("optimizer.learning_rate=0", "greater than 0"),
        ("optimizer.learning_rate=.nan", "not a finite number"),
        ("optimizer.learning_rate=1e999", "not a finite number"),
        ("optimizer.beta1=2", "less than or equal to 1"),
        ("run.seed=-1", "greater than or equal to 0"),
        (f"run.seed={'9' * 5000}", "cannot be read as int"),
        ("run.dir=12", "valid string (got 12)"),
        ("schedule.type=step", "'cosine', 'linear' or 'constant'"),
        ("model.config={model_type: llama}", "exactly one of model.path"),
        ("data.packing=1", "valid boolean"),
    ],
)
def test_values_are_not_bent_until_they_fit(override: str, fragment: str) -> None:
    (problem,) = problems_of(GOOD, override)
    assert fragment in problem


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("012", 12), ("0o12", 10), ("0x1F", 31), ("no", "no"), ("on", "on"), ("1:30", "1:30"),
     ("2024-01-01", "2024-01-01"), ("1_000", "1_000"), ("~", None), ("True", True), ("+.5", 0.5), ("'7'", "7")],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    document = parse(text, lambda line: f"line {line}")
    assert document.problems == []
    assert document.value == value
    assert type(document.value) is type(value)


def test_hostile_documents_end_quickly_in_a_named_problem(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
    hostile = {
        "deep": "[" * 100_000,
        "bomb": bomb,
        "loop": "a: &a [*a]\n",
        "aliases": "a: &a 1\nb: [" + "*a, " * 200 + "]\n",
        "many": "a: [" + "1," * 60_000 + "]\n",
        "tabs": "a:\n\t- b\n",
        "two documents": "a: 1\n---\nb: 2\n",
        "control": "a: \x01\n",
    }
    for name, text in hostile.items():
        problems = problems_of(text)
        assert problems[0].startswith("c.yaml:"), name
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        load_config(large)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: 1\nb: \xe9\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml:2: not UTF-8"):
        load_config(latin)


def test_a_file_that_cannot_be_read_is_a_missing_input(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path, Path("nul\0byte")):
        with pytest.raises(MissingInputError):
            load_config(path)


def test_windows_files_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_config(path).run.dir == "runs/x"


_words = st.sampled_from([*keys(), *sections(), "lr", "model.config.a", "<<", "", "a.b", "train.max_steps.x"])
_scalars = st.sampled_from(
    ["1", "x", "[1", "{a: 1}", "&a [*a]", "*b", "!!int x", "1e400", "null", "'", '"\\ud800"', "="]
)
_overrides = st.one_of(
    st.text(max_size=30),
    st.tuples(_words, _scalars).map("=".join),
    st.tuples(_words, st.text()).map("=".join),
)
_lines = st.lists(st.tuples(st.sampled_from(["", "  ", "- ", "\t"]), _words, _scalars), max_size=8).map(
    lambda rows: "\n".join(f"{indent}{word.replace('.', ': {')}: {value}" for indent, word, value in rows)
)


@settings(
    max_examples=150,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    text=st.one_of(st.text(max_size=200), _lines, st.binary(max_size=60).map(lambda raw: raw.decode("latin-1"))),
    overrides=st.lists(_overrides, max_size=4),
    good=st.booleans(),
)
def test_any_text_gives_a_config_or_a_config_error(text: str, overrides: list[str], good: bool) -> None:
    try:
        config = config_from_text(GOOD if good else text, "any.yaml", overrides)
    except ConfigError as error:
        problems = error.problems
    else:
        assert isinstance(config, Config)
        assert config_from_text(config_as_yaml(config), "again.yaml") == config
        return
    assert problems
    assert all("\n" not in problem for problem in problems)


_tricky = ["1e-6", "0o12", "null", "~", "no", "012", "-", "", " x", "a: b", "#", "2024-01-01", "\x85", "\u2028"]
_mapping_keys = st.text("ab1.:~", max_size=4)
_plain = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
        st.sampled_from(_tricky),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_mapping_keys, inner, max_size=3)),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(value=_plain)
def test_what_is_written_reads_back_equal(value: object) -> None:
    document = parse(dump(value), lambda line: f"line {line}")
    assert document.problems == []
    assert document.value == value
