"""Every corruption of a checkpoint, a token store or an exported model is found, and the file is named."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.support.corpora import tiny_store
from tests.support.damage import damage
from tests.support.slice_checkpoints import slice_checkpoint
from tools.checkpoint import entries_of, verified
from tools.model_directory.writing import copy_files, new_directory, verify_artefact, write_manifest, write_weights
from trainer.checkpoint.verify import find_checkpoint, step_directory, verify_checkpoint
from trainer.data.store import open_store, verify_store
from trainer.errors import CheckpointError, DataError, MissingInputError

ERRORS = (CheckpointError, DataError, MissingInputError)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Name to (an intact directory, the function that finds what is wrong with it)."""
    place = tmp_path_factory.mktemp("originals")
    checkpoints = place / "run" / "checkpoints"
    for step in (7, 9):
        slice_checkpoint(checkpoints, step)
    tiny_store(place / "data")
    weights = {f"layer.{index}": ("F32", (40, 3)) for index in range(5)}
    with new_directory(place / "model", 0) as building:
        entries = write_weights(building, "model", weights, lambda name: np.full((40, 3), 3.1, np.float32), 1000)
        entries |= copy_files([place / "data/tokenizer/tokenizer.json"], building)
        about = {"kind": "model", "step": 9, "tolerance": 1e-05, "provenance": {"loss": 0.30000000000000004}}
        write_manifest(building, entries, about)
    return {
        "checkpoint": (checkpoints / "step-00000009", verify_checkpoint),
        "store": (place / "data/store", verify_store),
        "model": (place / "model", verify_artefact),
    }


def problem_found(find, directory: Path) -> str:
    try:
        find(directory)
    except ERRORS as error:
        return str(error)
    return ""


def corrupt_and_find(originals, place: Path, dice: random.Random, count: int) -> None:
    for number in range(count):
        name = dice.choice([*originals])
        intact, find = originals[name]
        directory = place / f"{number}" / "checkpoints" / intact.name
        shutil.copytree(intact, directory)
        find(directory)
        what, names = damage(directory, dice)
        found = problem_found(find, directory)
        assert found, f"case {number}: {what} in {name} was not found"
        assert any(known in found for known in names), f"case {number}: {what}: {found}"
        if name == "checkpoint":
            before = step_directory(directory.parent, 7)
            shutil.copytree(step_directory(intact.parent, 7), before)
            assert find_checkpoint(directory.parent.parent) == before
        shutil.rmtree(place / f"{number}")


def test_every_corruption_is_found_and_named(originals, tmp_path, seed):
    corrupt_and_find(originals, tmp_path, random.Random(seed), 500)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_thousand_corruptions(originals, tmp_path, seed):
    corrupt_and_find(originals, tmp_path, random.Random(seed + 1), 20_000)


def flip_bits(originals, place: Path, dice: random.Random | None) -> None:
    """Every bit of the manifests, or 600 of each drawn by `dice`: text that can spell one value in several ways."""
    for name, manifest in (("checkpoint", "MANIFEST.json"), ("model", "manifest.json")):
        intact, find = originals[name]
        directory = place / intact.name
        shutil.copytree(intact, directory)
        content = (directory / manifest).read_bytes()
        every = range(8 * len(content))
        for place_of_bit in every if dice is None else dice.sample(every, 600):
            spoilt = bytearray(content)
            spoilt[place_of_bit // 8] ^= 1 << place_of_bit % 8
            (directory / manifest).write_bytes(spoilt)
            with pytest.raises(ERRORS):
                find(directory)


def test_bits_of_the_manifests(originals, tmp_path, seed):
    flip_bits(originals, tmp_path, random.Random(seed))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_bit_of_the_manifests(originals, tmp_path):
    flip_bits(originals, tmp_path, None)


def test_training_opens_no_corrupted_store(originals, tmp_path, seed):
    """The quick check at the start of a run (xxh3) finds changed content as well."""
    dice = random.Random(seed)
    intact, _ = originals["store"]
    for number in range(40):
        directory = tmp_path / f"{number}"
        shutil.copytree(intact, directory)
        what, names = damage(directory, dice)
        if what.split()[0] in ("duplicate", "foreign", "link"):
            continue
        with pytest.raises(ERRORS) as caught:
            open_store(directory)
        assert any(known in str(caught.value) for known in names), what


def test_the_command_names_all_damaged_checkpoints(originals, tmp_path):
    shutil.copytree(originals["checkpoint"][0].parent, tmp_path / "run/checkpoints")
    for step, name in ((7, "state.json"), (9, "probe.safetensors")):
        (step_directory(tmp_path / "run/checkpoints", step) / name).write_bytes(b"x")
    problems = [problem for _, problem in verified(tmp_path / "run")]
    assert "probe.safetensors has 1 bytes" in problems[0]
    assert "state.json has 1 bytes" in problems[1]
    assert [entry.problem for entry in entries_of(tmp_path / "run/checkpoints")] == problems
