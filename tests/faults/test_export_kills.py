"""An export that is killed, shares its OUT, or meets a full disk: it goes on, waits its turn, or leaves nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.exports import flip_a_byte
from tests.support.models import save_slice_checkpoint, tiny_model, tiny_tokenizer
from tests.support.small_disk import NoSmallDisk, fill, small_disk
from tools.export import export_checkpoint
from tools.exporting.checkpoint_tensors import CheckpointTensors
from tools.model_directory import writing
from trainer.errors import CannotWriteError, DataError, RunLockedError
from trainer.tensor_file import TensorFileWriter

TOKENIZER = tiny_tokenizer()
SHARD_BYTES = 30_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_slice_checkpoint(tmp_path_factory.mktemp("run"), tiny_model(TOKENIZER, seed=3), TOKENIZER)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an export that nothing happened to."""
    return contents(export(checkpoint, tmp_path_factory.mktemp("whole") / "model"))


def export(checkpoint: Path, out: Path, **options: object) -> Path:
    export_checkpoint(checkpoint, out, verify=False, **{"max_shard_bytes": SHARD_BYTES, **options})
    return out


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def killed(patch: Callable[[pytest.MonkeyPatch], None], work: Callable[[], object]) -> None:
    """Do the work in a child that `patch` makes kill itself with SIGKILL somewhere."""
    child = os.fork()
    if child == 0:
        try:
            patch(pytest.MonkeyPatch())
            work()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def at_call(owner: object, name: str, number: int, after: bool) -> Callable[[pytest.MonkeyPatch], None]:
    """Kill at the call of that number, before or after it was done."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        real, calls = getattr(owner, name), []

        def function(*arguments: object, **options: object) -> object:
            calls.append(name)
            if len(calls) == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **options)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        monkeypatch.setattr(owner, name, function)

    return patch


PHASES = {
    "before the first shard": (at_call(TensorFileWriter, "write_pieces", 1, after=False), 0),
    "in the middle of a shard": (at_call(TensorFileWriter, "write_pieces", 12, after=True), 2),
    "a shard written, not noted": (at_call(writing, "_note_finished", 2, after=False), 1),
    "two shards noted": (at_call(writing, "_note_finished", 2, after=True), 2),
    "all shards written": (at_call(writing, "copy_files", 1, after=False), None),
    "before the manifest": (at_call(writing, "write_manifest", 1, after=False), None),
    "before it gets its name": (at_call(writing, "write_manifest", 1, after=True), 0),
}


@pytest.mark.parametrize("phase", PHASES)
def test_killed_it_goes_on_with_the_next_shard(
    phase: str, checkpoint: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    patch, kept = PHASES[phase]
    killed(patch, lambda: export(checkpoint, tmp_path / "model"))
    assert not (tmp_path / "model").exists()
    unfinished = tmp_path / ".model.unfinished"
    before = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("*.safetensors")}
    export(checkpoint, tmp_path / "model")
    assert contents(tmp_path / "model") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    shards = sorted(name for name in whole if name.endswith(".safetensors"))
    assert len(shards) > 3
    after = {name: (tmp_path / "model" / name).stat().st_mtime_ns for name in shards}
    assert [name for name in shards if before.get(name) == after[name]] == shards[:kept]


def test_a_finished_shard_that_was_damaged_is_written_again(
    checkpoint: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    killed(PHASES["two shards noted"][0], lambda: export(checkpoint, tmp_path / "model"))
    flip_a_byte(next((tmp_path / ".model.unfinished").glob("*-00001-of-*")))
    assert contents(export(checkpoint, tmp_path / "model")) == whole


def test_another_export_keeps_nothing_of_a_killed_one(checkpoint: Path, tmp_path: Path) -> None:
    killed(PHASES["all shards written"][0], lambda: export(checkpoint, tmp_path / "model"))
    export(checkpoint, tmp_path / "model", dtype="bfloat16")
    fresh = export(checkpoint, tmp_path / "fresh", dtype="bfloat16")
    names = {path.name for path in fresh.glob("*.safetensors*")}
    assert {path.name for path in (tmp_path / "model").glob("*.safetensors*")} == names
    assert all((fresh / name).read_bytes() == (tmp_path / "model" / name).read_bytes() for name in names)


def test_two_exports_to_one_place_at_once_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    refused = []

    def prove(claim):
        with pytest.raises(RunLockedError, match=r"model is in use by pid \d+") as error:
            export(checkpoint, tmp_path / "model")
        refused.append(error)
        raise DataError("stop here")

    with pytest.raises(DataError, match="stop here"):
        export_checkpoint(checkpoint, tmp_path / "model", prove=prove)
    assert refused
    export(checkpoint, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_fills_up_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check beforehand says yes, and then somebody else takes the room."""
    real = CheckpointTensors.pieces
    try:
        with small_disk(tmp_path / "disk", 80 << 10) as disk:

            def pieces(self, name):
                if not (disk / "ballast").exists():
                    fill(disk, leave_kibibytes=40)
                return real(self, name)

            monkeypatch.setattr(CheckpointTensors, "pieces", pieces)
            with pytest.raises(CannotWriteError, match="no space left while writing"):
                export(checkpoint, disk / "model")
            assert [path.name for path in disk.iterdir()] == ["ballast"]
    except NoSmallDisk as error:
        pytest.skip(f"no small file system: {error}")
