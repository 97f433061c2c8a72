"""Hand-written safetensors files are the library's, and damage in them is found."""

from contextlib import suppress

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.errors import DataError
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
