"""TensorBoard files after a resume: each step of a curve once, whoever reads them and however the writer ended."""

from collections import Counter
from itertools import count
from pathlib import Path

import pytest

from trainer.observe.tensorboard import TensorBoard, cut_back_events

STARTS = count(1_700_000_000)


def points(path: Path) -> list[tuple[int, float]]:
    """Every point in every file, as a reader sees that knows nothing of purging; in order of steps."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    found = []
    for file in path.iterdir():
        for record in RawEventFileLoader(str(file)).Load():
            event = Event.FromString(record)
            found += [(event.step, value.simple_value) for value in event.summary.value if value.tag == "loss"]
    return sorted(found)


def write(path: Path, restored: int, until: int, value: float) -> None:
    board = TensorBoard(path, restored)
    for step in range(restored + 1, until + 1):
        board.write(step, {"loss": value, "other": value})
    board.close()
    # Starts are seconds apart and in processes of their own; TensorBoard reads files in the order of their names.
    newest = max(path.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    newest.rename(path / f"events.out.tfevents.{next(STARTS)}.host")


@pytest.mark.parametrize("torn", [0, 1, 7, 30])
def test_each_step_once_after_resumes_and_a_fall_back(torn, tmp_path):
    write(tmp_path, 0, 10, 1.0)
    if torn:
        file = next(tmp_path.iterdir())
        file.write_bytes(file.read_bytes()[:-torn])
    write(tmp_path, 6, 12, 2.0)
    write(tmp_path, 8, 9, 3.0)
    # The newest checkpoints were damaged: two starts are taken back, one of them wholly.
    write(tmp_path, 4, 11, 4.0)
    assert points(tmp_path) == [(step, 1.0 if step <= 4 else 4.0) for step in range(1, 12)]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulated = EventAccumulator(str(tmp_path))
    accumulated.Reload()
    assert Counter(point.step for point in accumulated.Scalars("loss")) == Counter(range(1, 12))


def test_files_of_others_and_rubbish_stay_or_go_without_an_error(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "events.out.tfevents.1.x").write_bytes(b"\xff" * 50)
    (tmp_path / "events.out.tfevents.2.x").write_bytes(b"")
    cut_back_events(tmp_path, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    cut_back_events(tmp_path / "missing", 3)


def test_nothing_is_cut_where_nothing_is_later(tmp_path):
    write(tmp_path, 0, 5, 1.0)
    before = next(tmp_path.iterdir()).read_bytes()
    cut_back_events(tmp_path, 5)
    assert next(tmp_path.iterdir()).read_bytes() == before


def test_a_message_is_shown_at_its_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path, 0)
    board.say(7, "rank 2 on c is slow")
    board.close()
    accumulated = EventAccumulator(str(tmp_path))
    accumulated.Reload()
    (event,) = accumulated.Tensors("messages/text_summary")
    assert (event.step, event.tensor_proto.string_val[0].decode()) == (7, "rank 2 on c is slow")
