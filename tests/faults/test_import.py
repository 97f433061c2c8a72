"""A DeepSpeed checkpoint is taken over exactly, by its own command only, and nothing in it is run."""

import json
import os
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from deepspeed.checkpoint.ds_to_universal import main as convert

from tests.support.training import gathered, losses, settings
from tools.checkpoint import run
from tools.deepspeed_import import load_untrusted, read_deepspeed
from trainer.errors import DataError, UsageError

SAVES = "tests.support.training:train_and_save_with_deepspeed"


def checkpoint_import(capsys, config, source, trust=True):
    """The report of `steadfast checkpoint import CONFIG SOURCE`, and what it said on stderr."""
    capsys.readouterr()
    run(Namespace(action="import", config=config, source=source, overrides=[], i_trust_this_file=trust, json=True))
    said = capsys.readouterr()
    return json.loads(said.out), said.err


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_zero_checkpoint_goes_on_as_ours(name, tmp_path, two_ranks, store, capsys):
    """Weights, moments, schedule and data position are those of our own checkpoint of the same step."""
    ours, theirs, imported = tmp_path / "ours", tmp_path / "theirs", tmp_path / "run"
    shorter = settings(ours, store.path, train__max_steps=3, engine__deepspeed=name)
    assert two_ranks.run(SAVES, values=shorter, out=str(theirs)) == [None, None]
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(settings(imported, store.path, engine__deepspeed=name)))
    with pytest.raises(UsageError, match="--i-trust-this-file"):
        checkpoint_import(capsys, config, theirs, trust=False)
    assert not (imported / "checkpoints").exists()
    report, warning = checkpoint_import(capsys, config, theirs)
    assert "because you trust it" in warning
    assert (report["step"], report["ranks"]) == (3, 2)
    left, right = gathered(ours), gathered(imported)
    assert left.keys() == right.keys()
    assert all(np.array_equal(left[key], right[key]) for key in left)
    with pytest.raises(UsageError, match="has checkpoints already"):
        checkpoint_import(capsys, config, theirs)
    for place in (ours, imported):
        longer = settings(place, store.path, engine__deepspeed=name)
        assert two_ranks.run("tests.support.training:train", values=longer) == [None, None]
    assert np.allclose(losses(ours)[3:], losses(imported), rtol=1e-6, atol=0)


def test_a_universal_checkpoint_holds_the_same(tmp_path, two_ranks, store):
    ours, theirs, universal = tmp_path / "ours", tmp_path / "theirs", tmp_path / "universal"
    values = settings(ours, store.path, train__max_steps=2, engine__deepspeed="zero3")
    assert two_ranks.run(SAVES, values=values, out=str(theirs)) == [None, None]
    arguments = Namespace(
        input_folder=str(theirs / "theirs"),
        output_folder=str(universal),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    convert(arguments)
    layout, _, steps, pieces = read_deepspeed(universal)
    assert (layout, steps) == ("universal", 2)
    for key, array in gathered(ours).items():
        kind, name = key.split()
        assert np.array_equal(pieces[kind, f"language_model.{name}"][0].detach().numpy(), array), key


class Payload:
    """Runs a command when a plain unpickler reads it."""

    def __init__(self, function, *arguments) -> None:
        self.what = (function, arguments)

    def __reduce__(self):
        return self.what


def test_pickles_that_run_code_are_refused(tmp_path):
    marker = tmp_path / "executed"
    payloads = [
        Payload(os.system, f"touch {marker}"),
        Payload(eval, f"open({str(marker)!r}, 'w')"),
        Payload(exec, f"open({str(marker)!r}, 'w')"),
        Payload(subprocess.Popen, ["touch", str(marker)]),
        Payload(Path.touch, marker),
        Payload(shutil.copyfile, __file__, str(marker)),
        Payload(torch.load, str(marker)),
        Payload(__import__, "antigravity"),
    ]
    for number, payload in enumerate(payloads):
        for content in (payload, {"optimizer_state_dict": {"nested": [payload]}}, {"a": torch.ones(2), "b": payload}):
            file = tmp_path / f"{number}.pt"
            torch.save(content, file)
            with pytest.raises(DataError, match="nothing was run"):
                load_untrusted(file)
            assert not marker.exists()
    for number, garbage in enumerate([b"", b"\x80\x04.", b"PK\x03\x04", os.urandom(200)]):
        (tmp_path / f"garbage-{number}.pt").write_bytes(garbage)
        with pytest.raises(DataError):
            load_untrusted(tmp_path / f"garbage-{number}.pt")
