"""A full disk, real and small: saves are given up cleanly, training goes on, and the next save makes room first."""

import json

import numpy as np
import pytest

from tests.support.small_disk import NoSmallDisk, fill, small_disk
from tests.support.training import losses, settings
from trainer.checkpoint.contents import RankContents, from_array
from trainer.checkpoint.retention import pin
from trainer.checkpoint.saving import Saves
from trainer.checkpoint.slices import KINDS, rank_file, slice_key
from trainer.checkpoint.verify import Manifest, committed_steps, find_checkpoint, verify_checkpoint
from trainer.checkpoint.writer_process import WriterProcess
from trainer.errors import CannotWriteError
from trainer.observe.ledger import JsonLines, read_lines

FILLS = "tests.support.training:train_while_the_disk_fills"
MIB = 1 << 20


@pytest.fixture
def disk(tmp_path):
    """A directory on a file system of 24 MiB."""
    try:
        with small_disk(tmp_path / "disk", 24 << 10) as place:
            yield place
    except NoSmallDisk as error:
        pytest.skip(f"no small file system: {error}")


def one_rank_saves(place, writer=None, on_phase=lambda phase: None):
    return Saves(place / "checkpoints", 0, lambda message: [message], keep=2, writer=writer, on_phase=on_phase)


def save(saves, step, mebibytes=6):
    """One save of about that size; returns how it ended."""
    value = np.full(mebibytes * MIB // 12, step, np.float32)
    sources = {slice_key(kind, 0, "weight"): from_array(value, "F32") for kind in KINDS}
    parameters = {"weight": {"shape": [value.size], "dtype": "float32"}}
    reports = saves.begin(
        step,
        lambda: RankContents({rank_file(0, 1): sources}),
        lambda files: Manifest(step, 1, files, parameters, {}, {}, {}, {}),
    )
    (report,) = [*reports, *saves.wait()]
    return report


@pytest.mark.parametrize("background", [True, False])
def test_the_next_save_prunes_first(disk, background):
    saves = one_rank_saves(disk, WriterProcess() if background else None)
    assert [save(saves, step).outcome for step in (1, 2)] == ["committed", "committed"]
    ballast = fill(disk, 7 << 10)
    report = save(saves, 3, mebibytes=8)
    assert report.outcome == "given up"
    assert "needs" in report.problem
    assert committed_steps(disk / "checkpoints") == [2, 1]
    assert save(saves, 4, mebibytes=8).outcome == "committed", "removing step 1 made room"
    assert committed_steps(disk / "checkpoints") == [4, 2]
    assert ballast.exists()
    verify_checkpoint(find_checkpoint(disk))
    saves.close()


@pytest.mark.parametrize("background", [True, False])
def test_no_space_in_the_middle_of_a_file(disk, background):
    """The check beforehand says yes, and then somebody else takes the room."""
    taken = []

    def on_phase(phase):
        if phase == "snapshot" and len(taken) == 1:
            fill(disk, 3 << 10)
            if background:
                # The writer looks once more when it begins, and only then the room is taken.
                saves._needed = 1
        taken.extend([phase] if phase == "snapshot" else [])

    saves = one_rank_saves(disk, WriterProcess() if background else None, on_phase)
    assert save(saves, 1).outcome == "committed"
    report = save(saves, 2)
    assert report.outcome == "given up"
    assert "no space left while writing" in report.problem
    assert committed_steps(disk / "checkpoints") == [1]
    assert not list((disk / "checkpoints").glob(".*"))
    saves.close()


def test_three_failures_in_a_row_are_an_error_and_what_must_stay_stays(disk):
    saves = one_rank_saves(disk)
    for step in (1, 2):
        save(saves, step, mebibytes=3)
    pin(disk / "checkpoints", 1)
    fill(disk, 100)
    assert [save(saves, step).outcome for step in (3, 4)] == ["given up", "given up"]
    with pytest.raises(CannotWriteError, match="3 saves in a row failed, the last one of step 5") as caught:
        save(saves, 5)
    assert caught.value.exit_code == 73
    assert committed_steps(disk / "checkpoints") == [2, 1]


def test_a_ledger_keeps_its_lines_until_there_is_room(disk):
    lines = JsonLines(disk / "events.jsonl", durable=True)
    lines.append({"step": 0})
    ballast = fill(disk, 0)
    for step in range(1, 2000):
        lines.append({"step": step, "text": "x" * 50})
    assert len([*read_lines(disk / "events.jsonl")]) < 2000
    ballast.unlink()
    lines.append({"step": 2000})
    lines.close()
    assert [entry["step"] for entry in read_lines(disk / "events.jsonl")] == [*range(2001)]


def test_training_goes_on_while_the_disk_is_full(disk, two_ranks, store):
    run = disk / "run"
    changes = {"checkpoint__every_steps": 2, "logging__tensorboard": True}
    first = settings(run, store.path, train__max_steps=2, **changes)
    assert two_ranks.run("tests.support.training:train", values=first) == [None, None]
    values = settings(run, store.path, train__max_steps=8, **changes)
    assert two_ranks.run(FILLS, values=values, place=str(disk), full_at=1, free_at=5) == [None, None]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    saves = {event["step"]: event["event"] for event in events if event["event"] in ("commit", "save_failed")}
    assert saves == {2: "commit", 4: "save_failed", 6: "save_failed", 8: "commit"}
    assert len(losses(run)) == 8, "no line of metrics.jsonl is lost"
    assert len((run / "steps/steps.jsonl").read_text().splitlines()) == 8
    assert committed_steps(run / "checkpoints")[0] == 8
    verify_checkpoint(find_checkpoint(run))


def test_a_disk_that_stays_full_ends_the_run_with_73(disk, two_ranks, store):
    run = disk / "run"
    first = settings(run, store.path, train__max_steps=2)
    assert two_ranks.run("tests.support.training:train", values=first) == [None, None]
    values = settings(run, store.path, train__max_steps=20, checkpoint__every_steps=2)
    found = two_ranks.run(FILLS, values=values, place=str(disk), full_at=1, free_at=0)
    assert all(error.startswith("73: 3 saves in a row failed, the last one of step 8") for error in found), found
    assert find_checkpoint(run).name == "step-00000002"
