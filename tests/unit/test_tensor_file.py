"""Hand-written safetensors files are the library's, and damage in them is found."""

import errno
import os
from contextlib import suppress

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import tensor_file
from trainer.durable import sha256_of_file, xxh3_of_file
from trainer.errors import CannotWriteError, DataError
from trainer.tensor_file import DTYPE_NAMES, TensorFile, TensorFileWriter

TENSORS = {
    "weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "empty": np.zeros((0, 5), np.float32),
    "ids": np.array([1, 65535], np.uint16),
    "scalar": np.array(7, np.int64),
}


def write(path, tensors=TENSORS, **options):
    shapes = {name: (DTYPE_NAMES[array.dtype], array.shape) for name, array in tensors.items()}
    with TensorFileWriter(path, shapes, **options) as file:
        for name, array in tensors.items():
            file.write(name, array)
    return file.finished


def test_the_library_reads_what_we_write(tmp_path):
    digest = write(tmp_path / "a.safetensors", metadata={"format": "pt"}, with_sha256=True)
    read = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert {name: array.tolist() for name, array in read.items()} == {name: a.tolist() for name, a in TENSORS.items()}
    assert digest.bytes == (tmp_path / "a.safetensors").stat().st_size
    assert digest.sha256 is not None


def test_we_read_what_the_library_writes(tmp_path):
    safetensors.numpy.save_file(TENSORS, tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    for name, array in TENSORS.items():
        assert np.array_equal(file.array(name), array)
        assert file.array(name).dtype == array.dtype
    assert file.array("weight", 5, 3).tolist() == [5, 6, 7]
    with pytest.raises(IndexError):
        file.array("weight", 10, 3)


def test_what_is_read_is_what_is_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "READ_AHEAD_BYTES", 16)
    write(tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    for name, array in TENSORS.items():
        read = file.read(name, 0, array.size)
        assert (read.dtype, read.tolist()) == (array.dtype, array.reshape(-1).tolist())
    into = np.zeros(9, np.float32)
    file.read("weight", 4, 7, into=into[1:8])
    assert into.tolist() == [0, 4, 5, 6, 7, 8, 9, 10, 0]
    with pytest.raises(IndexError):
        file.read("weight", 10, 3)
    os.truncate(file.path, file.entries["weight"].begin + 20)
    assert file.read("weight", 0, 5).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="has become shorter since it was opened"):
        file.read("weight", 0, 6)


@pytest.mark.parametrize("with_sha256", [False, True])
def test_pieces_of_any_size_are_written_and_hashed_in_order(tmp_path, monkeypatch, with_sha256):
    """Some fit into what may wait, some fill it, one alone is larger."""
    monkeypatch.setattr(tensor_file, "QUEUED_BYTES", 1000)
    monkeypatch.setattr(tensor_file, "WRITE_BACK_BYTES", 3000)
    sizes = [1, 7, 100, 250, 3, 0, 249, 2000, 1, 1, 250, 500, 17]
    whole = np.random.default_rng(0).random(sum(sizes), dtype=np.float32)
    path, shape = tmp_path / "a.safetensors", {"a": ("F32", whole.shape)}
    with TensorFileWriter(path, shape, with_sha256=with_sha256) as file:
        file.write_pieces("a", np.split(whole, np.cumsum(sizes)[:-1]))
    assert np.array_equal(safetensors.numpy.load_file(path)["a"], whole)
    assert file.finished.xxh3_128 == xxh3_of_file(path)
    assert file.finished.sha256 == (sha256_of_file(path) if with_sha256 else None)


def test_a_write_that_fails_behind_the_caller_is_an_error(tmp_path, monkeypatch):
    def fails(self, data):
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(TensorFileWriter, "_write", fails)
    with pytest.raises(CannotWriteError, match="no space left"):
        write(tmp_path / "a", with_sha256=True)


def test_only_what_was_announced_can_be_written(tmp_path):
    with (
        pytest.raises(ValueError, match="announces next"),
        TensorFileWriter(tmp_path / "a", {"a": ("F32", (2,))}) as file,
    ):
        file.write("a", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="never written"), TensorFileWriter(tmp_path / "b", {"a": ("F32", (2,))}):
        pass


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 400))
def test_a_damaged_header_gives_a_data_error_or_the_same_layout(tmp_path_factory, position, value, cut):
    path = tmp_path_factory.mktemp("damage") / "a.safetensors"
    write(path)
    content = bytearray(path.read_bytes())
    if cut < len(content) and position % 2:
        content = content[:cut]
    elif position < len(content):
        content[position] = value
    path.write_bytes(content)
    with suppress(DataError):
        file = TensorFile(path)
        for name in file.entries:
            file.array(name)
