"""Copies in object storage under errors, torn writes and kills: `latest` never names an incomplete one."""

import random
import uuid
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.support.slice_checkpoints import slice_checkpoint
from tests.support.training import settings
from trainer.checkpoint.retention import retain
from trainer.checkpoint.upload import Uploads, upload_checkpoint
from trainer.checkpoint.verify import verify_checkpoint
from trainer.errors import CannotWriteError, UsageError


class Unreliable(MemoryFileSystem):
    """A store in memory whose operations fail, tear what they write, or fail after they have done it."""

    protocol = "unreliable"
    cachable = False

    def __init__(self, dice: random.Random, rate: float, check) -> None:
        super().__init__()
        self.dice, self.rate, self.check = dice, rate, check
        self.operations = self.faults = 0

    def _fails(self) -> bool:
        self.check()
        self.operations += 1
        failing = self.dice.random() < self.rate
        self.faults += failing
        return failing

    def _write(self, place: str, content: bytes) -> None:
        kind = self.dice.randrange(3) if self._fails() else None
        if kind == 0:
            raise OSError("503 slow down")
        if kind == 1:
            # Said to be done, and only half of it is there.
            content = content[: len(content) // 2]
        self.pipe(place, content)
        if kind == 2:
            raise TimeoutError("no answer")

    def put_file(self, lpath, rpath, **options):
        self._write(rpath, Path(lpath).read_bytes())

    def pipe_file(self, path, value, **options):
        self._write(path, value)

    def pipe(self, path, value=None, **options):
        with self.open(path, "wb") as stream:
            stream.write(value)

    def rm_file(self, path):
        if self._fails():
            raise OSError("503 slow down")
        super().rm_file(path)

    def cat_file(self, path, **options):
        if self._fails():
            raise OSError("503 slow down")
        return super().cat_file(path, **options)


@pytest.fixture
def root():
    name = f"/{uuid.uuid4().hex}"
    yield name
    if (memory := fsspec.filesystem("memory")).exists(name):
        memory.rm(name, recursive=True)


def check_remote(root: str, tmp_path) -> str | None:
    """What `latest` names is complete, and so is every copy that has a manifest; returns what it names."""
    memory = fsspec.filesystem("memory")
    if not memory.exists(f"{root}/latest") or not memory.cat_file(f"{root}/latest").endswith(b"\n"):
        # Nothing is named; half a name is none: it lacks its end.
        return None
    named = memory.cat_file(f"{root}/latest").decode().strip()
    for place in memory.glob(f"{root}/step-*/MANIFEST.json"):
        directory = tmp_path / "fetched" / uuid.uuid4().hex / place.split("/")[-2]
        for file in memory.find(place.rpartition("/")[0]):
            local = directory / file.split(f"/{directory.name}/")[1]
            local.parent.mkdir(parents=True, exist_ok=True)
            local.write_bytes(memory.cat_file(file))
        if (directory / "MANIFEST.json").stat().st_size < 600:
            # A torn manifest is not readable, and `latest` must not name it.
            assert directory.name != named
            continue
        verify_checkpoint(directory)
    assert memory.exists(f"{root}/{named}/MANIFEST.json")
    return named


def run_uploads(root, tmp_path, dice, count, rate=0.15):
    given_up = 0
    for step in range(1, count + 1):
        path = slice_checkpoint(tmp_path / "checkpoints", step, elements=dice.randrange(1, 2000))
        store = Unreliable(dice, rate, lambda: check_remote(root, tmp_path))
        try:
            upload_checkpoint(path, store, root, pause=lambda seconds: None, attempts=3)
        except CannotWriteError:
            given_up += 1
            check_remote(root, tmp_path)
        else:
            assert check_remote(root, tmp_path) == path.name
        assert store.operations
    return given_up


def test_latest_is_never_ahead_of_a_complete_copy(root, tmp_path, seed):
    assert run_uploads(root, tmp_path, random.Random(seed), 25, rate=0.3) >= 1, "no upload failed for good"


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_uploads(root, tmp_path, seed):
    assert run_uploads(root, tmp_path, random.Random(seed), 400, rate=0.3) >= 1


def test_an_equal_copy_is_left_alone_and_another_one_is_replaced(root, tmp_path):
    memory = fsspec.filesystem("memory")
    first = slice_checkpoint(tmp_path / "a/checkpoints", 4)
    upload_checkpoint(first, memory, root)
    changed = memory.modified(f"{root}/{first.name}/state.json")
    upload_checkpoint(first, memory, root)
    assert memory.modified(f"{root}/{first.name}/state.json") == changed
    other = slice_checkpoint(tmp_path / "b/checkpoints", 4, elements=50)
    upload_checkpoint(other, memory, root)
    assert check_remote(root, tmp_path) == other.name
    assert memory.cat_file(f"{root}/{other.name}/MANIFEST.json") == (other / "MANIFEST.json").read_bytes()


def test_the_process_copies_and_a_killed_one_is_reported(tmp_path):
    remote = tmp_path / "remote"
    uploads = Uploads(f"file://{remote}")
    path = slice_checkpoint(tmp_path / "checkpoints", 4)
    uploads.add(path)
    assert uploads.pending == [4]
    (report,) = uploads.finish()
    assert (report.step, report.outcome) == (4, "uploaded")
    verify_checkpoint(remote / path.name)
    assert (remote / "latest").read_text() == "step-00000004\n"
    uploads._process.kill()
    uploads.add(path)
    (report,) = uploads.finish()
    assert report.outcome == "not uploaded"
    uploads.close()


def test_a_checkpoint_stays_until_it_is_copied(tmp_path):
    for step in (1, 2, 3, 4):
        slice_checkpoint(tmp_path / "checkpoints", step)
    assert retain(tmp_path / "checkpoints", 1, 4, protected=[2]) == [3, 1]


def test_an_unknown_protocol_is_refused():
    with pytest.raises(UsageError, match=r"checkpoint.upload: nothing://x cannot be used"):
        Uploads("nothing://x")


def test_a_run_uploads_its_last_checkpoint_before_it_ends(tmp_path, two_ranks, store):
    run, remote = tmp_path / "run", tmp_path / "remote"
    values = settings(run, store.path, checkpoint__every_steps=2, checkpoint__upload=f"file://{remote}")
    assert two_ranks.run("tests.support.training:train", values=values) == [None, None]
    assert (remote / "latest").read_text() == "step-00000006\n"
    for copy in remote.glob("step-*"):
        verify_checkpoint(copy)
    assert (run / "events.jsonl").read_text().count('"upload"') == 3
