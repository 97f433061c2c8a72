"""Who is to blame for a hang: a pure judgement over what was seen of every rank. Standard library only.

All ranks pass the same phases in the same order, so the number of phases that each has begun (`marks`) can be compared:
whoever waits in a collective has begun at least as many as the rank it waits for. Only when the numbers say nothing is
the place in the stacks asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

STOPPED, SILENT, KERNEL, RUNNING = "stopped", "silent", "blocked in the kernel", "running"


@dataclass(frozen=True)
class Sighting:
    """What was last seen of a rank."""

    rank: int
    host: str
    marks: int
    """Phases begun since the start."""
    phase: str
    step: int
    age: float
    """Seconds since the phase began."""
    state: str
    """STOPPED, KERNEL, RUNNING; SILENT: nothing was heard of its watchdog either."""
    collective: str = ""
    """The collective in which a thread of it is, if any."""
    place: str = ""
    """Where that was called, or where the main thread is, e.g. trainer/collectives.py:66 add_up."""

    @property
    def where(self) -> str:
        """Phase, step and what is known beyond."""
        inside = f", in {self.collective} called at {self.place}" if self.collective else ""
        inside = inside or (f", at {self.place}" if self.place else "")
        return f"{self.phase}{f' of step {self.step}' if self.step else ''}{inside}"


@dataclass(frozen=True)
class Verdict:
    """The ranks that hold up the run, and one sentence about them."""

    ranks: tuple[int, ...]
    sentence: str


def judge(seen: Sequence[Sighting]) -> Verdict:
    """Blame a hang. `seen` has every rank once."""
    for state, words in (
        (STOPPED, "is stopped (SIGSTOP, a debugger or the scheduler)"),
        (SILENT, "gives no sign of life (its host, or the file system there, hangs)"),
    ):
        if found := [sighting for sighting in seen if sighting.state == state]:
            return _verdict(found, seen, words)
    fewest = min(sighting.marks for sighting in seen)
    behind = [sighting for sighting in seen if sighting.marks == fewest]
    if len(behind) == len(seen):
        return _judge_abreast(seen)
    if any(sighting.collective for sighting in behind):
        ahead = [sighting for sighting in seen if sighting.marks != fewest and sighting.collective]
        if {_call(sighting) for sighting in ahead} - {_call(sighting) for sighting in behind}:
            return _mismatch(behind, seen)
    return _verdict(behind, seen, "is behind")


def read_stacks(text: str) -> tuple[str, str]:
    """(collective, place) from a faulthandler dump of all threads; empty strings when there is none.

    The collective is that of the first thread that is in one. Without one the place is where the main thread is, which
    the dump names last.
    """
    threads = [_frames(block) for block in re.split(r"^(?:Current t|T)hread 0x.*$", text, flags=re.MULTILINE)]
    threads = [frames for frames in threads if frames]
    for frames in threads:
        for index, (file, _, function) in enumerate(frames):
            if file.endswith("torch/distributed/distributed_c10d.py") and not function.startswith("_"):
                outside = [frame for frame in frames[index:] if "/torch/distributed/" not in frame[0]]
                outside = [frame for frame in outside if "/deepspeed/comm/" not in frame[0]] or outside
                return function, _place(outside[0]) if outside else ""
    return "", _place(threads[-1][0]) if threads else ""


def _judge_abreast(seen: Sequence[Sighting]) -> Verdict:
    waiting = [sighting for sighting in seen if sighting.collective]
    if waiting and len(waiting) < len(seen):
        return _verdict([sighting for sighting in seen if not sighting.collective], seen, "does not come")
    if len(calls := sorted({_call(sighting) for sighting in waiting})) > 1:
        # The side with fewer ranks; with two equal sides all are named.
        sizes = {call: sum(_call(sighting) == call for sighting in seen) for call in calls}
        smallest = min(sizes.values())
        return _mismatch([sighting for sighting in seen if sizes[_call(sighting)] == smallest], seen)
    if waiting and len(seen) > 1:
        return Verdict(
            tuple(sighting.rank for sighting in seen),
            f"all ranks wait in {seen[0].where} for {_seconds(seen)}: the network or a device hangs",
        )
    return _verdict(seen, seen, "does not move")


def _mismatch(found: Sequence[Sighting], seen: Sequence[Sighting]) -> Verdict:
    others = [sighting for sighting in seen if sighting not in found]
    shown = [*found[:2], *others[:2]]
    places = "; ".join(f"rank {sighting.rank} on {sighting.host}: {sighting.where}" for sighting in shown)
    return Verdict(
        tuple(sighting.rank for sighting in found),
        f"the ranks wait in collectives that do not match, for {_seconds(seen)}: {places}",
    )


def _verdict(found: Sequence[Sighting], seen: Sequence[Sighting], words: str) -> Verdict:
    first = found[0]
    who = f"rank {first.rank} on {first.host}"
    if len(found) > 1:
        who += f" (and {len(found) - 1} more: {', '.join(str(one.rank) for one in found[1:9])})"
    others = [sighting for sighting in seen if sighting not in found]
    rest = f"; rank {others[0].rank} waits in {others[0].where}" if others else ""
    kernel = ", blocked in the kernel (disk, network file system or driver)" if first.state == KERNEL else ""
    return Verdict(
        tuple(sighting.rank for sighting in found), f"{who} {words}: {first.where} for {_seconds(found)}{kernel}{rest}"
    )


def _call(sighting: Sighting) -> str:
    return f"{sighting.collective} {sighting.place}"


def _seconds(found: Sequence[Sighting]) -> str:
    return f"{max(sighting.age for sighting in found):.0f} s"


def _frames(block: str) -> list[tuple[str, str, str]]:
    return re.findall(r'^  File "(.*)", line (\d+) in (.*)$', block, flags=re.MULTILINE)


def _place(frame: tuple[str, str, str]) -> str:
    file, line, function = frame
    return f"{'/'.join(file.split('/')[-2:])}:{line} {function}"
