"""TensorBoard event files; the only module that names tensorboard."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from trainer.durable import write_errors

_LENGTH, _CHECKSUM = 8, 4


class TensorBoard:
    """Scalars under the metric names. Points after `step` of an earlier start are cut off: curves never double."""

    def __init__(self, path: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        cut_back_events(path, step)
        # A TensorBoard that has read them already drops them when it sees where we begin.
        self._writer = SummaryWriter(str(path), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Add one point to each curve."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def say(self, step: int, text: str) -> None:
        """Show a message at `step`, under Text."""
        self._writer.add_text("messages", text, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


def cut_back_events(path: Path, step: int) -> None:
    """Cut every event file in `path` off before its first event after `step`; one that then holds none is removed.

    A last event torn by a crash is cut off too. Steps rise within a file: each start writes one of its own.
    """
    for file in sorted(path.glob("events.out.tfevents.*")):
        kept, end = 0, 0
        with write_errors(file):
            for event_step, event_end in _events(file):
                if event_step is not None and event_step > step:
                    break
                kept += event_step is not None
                end = event_end
            if kept == 0:
                file.unlink()
            elif end < file.stat().st_size:
                with file.open("rb+") as stream:
                    stream.truncate(end)


def _events(file: Path) -> Iterator[tuple[int | None, int]]:
    """Step (None: the version that a file begins with) and end in bytes of each whole event, in order.

    A record is: length (8 bytes, little endian), checksum (4), event, checksum (4).
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    content = file.read_bytes()
    begin = 0
    while begin + _LENGTH + _CHECKSUM <= len(content):
        (length,) = struct.unpack_from("<Q", content, begin)
        data = begin + _LENGTH + _CHECKSUM
        end = data + length + _CHECKSUM
        if end > len(content):
            return
        try:
            event = Event.FromString(content[data : data + length])
        except DecodeError:
            return
        yield (None if event.WhichOneof("what") == "file_version" else event.step), end
        begin = end
