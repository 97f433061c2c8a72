"""The judgement of a preflight, from facts alone: what is wrong is found, named and given its exit code."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.bounded import Overdue, bounded
from launch.contract import resolve, world_of_step
from launch.doctor import judge_probe
from launch.preflight import expect, facts
from launch.preflight.facts import UNLIMITED, Gpu, HostFacts, file_system_of, parse_gpus
from launch.preflight.findings import Finding, bad_hosts, error, exit_code, ok, warning
from launch.preflight.judge_host import judge_host
from launch.preflight.judge_run import judge_run, judge_time, ranks_as_text
from launch.preflight.reports import Attendance, Expected, Probe, RankFacts, RankResult, Requirements
from launch.preflight.requirements import read_requirements
from launch.preflight.show import as_json, as_lines
from trainer.config.load import load_config
from trainer.errors import UsageError
from trainer.world import World

ROOT = Path(__file__).resolve().parents[2]
NEEDS = Requirements(
    tested={"torch": "2.13.0", "deepspeed": "0.19.8"}, oldest={"python": "3.11", "torch": "2.10", "deepspeed": "0.19.5"}
)
GPU = Gpu(
    index=0, name="H100", driver="570.1", total_gib=80.0, used_gib=0.5, uncorrected_errors=0, celsius=40
)  # fmt: skip
HOST = HostFacts(
    host="node0", node="node0", own_addresses=["10.0.0.10"], interfaces=["eth0", "ib0"], has_rdma=False,
    python="3.11.7", versions={"torch": "2.13.0+cu126", "deepspeed": "0.19.8"}, cores=16, threads=2, memory_gib=500.0,
    free_memory_gib=480.0, limits={"nofile": 65536, "memlock": UNLIMITED, "nproc": UNLIMITED}, shm_gib=250.0,
    free_shm_gib=250.0, directory="/home/me", file_system="nfs4", free_disk_gib=900.0, gpus=[], gpu_files=0,
    gpu_problem="", compiler="/usr/bin/c++", socket_interface="",
)  # fmt: skip
EXPECTED = Expected(ranks_per_host=2)


def host(**changes: Any) -> HostFacts:
    return HOST.model_copy(update=changes)


def limits(**changes: int) -> dict[str, int]:
    return HOST.limits | changes


def rank(number: int, *, on: HostFacts | None = None, **changes: Any) -> RankFacts:
    """Two ranks a host, node0, node1, ..."""
    node = f"node{number // 2}"
    usual = RankFacts(
        rank=number, world_size=6, local_rank=number % 2, local_world_size=2, pid=100 + number, master="node0:2000",
        master_addresses=["10.0.0.10"], code="c0de", config="cf", device="cpu", visible_gpus=0, missing_inputs=[],
        run_dir="/shared/run", run_dir_file_system="lustre", run_dir_free_gib=1000.0, run_dir_problem="",
        host=on or host(host=node, node=node),
    )  # fmt: skip
    return usual.model_copy(update=changes)


def result(**changes: Any) -> RankResult:
    done = Probe(stage="done", import_seconds=3.0, torch="2.13.0", device="cpu", gloo_gib_per_second=1.5)
    return RankResult(nonce="seen", clock_skew=0.01, probe=done).model_copy(update=changes)


def attended(*special: RankFacts, results: dict[int, RankResult] | None = None, **absence: Any) -> Attendance:
    """Three hosts with two ranks each; `special` facts and `results` stand for those of their ranks."""
    reports = {number: rank(number) for number in range(6)} | {facts.rank: facts for facts in special}
    missing = {*absence.get("absent", ()), *absence.get("unreachable", ())}
    seen = {number: result() for number in range(6)} | (results or {})
    return Attendance(
        reports={number: facts for number, facts in reports.items() if number not in missing},
        results={number: found for number, found in seen.items() if number not in missing},
        **absence,
    )


def troubles(attendance: Attendance, expected: Expected = EXPECTED) -> list[tuple[str, str, str, int]]:
    return [
        (finding.level, finding.host, finding.fact, finding.code)
        for finding in judge_run(attendance, expected, NEEDS)
        if finding.level != "ok"
    ]


def test_a_good_host_gets_only_good_news() -> None:
    findings = judge_host(HOST, NEEDS, ranks=8, several=True)
    assert {finding.level for finding in findings} == {"ok"}
    assert {finding.host for finding in findings} == {"node0"}
    assert [finding.check for finding in findings][:3] == ["python", "torch", "deepspeed"]
    assert exit_code(findings) == 0


@pytest.mark.parametrize(
    ("changes", "level", "check", "fragment", "code"),
    [
        ({"python": "3.10.12"}, "error", "python", "Python 3.10.12 is older than 3.11", 2),
        ({"versions": {"torch": "2.13.0"}}, "error", "deepspeed", "deepspeed is not installed", 66),
        (
            {"versions": {"torch": "2.9.1", "deepspeed": "0.19.8"}},
            "error",
            "torch",
            "torch 2.9.1 is older than 2.10",
            2,
        ),
        ({"versions": {"torch": "2.14.0", "deepspeed": "0.19.8"}}, "warning", "torch", "is not the tested 2.13.0", 0),
        ({"versions": {"torch": "2.13.1", "deepspeed": "0.19.8"}}, "ok", "torch", "2.13.1 (tested with 2.13.0)", 0),
        ({"threads": 16}, "warning", "cores", "2 rank(s) x 16 thread(s) on 16 cores", 0),
        ({"free_memory_gib": 1.5}, "warning", "memory", "1.5 of 500.0 GiB free for 2 rank(s)", 0),
        ({"free_disk_gib": None}, "error", "disk", "the file system of /home/me does not answer", 69),
        ({"free_disk_gib": 0.5}, "warning", "disk", "512 MiB free in /home/me (nfs4)", 0),
        ({"free_shm_gib": None}, "error", "/dev/shm", "there is no /dev/shm", 73),
        ({"shm_gib": 0.0625, "free_shm_gib": 0.0625}, "warning", "/dev/shm", "64 MiB of 64 MiB free", 0),
        ({"free_shm_gib": 0.01}, "error", "/dev/shm", "10 MiB of 250.0 GiB free", 73),
        ({"limits": limits(nofile=256)}, "error", "open files", "ulimit -n is 256", 2),
        ({"limits": limits(nofile=1024)}, "warning", "open files", "ulimit -n is 1024", 0),
        ({"limits": limits(nproc=500)}, "warning", "processes", "ulimit -u is 500", 0),
        ({"limits": limits(memlock=65536)}, "ok", "locked memory", "65,536 bytes", 0),
        ({"limits": limits(memlock=65536), "has_rdma": True}, "warning", "locked memory", "ulimit -l is 64 KiB", 0),
        ({"own_addresses": []}, "error", "own name", "node0 cannot resolve its own name", 69),
        ({"own_addresses": ["127.0.1.1"]}, "error", "own name", "node0 takes its own name for 127.0.1.1", 69),
        ({"own_addresses": ["127.0.1.1"], "socket_interface": "ib0"}, "ok", "own name", "GLOO_SOCKET_IFNAME=ib0", 0),
        ({"gpu_problem": "nvidia-smi: No devices"}, "error", "GPUs", "No devices", 69),
        ({"gpu_files": 8}, "ok", "GPUs", "8 device files, but no nvidia-smi", 0),
        ({"gpus": [GPU]}, "ok", "GPU 0", "H100, driver 570.1, 512 MiB of 80.0 GiB used", 0),
        ({"gpus": [GPU.model_copy(update={"uncorrected_errors": 3})]}, "error", "GPU 0", "3 uncorrected memory", 69),
        ({"gpus": [GPU.model_copy(update={"used_gib": 12.0})]}, "warning", "GPU 0", "12.0 of 80.0 GiB are in use", 0),
        ({"gpus": [GPU.model_copy(update={"celsius": 93})]}, "warning", "GPU 0", "is at 93 degrees", 0),
    ],
)
def test_each_trouble_of_a_host_is_told(
    changes: dict[str, Any], level: str, check: str, fragment: str, code: int
) -> None:
    findings = judge_host(host(**changes), NEEDS, ranks=2, several=True)
    (found,) = [finding for finding in findings if finding.check == check]
    assert (found.level, found.code) == (level, code)
    assert fragment in found.fact
    assert (found.remedy == "") == (level == "ok")
    assert all(other.level == "ok" for other in findings if other is not found)


def test_a_single_host_may_not_know_its_name() -> None:
    for changes, level in (({"own_addresses": []}, "warning"), ({"own_addresses": ["127.0.0.1"]}, "ok")):
        (found,) = [found for found in judge_host(host(**changes), NEEDS) if found.check == "own name"]
        assert found.level == level


def test_a_good_run_has_no_trouble() -> None:
    assert troubles(attended()) == []


def test_who_differs_from_most_is_named() -> None:
    assert troubles(attended(rank(2, code="0ld"), rank(3, code="0ld"))) == [
        ("error", "node1", "code is 0ld on rank 2-3, elsewhere c0de", 2)
    ]
    assert troubles(attended(rank(5, config="other"))) == [
        ("error", "node2", "configuration is other on rank 5, elsewhere cf", 2)
    ]
    # Of two equally large camps that of rank 0 is right.
    two = Attendance(
        reports={0: rank(0, world_size=2), 2: rank(2, world_size=2, code="0ld")}, results={0: result(), 2: result()}
    )
    assert troubles(two) == [("error", "node1", "code is 0ld on rank 2, elsewhere c0de", 2)]
    gpus = {node: host(host=node, node=node, gpus=[GPU]) for node in ("node0", "node1", "node2")}
    gpus["node1"] = host(host="node1", node="node1", gpus=[GPU.model_copy(update={"driver": "535.2"})])
    assert troubles(attended(*(rank(number, on=gpus[f"node{number // 2}"]) for number in (0, 2, 4)))) == [
        ("warning", "node1", "the driver is 535.2 on rank 2, elsewhere 570.1", 0)
    ]
    old = host(host="node1", node="node1", versions=HOST.versions | {"torch": "2.12.0"})
    assert troubles(attended(rank(2, on=old), rank(3, on=old))) == [
        ("error", "node1", "torch is 2.12.0 on rank 2-3, elsewhere 2.13.0+cu126", 2),
        ("warning", "node1", "torch 2.12.0 is not the tested 2.13.0", 0),
    ]


def test_who_did_not_come_is_named_with_the_reason() -> None:
    assert troubles(attended(absent={4: "node2", 5: "node2"})) == [
        ("error", "node2", "rank 4-5 on node2 did not answer", 69)
    ]
    assert troubles(attended(absent={5: ""})) == [("error", "", "rank 5 did not answer", 69)]
    assert troubles(attended(gone=frozenset({3}))) == [("error", "node1", "rank 3 ended during the preflight", 69)]
    assert troubles(attended(silent=frozenset({3}))) == [("error", "node1", "rank 3 came, then fell silent", 69)]
    assert troubles(attended(doubles=("two processes say that they are rank 1",)))[0][3] == 2


def test_why_a_rank_cannot_reach_rank_0() -> None:
    for changes, reason in (
        ({"master": "node1:2000"}, "it has MASTER_ADDR:MASTER_PORT=node1:2000, rank 0 has node0:2000"),
        ({"master_addresses": ["127.0.1.1"]}, "there node0:2000 is 127.0.1.1, that host itself"),
        ({}, "a firewall or a wrong interface stands between"),
    ):
        findings = judge_run(attended(unreachable={5: rank(5, **changes)}), EXPECTED, NEEDS)
        (found,) = [finding for finding in findings if finding.level == "error"]
        assert (found.host, found.code, found.remedy) == ("node2", 69, reason)


def test_a_loopback_master_is_refused_only_for_several_hosts() -> None:
    loopback = rank(0, master="127.0.0.1:2000", master_addresses=["127.0.0.1"])
    everybody = [rank(number, master="127.0.0.1:2000", master_addresses=["127.0.0.1"]) for number in range(6)]
    (found,) = troubles(attended(*everybody))
    assert found == ("error", "", "MASTER_ADDR=127.0.0.1 means every host itself, and there are several", 2)
    lost = {4: everybody[4], 5: everybody[5]}
    found = troubles(attended(*everybody[:4], unreachable=lost))
    assert {entry[1] for entry in found} == {""}, "leaving hosts out would not help"
    assert {entry[3] for entry in found} == {2, 69}
    alone = loopback.model_copy(update={"world_size": 1, "local_world_size": 1})
    assert troubles(Attendance(reports={0: alone}, results={0: result()})) == []
    # Debian gives a host's own name this address; others know the right one.
    named = troubles(attended(rank(0, master_addresses=["127.0.1.1"])))
    assert named == [("warning", "node0", "on its own host MASTER_ADDR=node0 is 127.0.1.1", 0)]


def test_a_run_dir_must_be_shared_and_writable() -> None:
    (found,) = troubles(attended(results={2: result(nonce="missing")}))
    assert found[:2] == ("error", "node1")
    assert "run.dir=/shared/run on node1 (lustre) has nothing of what rank 0 wrote" in found[2]
    # When nobody else sees it, no host is to blame.
    alone = {number: result(nonce="missing") for number in range(2, 6)}
    assert [entry[1] for entry in troubles(attended(results=alone))] == ["", ""]
    assert "an earlier start" in troubles(attended(results={2: result(nonce="stale")}))[0][2]
    assert troubles(attended(rank(3, run_dir_problem="cannot write x: Read-only file system"))) == [
        ("error", "node1", "cannot write x: Read-only file system", 73)
    ]
    # When rank 0 cannot write, it is not the others' fault that they see nothing.
    blind = {number: result(nonce="missing") for number in range(6)}
    (found,) = troubles(attended(rank(0, run_dir_problem="cannot write x: no space"), results=blind))
    assert found == ("error", "node0", "cannot write x: no space", 73)


def test_checkpoints_must_fit() -> None:
    for free, to_come, level in ((9.0, 1, "error"), (25.0, 3, "warning"), (25.0, 2, None), (35.0, 3, None)):
        expected = replace(
            EXPECTED, checkpoint_gib=10.0, checkpoint_source="as the newest one", checkpoints_to_come=to_come
        )
        reports = [rank(number, run_dir_free_gib=free) for number in range(6)]
        found = troubles(attended(*reports), expected)
        assert {entry[0] for entry in found} == ({level} if level else set())
        assert {entry[3] for entry in found} == ({73 if level == "error" else 0} if level else set())


def test_missing_inputs_clocks_and_gpus() -> None:
    assert troubles(attended(rank(4, missing_inputs=["data.train=out/store"]))) == [
        ("error", "node2", "there is no data.train=out/store", 66)
    ]
    assert troubles(attended(results={4: result(clock_skew=-7.25)})) == [
        ("warning", "node2", "its clock is 7.2 s behind that of rank 0", 0)
    ]
    everywhere = [rank(number, device="cuda", visible_gpus=2) for number in range(6)]
    assert troubles(attended(*everywhere)) == []
    one_each = [rank(number, device="cuda", visible_gpus=1) for number in range(6)]
    assert troubles(attended(*one_each)) == [], "Slurm may show each task its own GPU only"
    few = rank(2, device="cuda", visible_gpus=3, local_world_size=4)
    assert ("error", "node1", "4 ranks for 3 visible GPUs", 2) in troubles(
        attended(*everywhere[:2], few, *everywhere[3:])
    )


def test_the_rank_that_came_least_far_is_blamed() -> None:
    lost = result(probe=Probe(stage="joined", error="RuntimeError: Connection closed by peer"))
    broken = result(probe=Probe(stage="imported", error="its process ended with signal 11: it said nothing"))
    assert troubles(attended(results={0: lost, 1: lost, 2: broken, 3: lost, 4: lost, 5: lost})) == [
        ("error", "node1", "rank 2 stopped after 'imported': its process ended with signal 11: it said nothing", 69)
    ]
    # Those who waited for a rank that is named already are not to blame.
    waited = dict.fromkeys((0, 1, 2, 4, 5), lost)
    assert troubles(attended(results=waited, silent=frozenset({3}))) == [
        ("error", "node1", "rank 3 came, then fell silent", 69)
    ]
    # When all stop at the same place no host is to blame.
    assert {entry[1] for entry in troubles(attended(results=dict.fromkeys(range(6), lost)))} == {""}
    slow = result(probe=Probe(stage="done", import_seconds=31.0))
    assert troubles(attended(results={3: slow})) == [("warning", "node1", "importing torch took 31 s", 0)]
    nccl = result(probe=Probe(stage="done", nccl_gib_per_second=0.2))
    assert troubles(attended(results=dict.fromkeys(range(6), nccl)))[0][2] == "NCCL all-reduces 0.20 GiB/s"


@pytest.mark.parametrize(
    ("left", "save", "level"),
    [
        (None, 5.0, None),
        (3600.0, None, "ok"),
        (3600.0, 100.0, "ok"),
        (3600.0, 200.0, "warning"),
        (200.0, 1.0, "warning"),
    ],
)
def test_the_last_checkpoint_must_fit_before_the_time_limit(
    left: float | None, save: float | None, level: str | None
) -> None:
    found = judge_time(replace(EXPECTED, seconds_left=left, checkpoint_seconds=save))
    assert [finding.level for finding in found] == ([level] if level else [])


def test_the_exit_code_is_that_which_no_restart_cures() -> None:
    findings = [error("a", "", "", 69), error("b", "", "", 73), warning("c", "", ""), ok("d", "")]
    assert exit_code(findings) == 73
    assert exit_code([*findings, error("e", "", "", 2)]) == 2
    assert exit_code(findings[2:]) == 0
    assert exit_code([error("f", "", "", 70)]) == 70


def test_only_hosts_that_others_can_do_without_are_left_out() -> None:
    hosts = ["a", "b"]
    assert bad_hosts([error("x", "", "", 69, "b"), warning("y", "", "", "a")], hosts) == ["b"]
    assert bad_hosts([error("x", "", "", 69, "b"), error("x", "", "", 69, "a")], hosts) == []
    assert bad_hosts([error("x", "", "", 69)], hosts) == []


def test_a_report_has_one_line_a_host() -> None:
    attendance = attended(rank(2, code="0ld"), rank(3, code="0ld"), absent={4: "node2", 5: "node2"})
    findings = judge_run(attendance, EXPECTED, NEEDS)
    lines = as_lines(attendance, findings, 6, 3.14)
    assert lines[0].startswith(
        "node0  ok       rank 0-1, code c0de, config cf, torch 2.13.0+cu126, 16 cores, 480 GiB free"
    )
    assert lines[1].startswith("node1  error    rank 2-3, code 0ld, ")
    assert lines[2] == "node2  error    not heard of"
    assert lines[-2] == "to leave the bad hosts out: --exclude=node1,node2"
    assert lines[-1] == "preflight: not fit to train (exit code 2): 3 host(s), 6 rank(s), 3.1 s"
    sly = attended(rank(2, code="\x1b[2Jgone"))
    assert not any("\x1b" in line for line in as_lines(sly, judge_run(sly, EXPECTED, NEEDS), 6, 1.0))
    report = json.loads(as_json(attendance, findings, 3.14))
    assert (report["ok"], report["exit_code"], report["exclude"]) == (False, 2, ["node1", "node2"])
    assert Finding(**report["findings"][0]) == findings[0]


def test_ranks_are_told_in_short() -> None:
    assert ranks_as_text([3, 0, 1, 2, 7, 9, 10]) == "0-3,7,9-10"
    assert ranks_as_text([5]) == "5"


def test_what_torch_found_alone() -> None:
    good = Probe(stage="done", import_seconds=2.0, device="cpu", torch="2.13.0")
    assert judge_probe(good, gpus=0)[0].level == "ok"
    (found,) = judge_probe(good, gpus=8)
    assert (found.level, found.fact) == ("error", "torch 2.13.0 (a build without CUDA) sees none of 8 GPU(s)")
    (found,) = judge_probe(Probe(error="ImportError: libcudart.so.12"), gpus=0)
    assert found.fact == "it stopped at once: ImportError: libcudart.so.12"


def test_what_the_driver_says_of_its_gpus() -> None:
    table = (
        "0, NVIDIA H100 80GB HBM3, 570.124.06, 81559, 4, 0, 34\n"
        "1, Tesla T4, 570.124.06, 15360, 15000, [N/A], [N/A]\n"
        "garbage\n"
    )
    first, second = parse_gpus(table)
    assert (first.index, first.driver, first.uncorrected_errors, first.celsius) == (0, "570.124.06", 0, 34)
    assert first.total_gib == pytest.approx(79.65, abs=0.01)
    assert (second.name, second.uncorrected_errors, second.celsius) == ("Tesla T4", None, None)


def test_the_file_system_of_a_path() -> None:
    mounts = (
        "22 27 0:21 / / rw - ext4 /dev/sda rw\n"
        "23 22 0:22 / /home rw - autofs home rw\n"
        "24 23 0:23 / /home rw shared:1 - nfs4 server:/home rw\n"
        "25 22 0:24 / /my\\040disk rw - xfs /dev/sdb rw\n"
    )
    for place, kind in (("/tmp", "ext4"), ("/home/me", "nfs4"), ("/homes", "ext4"), ("/my disk/x", "xfs")):
        assert file_system_of(Path(place), mounts) == kind
    assert file_system_of(Path("/x"), "") == "unknown"
    assert file_system_of(Path("/proc/self")) == "proc"


def test_time_left_as_slurm_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, seconds in (("59", 59), ("1:05", 65), ("2:00:00", 7200), ("1-00:00:10", 86410)):
        assert expect.parse_time_left(f"{text}\n") == seconds
    for text in ("UNLIMITED", "INVALID", "NOT_SET", ""):
        assert expect.parse_time_left(text) is None
    assert expect.seconds_left({}) is None
    assert expect.seconds_left({"SLURM_JOB_END_TIME": str(int(time.time()) + 100)}) == pytest.approx(100, abs=2)


def test_the_size_of_a_checkpoint_before_there_is_one(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / "tiny.yaml", [f"run.dir={tmp_path}", f"data.train={tmp_path}"])
    (tmp_path / "manifest-00000001.json").write_text('{"vocabulary_size": 1000}')
    size = expect.checkpoint_bytes(config)
    assert size is not None
    # Embeddings (tied), and in each of two layers four square and three wide matrices.
    assert size[0] == 12 * (1000 * 128 + 2 * (4 * 128 * 128 + 3 * 128 * 384))
    model = tmp_path / "model"
    model.mkdir()
    header = json.dumps({
        "__metadata__": {"format": "pt"}, "a.weight": {"dtype": "BF16", "shape": [10, 20], "data_offsets": [0, 400]},
        "b": {"dtype": "BF16", "shape": [7], "data_offsets": [400, 414]},
    }).encode()  # fmt: skip
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(414))
    tuned = load_config(
        ROOT / "configs" / "tiny.yaml", [f"run.dir={tmp_path}", "model.config=null", f"model.path={model}"]
    )
    assert expect.checkpoint_bytes(tuned) == (12 * 207, "207 parameters")
    words = [f"run.dir={tmp_path}", "model.config=null", f"model.path={model}", "model.lora.rank=3"]
    for targets, parameters in (("all-linear", 90), ("[a]", 90), ("[b]", 0)):
        adapted = load_config(ROOT / "configs" / "tiny.yaml", [*words, f"model.lora.targets={targets}"])
        assert expect.checkpoint_bytes(adapted) == (12 * parameters, f"{parameters} parameters")
    assert expect.checkpoint_seconds(config) is None
    (tmp_path / "events.jsonl").write_text(
        '{"event":"commit","step":1,"seconds":3.5}\n{"event":"commit","step":2,"seconds":4.5}\n{"event":"stop"}\n'
    )
    assert expect.checkpoint_seconds(config) == 4.5


def test_the_same_code_and_configuration_have_the_same_hash(tmp_path: Path) -> None:
    tiny = ROOT / "configs" / "tiny.yaml"
    one, same, other = (load_config(tiny, words) for words in ([], ["run.seed=42"], ["run.seed=43"]))
    assert expect.config_hash(one) == expect.config_hash(same) != expect.config_hash(other)
    assert expect.code_hash() == expect.code_hash()
    assert len(expect.code_hash()) == 12
    assert expect.missing_inputs(one) == ["data.train=out/store"]


def test_the_versions_come_from_the_files_of_the_checkout() -> None:
    requirements = read_requirements()
    assert set(requirements.tested) == set(facts.PACKAGES)
    assert requirements.oldest["python"] == "3.11"
    assert requirements.oldest["torch"] == "2.10"


def test_a_task_of_srun_has_a_place_when_the_job_gives_the_master() -> None:
    step = {
        "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1",
        "SLURM_NODEID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "MASTER_ADDR": "node7", "MASTER_PORT": "2345",
    }  # fmt: skip
    assert world_of_step(step) == World(5, 7, 1, 2, "node7", 2345)
    assert world_of_step(step | {"SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3"}) == World(
        6, 7, 0, 1, "node7", 2345
    )
    for name in step:
        assert world_of_step({key: text for key, text in step.items() if key != name}) is None
    with pytest.raises(UsageError):
        resolve(step)


def test_a_call_that_does_not_return_is_given_up() -> None:
    assert bounded(lambda: 7, 5) == 7
    with pytest.raises(ZeroDivisionError):
        bounded(lambda: 1 // 0, 5)
    with pytest.raises(Overdue, match="no answer in 0 s"):
        bounded(lambda: time.sleep(5), 0.05)


def test_facts_are_those_of_this_machine() -> None:
    found = facts.host_facts({"SLURMD_NODENAME": "here", "OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": ""})
    assert (found.node, found.threads, found.gpus) == ("here", 3, [])
    assert found.host == socket.gethostname()
    assert 0 < found.free_memory_gib <= found.memory_gib
    assert found.versions["pydantic"]
    assert HostFacts.model_validate_json(found.model_dump_json()) == found
