"""Ray without a cluster: what is submitted, whom we talk to, what ranks inherit, the manifest for Kubernetes."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from launch import command
from launch.contract import LAUNCHER_PID, VARIABLES
from launch.places import place_of, reference_of
from launch.ray import api, place
from launch.ray.hosts import forwarded, host_environment, reason
from launch.ray.run import _asked_by, _require_shared, submission_id
from launch.ray.submit import RayPlan, job_name, plan_ray
from launch.supervise import Ending
from trainer.checkout import ROOT
from trainer.cli import parse
from trainer.errors import PeerLostError, UsageError
from trainer.run_directory import RunDirectory

TINY = ROOT / "configs" / "tiny.yaml"
API = "http://head:8265"


def plan(config: str = "my config.yaml", directory: str = "/shared/it's here", **environ: str) -> RayPlan:
    return plan_ray(
        Path(config), ["run.seed=1", "model.dtype=a b"], run_dir=Path("runs/x"), address=API, nodes=2,
        ranks_per_node=8, gpus_per_node=4, environ=environ, directory=directory, show_traceback=True,
    )  # fmt: skip


def test_the_entrypoint_is_the_driver_in_our_directory() -> None:
    words = shlex.split(plan().entrypoint)
    assert words[:3] == ["cd", "/shared/it's here", "&&"]
    assert words[3:8] == ["exec", sys.executable, str(ROOT / "steadfast.py"), "launch", "ray"]
    assert words[8:11] == ["my config.yaml", "run.seed=1", "model.dtype=a b"]
    assert words[11:] == ["--nodes", "2", "--ranks-per-node", "8", "--gpus-per-node", "4", "--traceback"]
    parser = argparse.ArgumentParser()
    command.configure(parser)
    arguments = parse(parser, [word for word in words[7:] if word != "--traceback"])
    assert (arguments.place, arguments.address, arguments.nodes, arguments.ranks_per_node) == ("ray", None, 2, 8)
    assert arguments.overrides == ["run.seed=1", "model.dtype=a b"]


def test_a_shell_understands_the_entrypoint(tmp_path: Path) -> None:
    place = tmp_path / "it's here"
    place.mkdir()
    shown = plan(directory=str(place), SFT_PYTHON="printf '%s\\n' $PWD").entrypoint
    done = subprocess.run(shown, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # A word that looks like a variable is a word.
    assert done.stdout.splitlines()[:2] == ["$PWD", str(ROOT / "steadfast.py")]


def test_the_python_of_the_cluster_may_be_another() -> None:
    words = shlex.split(plan(SFT_PYTHON="apptainer exec i.sif python3").entrypoint)
    assert words[4:9] == ["apptainer", "exec", "i.sif", "python3", str(ROOT / "steadfast.py")]


def test_variables_go_along_but_no_token() -> None:
    submitted = plan(NCCL_DEBUG="INFO", HF_TOKEN="hidden", RAY_AUTH_TOKEN="hidden", HOME="/h")
    assert submitted.request()["runtime_env"] == {"env_vars": {"NCCL_DEBUG": "INFO"}}
    assert "hidden" not in json.dumps(submitted.request()) + "".join(submitted.lines())
    assert plan().request()["runtime_env"] == {}


def test_a_dry_run_prints_what_would_be_submitted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in (*VARIABLES, "RAY_ADDRESS", "SFT_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    # Nobody is asked: the name does not even exist.
    words = ["ray", str(TINY), "--address", "http://nobody.invalid:8265", "--nodes", "2", f"run.dir={tmp_path}/run"]
    assert run(*words, "--dry-run", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["entrypoint"].startswith(f"cd {Path.cwd()} && exec ")
    assert shown["address"] == "http://nobody.invalid:8265"
    assert run(*words, "--dry-run") == 0
    text = capsys.readouterr().out
    assert f"entrypoint: {shown['entrypoint']}\n" in text
    assert f"metadata: steadfast_run={tmp_path}/run" in text
    monkeypatch.setenv("RAY_ADDRESS", "https://head:8265")
    assert run("ray", str(TINY), "--dry-run") == 0
    assert "submit to: https://head:8265" in capsys.readouterr().out
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert run("ray", str(TINY), "--dry-run") == 0
    assert "address: 10.0.0.1:6379" in capsys.readouterr().out, "inside a job we are the driver"
    assert not (tmp_path / "run").exists()


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    arguments = parse(parser, words)
    arguments.traceback = False
    return command.run(arguments)


def test_ids_of_jobs_are_new_and_safe_in_addresses() -> None:
    names = {job_name(Path("runs/mit Umlaut ä/über 7b")) for _ in range(20)}
    assert len(names) == 20
    assert all(re.fullmatch(r"ber-7b-[0-9a-f]{8}", name) for name in names), names
    assert job_name(Path("..")).startswith("run-")


@pytest.mark.parametrize(
    ("address", "is_api", "is_loopback"),
    [
        ("http://10.0.0.1:8265", True, False),
        ("https://ray.example.org", True, False),
        ("http://127.0.0.1:8265", True, True),
        ("http://localhost:8265/", True, True),
        ("http://[::1]:8265", True, True),
        ("http://127.0.0.1.example.org:8265", True, False),
        ("http://localhost.example.org", True, False),
        ("10.0.0.1:6379", False, False),
        ("127.0.0.1:6379", False, True),
        ("auto", False, False),
        (None, False, False),
    ],
)
def test_kinds_of_addresses(address: str | None, is_api: bool, is_loopback: bool) -> None:
    assert api.is_api(address) == is_api
    assert api.is_loopback(address or "") == is_loopback


def test_where_a_token_is_looked_for(tmp_path: Path) -> None:
    assert not api.has_token({}, tmp_path)
    assert api.has_token({"RAY_AUTH_TOKEN": "x"}, tmp_path)
    assert not api.has_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "absent")}, tmp_path)
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("x")
    assert api.has_token({}, tmp_path)
    assert api.has_token({"RAY_AUTH_TOKEN_PATH": str(token)}, tmp_path / "other")
    assert not api.has_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "absent")}, tmp_path), "Ray looks nowhere else then"


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    """An HTTP server whose `status` is its answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(found.status)  # type: ignore[attr-defined]
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    found = HTTPServer(("127.0.0.1", 0), Handler)
    asked: list[tuple[str, str | None]] = []
    found.asked = asked  # type: ignore[attr-defined]
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def test_whether_a_cluster_is_open_is_asked_without_a_token(
    server: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    for status, asks in ((401, True), (403, True), (200, False)):
        server.status = status  # type: ignore[attr-defined]
        assert api.asks_for_token(f"{address}/") == asks
    assert server.asked == [("/api/jobs/", None)] * 3  # type: ignore[attr-defined]
    server.status = 404  # type: ignore[attr-defined]
    with pytest.raises(PeerLostError, match="answers 404"):
        api.asks_for_token(address)
    with pytest.raises(PeerLostError, match=r"no job API of Ray answers at http://nobody\.invalid:1"):
        api.asks_for_token("http://nobody.invalid:1")


def test_open_clusters_are_refused_unless_they_are_ours_or_allowed() -> None:
    api.refuse_open("http://10.0.0.1:8265", allowed=True)
    api.refuse_open("http://127.0.0.1:8265", allowed=False)
    with pytest.raises(UsageError, match=r"asks for no token.*--allow-unauthenticated"):
        api.refuse_open("http://10.0.0.1:8265", allowed=False)


def test_a_connection_without_a_token_means_an_open_cluster(server: HTTPServer) -> None:
    address = f"http://127.0.0.1:{server.server_port}"
    for environ, own_api, status, refused in (
        ({}, "", 0, True),
        ({"RAY_AUTH_MODE": "disabled"}, "", 0, True),
        ({"RAY_AUTH_MODE": "token"}, "", 0, False),
        ({"RAY_AUTH_MODE": "token"}, address, 401, False),
        ({"RAY_AUTH_MODE": "token"}, address, 200, True),
    ):
        server.status = status  # type: ignore[attr-defined]
        with pytest.raises(UsageError) if refused else nullcontext():
            api.refuse_open_cluster("10.0.0.1:6379", own_api, environ, allowed=False)


def test_a_missing_token_is_known_before_ray_is_imported(
    server: HTTPServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.status = 401  # type: ignore[attr-defined]
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match="asks for a token, and there is none; put the token"):
        api.connect(f"http://127.0.0.1:{server.server_port}", allow_unauthenticated=False)


def test_the_driver_knows_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, job in (
        ('{"metadata": {"job_submission_id": "x-1"}, "runtime_env": {}}', "x-1"),
        ('{"metadata": {}}', ""),
        ("no json", ""),
    ):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", text)
        assert submission_id() == job
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert submission_id() == ""


def test_who_ended_an_attempt() -> None:
    assert _asked_by(Ending(75, "SIGTERM"), lost_node=False) == "person"
    assert _asked_by(Ending(69, "SIGTERM"), lost_node=True) == "person"
    assert _asked_by(Ending(69), lost_node=True) == "scheduler", "a node that is gone is no crash of ours"
    assert _asked_by(Ending(69), lost_node=False) == "nobody"
    assert _asked_by(Ending(65), lost_node=True) == "nobody"


def test_a_run_directory_of_which_every_node_has_its_own_is_refused() -> None:
    unpacked = Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0f")
    with pytest.raises(UsageError, match=r"run\.dir=runs/x lies in the job's working directory"):
        _require_shared(Path("runs/x"), unpacked)
    _require_shared(Path("/shared/runs/x"), unpacked)
    _require_shared(Path("runs/x"), Path("/home/me"))


def test_ranks_of_other_nodes_get_the_settings_of_libraries_but_no_secret() -> None:
    environ = {
        "NCCL_DEBUG": "INFO", "HF_HOME": "/h", "TORCH_NCCL_X": "1", "DS_ACCELERATOR": "cpu", "CUDA_HOME": "/c",
        "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "2", "PYTORCH_CUDA_ALLOC_CONF": "x", "STEADFAST_X": "1",
    }  # fmt: skip
    kept_here = {
        "CUDA_VISIBLE_DEVICES": "0", "HF_TOKEN": "s", "STEADFAST_API_KEY": "s", "DS_PASSWORD": "s", "HOME": "/h",
        "NCCL_SECRET_X": "s", "HF_hub_token": "s", LAUNCHER_PID: "7", "TORCHELASTIC_RUN_ID": "r",
    }  # fmt: skip
    assert forwarded(environ | kept_here) == environ


def test_ranks_inherit_their_node_but_not_the_token_of_the_cluster() -> None:
    inherited = host_environment(
        {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0", "RAY_AUTH_TOKEN": "s", "RAY_JOB_ID": "1", "OMP_NUM_THREADS": "1"}
    )
    assert inherited == {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0"}


def test_the_reason_of_an_error_of_ray_is_one_short_line() -> None:
    long = "The actor died unexpectedly before finishing this task.\n\tip: 10.0.0.2\n"
    long += "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail"
    assert reason(ValueError(long)) == "ValueError: The actor is dead because its worker process has died"
    assert reason(ValueError("")) == "ValueError: "


def test_a_run_on_ray_is_found_again(tmp_path: Path) -> None:
    found = RunDirectory(tmp_path)
    found.launched.write_text('{"place": "ray", "job": "x", "api": "", "cluster": "10.0.0.1:6379"}')
    reference = reference_of(found)
    assert place_of(reference) is place
    assert place.state(reference) == "Ray driver x in the cluster 10.0.0.1:6379: started by hand, see its terminal"


def test_a_cluster_that_is_gone_is_a_state_and_no_error(server: HTTPServer) -> None:
    address = f"http://127.0.0.1:{server.server_port}"
    server.status = 503  # type: ignore[attr-defined]
    state = place.state({"place": "ray", "job": "x", "api": address, "cluster": ""})
    assert state.startswith(f"Ray job x at {address}: not known any more (")
