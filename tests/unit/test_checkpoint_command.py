"""steadfast checkpoint: list, verify, prune, pin; and what retention never removes."""

import json
from types import SimpleNamespace

import pytest

from tests.support.slice_checkpoints import slice_checkpoint
from tools.checkpoint import run
from trainer.checkpoint.retention import best_step, pinned_steps, retain
from trainer.checkpoint.verify import committed_steps, step_directory
from trainer.errors import CheckpointError, MissingInputError, RunLockedError, UsageError
from trainer.run_directory import RunDirectory

LOSSES = {1: 3.0, 2: 1.5, 3: 2.0, 4: 1.75, 5: 1.8}


@pytest.fixture
def checkpoints(tmp_path):
    for step, loss in LOSSES.items():
        slice_checkpoint(tmp_path / "run/checkpoints", step, evaluation_loss=loss)
    return tmp_path / "run" / "checkpoints"


def command(capsys, action, path, json_output=True, **options):
    """Run an action as the command line would; its output, parsed when it is JSON."""
    capsys.readouterr()
    named = {"source": path} if action == "verify" else {"run": path}
    assert run(SimpleNamespace(action=action, json=json_output, **named, **options)) == 0
    out = capsys.readouterr().out
    return json.loads(out) if json_output else out


def spoil(checkpoints, step):
    file = step_directory(checkpoints, step) / "probe.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_retention_keeps_the_newest_the_best_and_the_pinned(checkpoints, capsys):
    assert best_step(checkpoints) == 2
    command(capsys, "pin", checkpoints.parent, step=1)
    assert pinned_steps(checkpoints) == {1}
    assert retain(checkpoints, 1, newest=5) == [4, 3]
    assert committed_steps(checkpoints) == [5, 2, 1]
    command(capsys, "unpin", checkpoints.parent, step=1)
    assert retain(checkpoints, 1, newest=5) == [1]
    assert committed_steps(checkpoints) == [5, 2]


def test_prune_counts_from_the_newest_valid_one(checkpoints, capsys):
    """Damage that only hashing finds: the newest two are not what people fall back to, so step 3 must stay."""
    spoil(checkpoints, 5)
    spoil(checkpoints, 4)
    would = command(capsys, "prune", checkpoints.parent, keep=1, dry_run=True)
    assert would["newest_valid"] == 3
    assert would["removed"] == [1]
    assert committed_steps(checkpoints) == [5, 4, 3, 2, 1]
    assert "probe.safetensors does not match its hash" in would["damaged"][0]
    text = command(capsys, "prune", checkpoints.parent, json_output=False, keep=1, dry_run=False)
    assert f"removed {step_directory(checkpoints, 1)}" in text
    assert committed_steps(checkpoints) == [5, 4, 3, 2]


def test_prune_leaves_a_live_run_alone_and_refuses_to_keep_nothing(checkpoints, capsys):
    with pytest.raises(UsageError, match="would remove the newest"):
        command(capsys, "prune", checkpoints.parent, keep=0, dry_run=False)
    lock = RunDirectory(checkpoints.parent).lock()
    with pytest.raises(RunLockedError, match="is in use"):
        command(capsys, "prune", checkpoints.parent, keep=1, dry_run=False)
    lock.close()


def test_list_shows_marks_and_problems(checkpoints, capsys):
    command(capsys, "pin", checkpoints.parent, step=3)
    (step_directory(checkpoints, 4) / "state.json").unlink()
    entries = {entry["step"]: entry for entry in command(capsys, "list", checkpoints.parent)}
    assert [entries[step]["best"] for step in (1, 2, 3)] == [False, True, False]
    assert [entries[step]["pinned"] for step in (1, 2, 3)] == [False, False, True]
    assert entries[4]["problem"].endswith("is damaged: state.json is missing")
    text = command(capsys, "list", checkpoints.parent, json_output=False)
    assert "step 2  1 ranks" in text.replace("rank ", "ranks ")
    assert "evaluation loss 1.5000  best" in text


def test_verify_names_every_damaged_checkpoint_and_ends_with_74(checkpoints, capsys):
    assert [entry["problem"] for entry in command(capsys, "verify", checkpoints.parent)] == [None] * 5
    spoil(checkpoints, 2)
    spoil(checkpoints, 4)
    with pytest.raises(CheckpointError, match="2 of 5 checked are damaged: step-00000004, step-00000002") as caught:
        command(capsys, "verify", checkpoints.parent)
    assert caught.value.exit_code == 74
    found = json.loads(capsys.readouterr().out)
    assert [bool(entry["problem"]) for entry in found] == [False, True, False, True, False]


def test_what_is_not_there_is_said(checkpoints, capsys, tmp_path):
    with pytest.raises(MissingInputError, match="has no checkpoint of step 9"):
        command(capsys, "pin", checkpoints.parent, step=9)
    with pytest.raises(MissingInputError, match="there is no"):
        command(capsys, "list", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInputError, match="holds no checkpoint"):
        command(capsys, "verify", tmp_path / "empty")
