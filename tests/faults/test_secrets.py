"""Twelve canaries: secrets that a run meets and that must be nowhere in what it leaves or says; and who may read it."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.training import settings

ROOT = Path(__file__).resolve().parents[2]
IN_VARIABLES = {
    name: f"canary{number:02d}-{name.lower().replace('_', '-')}"
    for number, name in enumerate(
        ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "WANDB_API_KEY",
         "STEADFAST_API_KEY", "DB_PASSWORD"]
    )
}  # fmt: skip
IN_TEXTS = {
    "password of a URL": "https://me:canary07-password@nobody.invalid/store",
    "name of a URL without password": "https://canary08-name@nobody.invalid/store",
    "signature": "https://nobody.invalid/store?X-Amz-Signature=canary09-signature",
    "token in a query": "https://nobody.invalid/store?token=canary10-token",
    "header": "Authorization: Bearer canary11-bearer",
}
CANARIES = [f"canary{number:02d}" for number in range(12)]


def leaks(place: Path, *outputs: str) -> list[str]:
    """Which canaries stand in which file below `place`, in its name, or in the outputs."""
    texts = {str(file): file.read_bytes() + str(file).encode() for file in place.rglob("*") if file.is_file()}
    texts |= {f"output {number}": text.encode() for number, text in enumerate(outputs)}
    # UTF-16 and so on would be another matter; base64 of a header is what proxies log.
    return [f"{canary} in {name}" for name, text in texts.items() for canary in CANARIES if canary.encode() in text]


def steadfast(*words: str, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "steadfast.py", *words], capture_output=True, text=True,
        env=os.environ | IN_VARIABLES | environ,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run_of_canaries(tmp_path_factory, store):
    """A run that trains and one that fails, with secrets in the configuration and on the command line."""
    place = tmp_path_factory.mktemp("canaries")
    run = place / "run"
    values = settings(run, store.path, train__max_steps=2, checkpoint__every_steps=1, logging__tensorboard=True)
    values["data"]["cache_dir"] = "-".join(IN_VARIABLES.values())
    config = place / "c.yaml"
    config.write_text(yaml.safe_dump(values))
    url = "https://me:canary07-password@nobody.invalid/store?X-Amz-Signature=canary09-signature&token=canary10-token"
    outputs = []
    for words, codes in (
        ([], [0]),
        ([f"data.eval={url}", "data.cache_dir=/nonexistent/x", "--traceback"], [66, 69, 73]),
        ([f"train.max_steps={IN_TEXTS['header']}"], [2]),
    ):
        done = steadfast("train", str(config), *words)
        assert done.returncode in codes, done.stderr
        outputs += [done.stdout, done.stderr]
    return run, outputs


def test_no_canary_is_left_anywhere(run_of_canaries):
    run, outputs = run_of_canaries
    assert [*run.glob("errors/rank-0.txt")], "no crash report was written"
    assert [*run.glob("tensorboard/*")]
    assert "[redacted]" in "".join(outputs), "no secret ever came near the output"
    assert "[redacted]" in (run / "events.jsonl").read_text() + (run / "config.yaml").read_text()
    assert leaks(run, *outputs) == []


def test_no_canary_is_printed_by_commands_that_show_a_configuration(tmp_path, store):
    config = tmp_path / "c.yaml"
    values = settings(tmp_path / "run", store.path, data__cache_dir="/x")
    for number, text in enumerate([*IN_TEXTS.values(), *IN_VARIABLES.values()]):
        values["data"]["eval"] = f"{text} "
        config.write_text(yaml.safe_dump(values))
        for words in (["show"], ["show", "--json"]) if number % 4 == 0 else (["show"],):
            done = steadfast("config", *words, str(config), "--traceback")
            assert "[redacted]" in done.stdout
            assert leaks(tmp_path / "nothing", done.stdout, done.stderr) == []


def test_the_canaries_would_be_found(tmp_path):
    (tmp_path / "x").write_text(IN_TEXTS["header"])
    assert leaks(tmp_path, "canary03") == [f"canary11 in {tmp_path / 'x'}", "canary03 in output 0"]


def test_a_run_is_private_and_shared_only_when_asked(run_of_canaries, tmp_path, store):
    run, _ = run_of_canaries
    for path in [run, *run.rglob("*")]:
        allowed = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        assert stat.S_IMODE(path.stat().st_mode) & ~allowed & 0o777 == 0, path
    config = tmp_path / "c.yaml"
    values = settings(tmp_path / "run", store.path, train__max_steps=1, run__share_with_group=True)
    config.write_text(yaml.safe_dump(values))
    assert steadfast("train", str(config)).returncode == 0
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o2770
    for path in (tmp_path / "run").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & 0o007 == 0, path
        assert mode & 0o060 == 0o060, path
