"""A resumed run is the uninterrupted run, to the bit (other ranks and stages: test_reshard)."""

import json
import shutil

import pytest

from tests.support.training import digest, losses, settings
from trainer.checkpoint.verify import MANIFEST_NAME, committed_steps, find_checkpoint

TRAIN = "tests.support.training:train"


def run_straight(pool, run, store, **changes):
    values = settings(run, store.path, **changes)
    assert pool.run(TRAIN, values=values) == [None] * len(pool.processes)


def run_interrupted(first_pool, second_pool, run, store, second_changes=None, **changes):
    """Stop on request after step 3 in one pool, continue in another, with other settings if given."""
    values = settings(run, store.path, **changes)
    assert first_pool.run(TRAIN, values=values, stop_after=3) == [None] * len(first_pool.processes)
    assert json.loads((run / "stopped.json").read_text())["step"] == 3
    assert committed_steps(run / "checkpoints") == [3]
    values = settings(run, store.path, **changes | (second_changes or {}))
    assert second_pool.run(TRAIN, values=values) == [None] * len(second_pool.processes)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, two_ranks, store):
    """Uninterrupted runs on two ranks, by DeepSpeed configuration."""
    runs = {}
    for name in ("zero1", "zero2", "zero3"):
        runs[name] = tmp_path_factory.mktemp("straight") / name
        run_straight(two_ranks, runs[name], store, engine__deepspeed=name)
    return runs


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_bitwise_on_the_same_number_of_ranks(name, tmp_path, two_ranks, store, straight):
    run_interrupted(two_ranks, two_ranks, tmp_path / "run", store, engine__deepspeed=name)
    assert losses(tmp_path / "run") == losses(straight[name])
    assert digest(tmp_path / "run") == digest(straight[name])
    assert (tmp_path / "run/steps/steps.jsonl").read_text() == (straight[name] / "steps/steps.jsonl").read_text()


@pytest.mark.parametrize("lora", [None, {"dropout": 0.2}])
def test_bitwise_with_dropout(lora, tmp_path, two_ranks, store):
    """The state of the random generators is part of the checkpoint."""
    model = settings(tmp_path, store.path)["model"]["config"] | {"attention_dropout": 0.2 if lora is None else 0.0}
    changes = {"model__config": model, "model__lora": lora, "engine__deepspeed": "zero2"}
    run_straight(two_ranks, tmp_path / "straight", store, **changes)
    run_interrupted(two_ranks, two_ranks, tmp_path / "resumed", store, **changes)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    assert digest(tmp_path / "resumed") == digest(tmp_path / "straight")


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, two_ranks, store):
    run = tmp_path / "run"
    changes = {"checkpoint__every_steps": 2, "checkpoint__keep": 5}
    run_straight(two_ranks, run, store, **changes)
    expected = digest(run)
    assert committed_steps(run / "checkpoints") == [6, 4, 2]
    newest = run / "checkpoints/step-00000006/rank-00001-of-00002.safetensors"
    content = bytearray(newest.read_bytes())
    content[-100] ^= 1
    newest.write_bytes(content)
    assert find_checkpoint(run).name == "step-00000004"
    found = two_ranks.run(TRAIN, values=settings(run, store.path, checkpoint__strict=True, **changes))
    named = "step-00000006 is damaged: rank-00001-of-00002.safetensors does not match its hash"
    assert all(error.startswith("74: ") and named in error for error in found)
    (newest.parent / "foreign").write_text("x")
    found = two_ranks.run(TRAIN, values=settings(run, store.path, checkpoint__strict=True, **changes))
    assert all(error.startswith("74: ") and "foreign does not belong to it" in error for error in found)
    run_straight(two_ranks, run, store, **changes)
    assert digest(run) == expected
    assert committed_steps(run / "checkpoints") == [6, 4, 2]
    assert len(losses(run)) == 6


def test_all_damaged_is_exit_74_and_other_settings_are_exit_76(tmp_path, two_ranks, store):
    run = tmp_path / "run"
    run_straight(two_ranks, run, store, train__max_steps=2)
    for changes in ({"run__seed": 4}, {"train__global_batch_size": 8}, {"data__packing": False}):
        values = settings(run, store.path, train__max_steps=4, **changes)
        found = two_ranks.run(TRAIN, values=values)
        assert all(error.startswith("76: ") and "was made with other settings" in error for error in found), changes
    shutil.copy(run / "checkpoints/step-00000002/state.json", run / "checkpoints/step-00000002" / MANIFEST_NAME)
    found = two_ranks.run(TRAIN, values=settings(run, store.path, train__max_steps=4))
    assert all(error.startswith("74: no valid checkpoint") for error in found)


def test_an_allowed_change_is_taken_and_recorded(tmp_path, two_ranks, store):
    run = tmp_path / "run"
    run_straight(two_ranks, run, store, train__max_steps=2)
    values = settings(run, store.path, train__max_steps=4, train__global_batch_size=8, run__seed=4)
    found = two_ranks.run(TRAIN, values=values, allow_changes=["run.seed"])
    assert all("train.global_batch_size: 4 -> 8" in error and "run.seed" not in error for error in found)
    allowed = ["run.seed", "train.global_batch_size"]
    assert two_ranks.run(TRAIN, values=values, allow_changes=allowed) == [None, None]
    resumed = [event for event in map(json.loads, (run / "events.jsonl").open()) if event["event"] == "resume"]
    assert resumed[-1]["changes"] == [
        "run.seed: 3 -> 4 (--allow-change run.seed)",
        "train.global_batch_size: 4 -> 8 (--allow-change train.global_batch_size)",
        "train.max_steps: 2 -> 4",
    ]
    # The new checkpoint has the new identity: nothing need be allowed again.
    assert two_ranks.run(TRAIN, values=values | {"train": values["train"] | {"max_steps": 5}}) == [None, None]


def test_an_adapter_resumes_beside_its_own_base_only(tmp_path, two_ranks, store):
    base, run = tmp_path / "base", tmp_path / "run"
    run_straight(two_ranks, tmp_path / "made", store, train__max_steps=1)
    shutil.copytree(tmp_path / "made/initial-model", base)
    values = settings(run, store.path, train__max_steps=2)
    values["model"] = {"path": str(base), "dtype": "float32", "lora": {"rank": 2}}
    assert two_ranks.run(TRAIN, values=values) == [None, None]
    manifest = json.loads((find_checkpoint(run) / MANIFEST_NAME).read_text())
    assert all(".lora_" in name for name in manifest["parameters"])
    assert manifest["tied"] == {}
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-2] ^= 1
    (base / "model.safetensors").write_bytes(content)
    values["train"]["max_steps"] = 3
    found = two_ranks.run(TRAIN, values=values)
    assert all(error.startswith("76: ") and f"(base: {manifest['identity']['base']} -> " in error for error in found)
    assert two_ranks.run(TRAIN, values=values, allow_changes=["base"]) == [None, None]
    values["model"]["lora"]["rank"] = 3
    found = two_ranks.run(TRAIN, values=values)
    assert all(error.startswith("76: ") and "model.lora.rank: 2 -> 3" in error for error in found)


def test_a_finished_run_does_nothing(tmp_path, two_ranks, store):
    run = tmp_path / "run"
    run_straight(two_ranks, run, store, train__max_steps=2)
    before = digest(run), (run / "metrics.jsonl").read_text()
    run_straight(two_ranks, run, store, train__max_steps=2)
    assert (digest(run), (run / "metrics.jsonl").read_text()) == before


def test_a_changed_model_is_made_anew_before_and_refused_after_the_first_checkpoint(tmp_path, two_ranks, store):
    run = tmp_path / "run"
    wider = settings(run, store.path)["model"]["config"] | {"intermediate_size": 96}
    poisoned = "tests.support.training:train_poisoned"
    values = settings(run, store.path, train__max_skipped_steps=1)
    assert all(error.startswith("78") for error in two_ranks.run(poisoned, values=values, rank=0, steps=[1]))
    assert json.loads((run / "outcome.json").read_text())["status"] == "failed"
    assert "fault" in (run / "events.jsonl").read_text()
    run_straight(two_ranks, run, store, model__config=wider, train__max_steps=2)
    assert json.loads((run / "model/config.json").read_text())["intermediate_size"] == 96
    before = (run / "config.yaml").read_text()
    found = two_ranks.run(TRAIN, values=settings(run, store.path, train__max_steps=4))
    assert all(error.startswith("76: ") and "(model.config.intermediate_size: 96 -> 64)" in error for error in found)
    assert (run / "config.yaml").read_text() == before


def test_the_timeout_holds_for_the_groups_of_deepspeed_too(two_ranks):
    assert two_ranks.run("tests.support.training:group_timeouts", seconds=7) == [[7.0], [7.0]]


@pytest.mark.parametrize("mixture", [False, True])
def test_a_run_on_a_url_resumes_as_the_run_on_the_local_store(mixture, tmp_path, two_ranks, store):
    """Order by blocks; one rank of the node fetches, the other waits for what it needs."""
    segments = [{"rows": 9, "weights": {"rows": 1}}, {"weights": {"rows": 2}}] if mixture else None
    changes = {"data__shuffle_blocks": 2, "data__mixture": segments}
    run_straight(two_ranks, tmp_path / "straight", store, **changes)
    if mixture:
        assert json.loads((tmp_path / "straight/plan.json").read_text())["source_epochs"].keys() == {"rows"}
    changes |= {"data__train": f"file://{store.path}", "data__cache_dir": str(tmp_path / "cache")}
    run_interrupted(two_ranks, two_ranks, tmp_path / "run", store, **changes)
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert digest(tmp_path / "run") == digest(tmp_path / "straight")
    found = two_ranks.run(
        TRAIN,
        values=settings(tmp_path / "run", store.path, **changes | {"data__shuffle_blocks": 3, "train__max_steps": 9}),
    )
    assert all(error.startswith("76: ") and "shuffle_blocks: 2 -> 3" in error for error in found)
