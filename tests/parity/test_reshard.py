"""A checkpoint of any number of ranks, ZeRO stage and offload continues on any other.

Bitwise on the same number of ranks, to rounding (fp32) on another one: losses, weights and moments.
"""

import json
import random
import shutil
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from tests.support.training import digest, gathered, losses, settings
from trainer.checkpoint.verify import committed_steps

AMONG = "tests.support.training:train_among"
SIZES, STAGES = (1, 2, 3, 4), (1, 2, 3)
STEPS, SAVED = 6, 3
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
EVERYTHING = {"offload_param": {"device": "cpu"}, **OFFLOAD}

# What is trained, and with which DeepSpeed settings; each is saved and loaded somewhere.
SETUPS = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "frozen": {"trainable": ["model.layers.1.*", "model.norm.*"]},
    "offload": {"zero": {1: OFFLOAD, 2: OFFLOAD, 3: EVERYTHING}},
    "sub-groups": {"zero": {3: {"sub_group_size": 3000, "stage3_param_persistence_threshold": 40}}},
    "frozen offload": {
        "trainable": ["model.layers.1.*", "model.norm.*"],
        "zero": {3: {**EVERYTHING, "sub_group_size": 3000, "stage3_param_persistence_threshold": 40}},
    },
    "lora": {"lora": {"rank": 4, "alpha": 16.0}},
    "lora offload": {"lora": {"rank": 4, "alpha": 16.0}, "zero": {3: EVERYTHING}},
    "bf16": {"dtype": "bfloat16"},
    "bf16 frozen": {"dtype": "bfloat16", "trainable": ["model.embed_tokens.*", "*.mlp.*"]},
    "bf16 lora": {"dtype": "bfloat16", "lora": {"targets": ["q_proj", "down_proj"]}},
}

# (setup, saved by ranks and stage, continued by ranks and stage)
COVERING = [
    ("plain", (1, 1), (4, 3)),
    ("plain", (4, 3), (1, 2)),
    ("untied", (3, 2), (2, 1)),
    ("frozen", (2, 1), (3, 3)),
    ("frozen", (4, 3), (2, 2)),
    ("offload", (2, 3), (4, 1)),
    ("sub-groups", (3, 3), (1, 3)),
    ("frozen offload", (2, 3), (3, 1)),
    ("lora", (2, 1), (3, 3)),
    ("lora", (3, 3), (1, 2)),
    ("plain", (1, 1), (1, 3)),
]
SAME = [
    ("frozen", 4, 3),
    ("untied", 3, 2),
    ("offload", 2, 3),
    ("sub-groups", 3, 3),
    ("bf16", 2, 2),
    ("bf16 frozen", 2, 3),
    ("lora", 3, 3),
    ("lora offload", 2, 3),
    ("bf16 lora", 2, 3),
]


class Runs:
    """Uninterrupted runs, made once each, and continuations of their middle checkpoint."""

    def __init__(self, pool, store, directory: Path) -> None:
        self._pool, self._store, self._directory = pool, store, directory
        self._numbers = count()
        self.straight = cache(self._straight)

    def _straight(self, setup: str, size: int, stage: int) -> Path:
        run = self._directory / f"{setup}-{size}-{stage}"
        self._train(run, setup, size, stage)
        assert committed_steps(run / "checkpoints") == [STEPS, SAVED]
        return run

    def continued(self, setup: str, saved: tuple[int, int], size: int, stage: int) -> Path:
        """The checkpoint in the middle of a run, continued by `size` ranks at `stage`."""
        run = self._directory / f"{setup}-{saved}-{size}-{stage}"
        shutil.copytree(self.straight(setup, *saved), run)
        shutil.rmtree(run / f"checkpoints/step-{STEPS:08d}")
        (run / "events.jsonl").unlink()
        self._train(run, setup, size, stage)
        event = json.loads((run / "events.jsonl").read_text().splitlines()[0])
        assert (event["event"], event["step"], event["world_size"]) == ("resume", SAVED, size)
        return run

    def walked(self, setup: str, places: list[tuple[int, int]]) -> Path:
        """A run of which every step is made by others: stopped after one step, and continued at the next place."""
        run = self._directory / f"walk-{next(self._numbers)}"
        for place in places[:-1]:
            self._train(run, setup, *place, stop_after=1)
        self._train(run, setup, *places[-1])
        events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
        resumes = [(event["step"], event["world_size"]) for event in events if event["event"] == "resume"]
        assert resumes == [(step, size) for step, (size, _) in enumerate(places[1:], start=1)]
        return run

    def _train(self, run: Path, setup: str, size: int, stage: int, stop_after: int = 0) -> None:
        chosen = SETUPS[setup]
        settings_file = self._directory / f"{setup}-{stage}.json"
        zero = {"stage": stage, "reduce_bucket_size": 50000, **chosen.get("zero", {}).get(stage, {})}
        settings_file.write_text(json.dumps({"zero_optimization": zero}))
        values = settings(
            run, self._store.path, train__max_steps=STEPS, checkpoint__every_steps=SAVED, checkpoint__keep=9
        )
        values["engine"]["deepspeed"] = str(settings_file)
        values["train"] |= {"global_batch_size": 12, "micro_batch_size": 1}
        values["model"] |= {"dtype": chosen.get("dtype", "float32"), "trainable": chosen.get("trainable")}
        values["model"]["lora"] = chosen.get("lora")
        values["model"]["config"]["tie_word_embeddings"] = chosen.get("tie_word_embeddings", True)
        meeting_point = str(self._directory / f"meeting-{next(self._numbers)}")
        arguments = {"size": size, "meeting_point": meeting_point, "values": values, "stop_after": stop_after}
        assert self._pool.run(AMONG, **arguments) == [None] * 4


@pytest.fixture(scope="module")
def runs(four_ranks, store, tmp_path_factory):
    return Runs(four_ranks, store, tmp_path_factory.mktemp("reshard"))


def check_equal_to_the_bit(left: Path, right: Path) -> None:
    assert losses(left) == losses(right)
    assert digest(left) == digest(right)


def check_equal_to_rounding(left: Path, right: Path) -> None:
    assert np.allclose(losses(left), losses(right), rtol=1e-5, atol=0)
    first, second = gathered(left), gathered(right)
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert np.linalg.norm(array - second[name]) <= 1e-5 * max(np.linalg.norm(array), 1e-30), name


@pytest.mark.parametrize(("setup", "size", "stage"), SAME)
def test_the_same_ranks_continue_to_the_bit(runs, setup, size, stage):
    check_equal_to_the_bit(runs.continued(setup, (size, stage), size, stage), runs.straight(setup, size, stage))


@pytest.mark.parametrize(("setup", "saved", "loaded"), COVERING)
def test_other_ranks_and_stages_continue_to_rounding(runs, setup, saved, loaded):
    check_equal_to_rounding(runs.continued(setup, saved, *loaded), runs.straight(setup, *saved))


def test_frozen_weights_stay_as_they_were(runs):
    run = runs.straight("frozen", 2, 1)
    arrays = gathered(run)
    assert "exp_avg model.norm.weight" in arrays
    assert "exp_avg model.embed_tokens.weight" not in arrays


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("saved", [(size, stage) for size in SIZES for stage in STAGES])
def test_the_whole_matrix(runs, saved, seed):
    """Every (ranks, stage) continued by itself to the bit and by every other to rounding; setups drawn by seed."""
    dice = random.Random(f"{seed} {saved}")
    for loaded in ((size, stage) for size in SIZES for stage in STAGES):
        setup = dice.choice([name for name in SETUPS if "bf16" not in name])
        found = runs.continued(setup, saved, *loaded)
        if found and loaded == saved:
            check_equal_to_the_bit(found, runs.straight(setup, *saved))
        else:
            check_equal_to_rounding(found, runs.straight(setup, *saved))
        shutil.rmtree(found)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("walk", range(24))
def test_random_walks(runs, walk, seed):
    """Each step by other ranks at another stage than the one before: what is rounded does not add up."""
    dice = random.Random(f"{seed} walk {walk}")
    setup = dice.choice([name for name in SETUPS if "bf16" not in name])
    places = [(dice.choice(SIZES), dice.choice(STAGES)) for _ in range(STEPS)]
    check_equal_to_rounding(runs.walked(setup, places), runs.straight(setup, *places[0]))
