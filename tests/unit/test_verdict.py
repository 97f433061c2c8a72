"""Whom the watchdogs blame, as a pure function."""

from dataclasses import replace

import pytest

from trainer.observe.verdict import KERNEL, RUNNING, SILENT, STOPPED, Sighting, judge, read_stacks

WAITING = Sighting(0, "a", 50, "backward", 7, 61.0, RUNNING, "all_reduce", "zero/stage_1_and_2.py:9 reduce")


def ranks(*changes: dict) -> list[Sighting]:
    return [replace(WAITING, rank=rank, host=f"host-{rank}", **change) for rank, change in enumerate(changes)]


def blamed(*changes: dict) -> tuple[tuple[int, ...], str]:
    found = judge(ranks(*changes))
    return found.ranks, found.sentence


BEHIND = {"marks": 48, "phase": "data", "collective": "", "place": "data/feed.py:9 take"}


@pytest.mark.parametrize(
    ("changes", "expected", "words"),
    [
        ([{}, BEHIND, {}], (1,), "rank 1 on host-1 is behind: data of step 7, at data/feed.py:9 take for 61 s"),
        ([{}, {"state": STOPPED}], (1,), "rank 1 on host-1 is stopped"),
        ([BEHIND, {"state": STOPPED}], (1,), "is stopped"),
        ([{}, {}, {"state": SILENT}], (2,), "gives no sign of life"),
        ([BEHIND, BEHIND, {}], (0, 1), "rank 0 on host-0 (and 1 more: 1) is behind"),
        ([BEHIND | {"state": KERNEL}, {}], (0,), "blocked in the kernel"),
        ([{}, {"collective": "", "place": "x.py:1 compute"}], (1,), "does not come"),
        ([{}, {}], (0, 1), "all ranks wait in backward of step 7, in all_reduce"),
        ([{}, {"collective": "barrier", "place": "y.py:3 f"}, {}], (1,), "do not match"),
        ([{}, {"collective": "barrier", "place": "y.py:3 f"}], (0, 1), "in barrier called at y.py:3 f"),
        ([{}, {"marks": 49, "collective": "barrier", "place": "y.py:3 f"}], (1,), "do not match"),
        ([{"collective": "", "place": "x.py:1 compute"}], (0,), "does not move"),
    ],
)
def test_blame(changes, expected, words):
    found, sentence = blamed(*changes)
    assert found == expected
    assert words in sentence


def test_where_the_others_wait_is_said():
    assert "; rank 1 waits in backward of step 7, in all_reduce called at zero" in blamed(BEHIND, {})[1]


DUMP = """Thread 0x00007f06a3cff6c0 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 327 in wait
  File "/x/trainer/data/feed.py", line 201 in _run

Current thread 0x00007f06f0448b80 (most recent call first):
  File "/v/torch/distributed/distributed_c10d.py", line 3252 in all_reduce
  File "/v/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/v/deepspeed/comm/torch.py", line 290 in all_reduce
  File "/v/deepspeed/runtime/zero/stage_1_and_2.py", line 2384 in allreduce_bucket
  File "/x/steadfast.py", line 50 in <module>
"""


def test_the_collective_and_its_caller_are_found_in_the_stacks():
    assert read_stacks(DUMP) == ("all_reduce", "zero/stage_1_and_2.py:2384 allreduce_bucket")


def test_without_a_collective_the_place_is_that_of_the_main_thread():
    outside = DUMP.replace("distributed_c10d.py", "tensor.py")
    assert read_stacks(outside) == ("", "distributed/tensor.py:3252 all_reduce")
    assert read_stacks("") == ("", "")
