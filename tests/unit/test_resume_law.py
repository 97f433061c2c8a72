"""The resume law: every key has a class, each class does what the table says, and --allow-change is exact."""

import json
from pathlib import Path

import pytest

from tests.support.training import settings
from trainer.config.load import config_as_yaml
from trainer.config.resume_law import FINGERPRINTS, LAW, accept_identity, check_allowed, tuned
from trainer.config.schema import Config
from trainer.config.words import keys
from trainer.data.store import open_store
from trainer.errors import ResumeRefusedError, UsageError
from trainer.prepare import changed_settings, row_spec, run_identity
from trainer.run_directory import RunDirectory

# Another legal value of every key, as nested entries of a small run on the fixture's store.
OTHER = {
    "run.dir": "elsewhere",
    "run.seed": 4,
    "run.share_with_group": True,
    "model.path": None,  # see test_a_model_that_moves_and_one_that_changes
    "model.config": {**settings(Path("r"), Path("s"))["model"]["config"], "hidden_size": 64},
    "model.dtype": "bfloat16",
    "model.gradient_checkpointing": True,
    "model.trainable": ["*norm*"],
    "model.lora": {"rank": 4},
    "model.attention": "eager",
    "data.train": "a copy of the store",
    "data.eval": "held-out",
    "data.teacher": None,  # see test_another_teacher_is_refused
    "data.sequence_length": 192,
    "data.window": 128,
    "data.overlap": 7,
    "data.pin_prefix": True,
    "data.long_text": "truncate",
    "data.packing": False,
    "data.mixture": [{"weights": {"rows": 2}}],
    "data.shuffle_blocks": 2,
    "data.cache_dir": "cache",
    "data.cache_gib": 1.5,
    "train.max_steps": 99,
    "train.global_batch_size": 16,
    "train.micro_batch_size": 1,
    "train.teacher_share": 0.9,
    "train.max_gradient_norm": 0.5,
    "train.max_skipped_steps": 3,
    "optimizer.type": None,  # there is one only
    "optimizer.learning_rate": 2e-3,
    "optimizer.weight_decay": 0.3,
    "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.9,
    "optimizer.epsilon": 1e-6,
    "schedule.type": "linear",
    "schedule.warmup_steps": 5,
    "schedule.final_ratio": 0.5,
    "engine.deepspeed": "zero3",
    "engine.nvme_path": "/scratch",
    "engine.timeout_seconds": 61,
    "checkpoint.every_steps": 7,
    "checkpoint.keep": 5,
    "checkpoint.asynchronous": False,
    "checkpoint.strict": True,
    "checkpoint.upload": "memory://copies",
    "evaluate.every_steps": 9,
    "evaluate.max_rows": 8,
    "logging.every_steps": 4,
    "logging.tensorboard": True,
}


def test_every_key_has_a_class():
    assert [*LAW] == [*keys(Config)], "a key without a class, or in another order than the schema"


def identity(config: Config, store, run: Path) -> dict[str, str]:
    opened = open_store(str(store.path))
    return run_identity(config, opened, opened.plan(row_spec(config, opened)), RunDirectory(run))


def with_other(config: Config, key: str, value) -> Config:
    section, name = key.split(".")
    values = config.model_dump()
    values[section][name] = value
    if key == "data.window":
        values["data"]["overlap"] = 8
    return Config.model_validate(values)


@pytest.mark.parametrize("key", [key for key, value in OTHER.items() if value is not None])
def test_a_changed_key_is_refused_said_or_ignored_as_its_class_says(key, tmp_path, store):
    config = Config.model_validate(settings(tmp_path, store.path))
    changed = with_other(config, key, OTHER[key])
    if key == "data.train":
        changed = config  # the content is compared, see below
    (tmp_path / "config.yaml").write_text(config_as_yaml(config))
    saved, present = identity(config, store, tmp_path), identity(changed, store, tmp_path)
    said = changed_settings(changed, RunDirectory(tmp_path))
    if LAW[key] == "identity":
        assert said == []
        with pytest.raises(ResumeRefusedError, match=key) as refused:
            accept_identity("step-00000002", saved, present)
        assert refused.value.exit_code == 76
        assert " -> " in refused.value.fact
        assert f"--allow-change {key}" in refused.value.remedy or len(saved.items() ^ present.items()) > 2
        every = [name for name in saved.keys() | present.keys() if saved.get(name) != present.get(name)]
        assert len(accept_identity("step-00000002", saved, present, every)) == len(every)
    else:
        assert accept_identity("step-00000002", saved, present) == []
        assert [line.split(":")[0] for line in said] == ([key] if LAW[key] == "tunable" else [])


@pytest.mark.parametrize("name", ["data", "tokenizer", "template"])
def test_other_content_under_the_same_path_is_refused(name, tmp_path, store):
    config = Config.model_validate(settings(tmp_path, store.path))
    saved = identity(config, store, tmp_path)
    opened = open_store(str(store.path))
    plan = opened.plan(row_spec(config, opened))
    if name == "data":
        opened.fingerprint = "0" * 64
    else:
        entry = {"tokenizer": "tokenizer_fingerprint", "template": "template_sha256"}[name]
        opened.manifest = {**opened.manifest, entry: "0" * 64}
    present = run_identity(config, opened, plan, RunDirectory(tmp_path))
    with pytest.raises(ResumeRefusedError, match=rf"\({name}: {saved[name]} -> 0000000000000000\)"):
        accept_identity("step-00000002", saved, present)
    assert accept_identity("step-00000002", saved, present, [name])


def test_a_model_that_moves_and_one_that_changes(tmp_path, store):
    identities = []
    for place, size in (("first", 32), ("moved", 32), ("other", 48)):
        (tmp_path / place).mkdir()
        content = {"model_type": "llama", "hidden_size": size, "transformers_version": place, "dtype": place}
        (tmp_path / place / "config.json").write_text(json.dumps(content))
        values = settings(tmp_path, store.path)
        values["model"] = {"path": str(tmp_path / place)}
        identities.append(identity(Config.model_validate(values), store, tmp_path))
    first, moved, other = identities
    assert first == moved
    with pytest.raises(ResumeRefusedError, match=r"\(architecture\.hidden_size: 32 -> 48\)"):
        accept_identity("step-00000002", first, other)
    assert accept_identity("x", first, other, ["architecture"]) == ["architecture.hidden_size: 32 -> 48"]


def test_a_default_written_out_is_no_change(tmp_path, store):
    config = Config.model_validate(settings(tmp_path, store.path))
    spec = open_store(str(store.path)).spec
    written = Config.model_validate(
        settings(tmp_path, store.path, data__sequence_length=spec.sequence_length, data__window=spec.window)
    )
    assert identity(config, store, tmp_path) == identity(written, store, tmp_path)


def test_all_differences_are_named_at_once():
    with pytest.raises(ResumeRefusedError, match=r"\(a: 1 -> 2; b: absent -> 3; c: 4 -> absent\)"):
        accept_identity("x", {"a": "1", "c": "4"}, {"a": "2", "b": "3"})
    with pytest.raises(ResumeRefusedError, match=r"\(b: absent -> 3\)"):
        accept_identity("x", {"a": "1", "c": "4"}, {"a": "2", "b": "3"}, ["a", "c"])


def test_allow_change_takes_identity_names_only():
    names = [key for key, change in LAW.items() if change == "identity"] + [*FINGERPRINTS, "model.config.hidden_size"]
    assert check_allowed(names) == tuple(names)
    with pytest.raises(UsageError, match=r"did you mean 'data\.window'"):
        check_allowed(["data.windw"])
    with pytest.raises(UsageError, match="without asking; drop it"):
        check_allowed(["optimizer.learning_rate"])


def test_a_prefix_of_a_name_allows_nothing():
    with pytest.raises(ResumeRefusedError):
        accept_identity("x", {"data.window": "1"}, {"data.window": "2"}, ["data.win"])


def test_a_configuration_of_an_earlier_version_is_read_as_far_as_it_goes(tmp_path, store):
    config = Config.model_validate(settings(tmp_path, store.path))
    assert tuned({"optimizer": {"beta1": 0.5, "gone": 1}, "old": 3}, config) == ["optimizer.beta1: 0.5 -> 0.9"]
    assert tuned(None, config) == []
