"""From raw text to an answer over HTTP, with the commands of the README and nothing else."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from steadfast import COMMANDS
from tests.support.corpora import alpaca_rows, sharegpt_rows, write_json
from trainer.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]


def steadfast(*words, cwd, code=0):
    done = subprocess.run(
        [sys.executable, str(ROOT / "steadfast.py"), *map(str, words)], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == code, f"{words} gave {done.returncode}:\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """A directory in which every command of the line ran once: out/tok, out/store, runs/tiny, out/model, out/int8."""
    place = tmp_path_factory.mktemp("line")
    write_json(place / "alpaca.json", alpaca_rows(150, longest=25))
    write_json(place / "tools.json", sharegpt_rows(40))
    steadfast("tokenizer", "train", "--input", "alpaca.json", "--vocab-size", 330, "-o", "out/tok", cwd=place)
    inputs = ("--input", "alpaca.json", "--input", "tools.json")
    steadfast(
        "data", "build", *inputs, "--tokenizer", "out/tok", "--sequence-length", 256, "-o", "out/store", cwd=place
    )
    tiny = (ROOT / "configs/tiny.yaml", "data.train=out/store", "engine.deepspeed=zero3")
    steadfast("train", *tiny, "train.max_steps=6", "--nproc", 2, cwd=place)
    steadfast("train", *tiny, "train.max_steps=12", "--nproc", 2, cwd=place)
    steadfast("export", "runs/tiny", "out/model", "--verify", cwd=place)
    steadfast("quantize", "out/model", "out/int8", "--scheme", "int8", cwd=place)
    return place


def test_training_resumed_and_everything_was_written_down(line):
    run = line / "runs/tiny"
    events = [json.loads(text)["event"] for text in (run / "events.jsonl").read_text().splitlines()]
    assert events == [
        "launch", "start", "commit", "done", "end", "launch", "resume", "commit", "commit", "done", "end",
    ]  # fmt: skip
    metrics = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in metrics if "train/loss" in entry]
    assert steps == list(range(1, 13))
    wanted = {"train/loss", "train/grad_norm", "train/learning_rate", "throughput/tokens_per_second"}
    assert wanted | {"memory/peak_gib", "time/data_wait_ms"} <= metrics[0].keys()
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["loss_last"] < outcome["loss_first"]
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["max_steps"] == 12


def test_tensorboard_reads_the_curves_and_none_is_doubled(line):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator(str(line / "runs/tiny/tensorboard"))
    curves.Reload()
    assert [point.step for point in curves.Scalars("train/loss")] == list(range(1, 13))


def test_plain_transformers_loads_the_export(line):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(line / "out/model")
    tokenizer = AutoTokenizer.from_pretrained(line / "out/model")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "red"}], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == "<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n"
    assert model.config.vocab_size == len(tokenizer)
    proof = json.loads((line / "out/model/proof.json").read_text())
    assert proof["tensors"] == len(dict(model.named_parameters()))
    assert proof["logit_max_diff"] <= 1e-4


def test_inspect_shows_what_is_supervised(line):
    rows = json.loads(steadfast("data", "inspect", "out/store", "--rows", 3, "--json", cwd=line).stdout)["shown"]
    assert len(rows) == 3
    sample = rows[0]["samples"][0]
    assert "<|im_start|>assistant" in sample["text"]
    shown = steadfast("data", "inspect", "out/store", "--rows", 1, cwd=line).stdout
    assert re.search(r"<\|im_start\|>assistant\n⟦.+<\|im_end\|>⟧", shown, re.DOTALL)


def test_the_quantised_model_answers_over_http(line):
    from openai import OpenAI

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["serve", "out/int8", "--port", str(port), "--api-key", "KEY"]
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "steadfast.py"), *words], cwd=line, stdout=subprocess.PIPE, text=True
    )
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="KEY", max_retries=100)
        deadline = time.monotonic() + 60
        while not any(f":{port}" in text for text in iter(server.stdout.readline, "")):
            assert time.monotonic() < deadline
        model = client.models.list().data[0].id
        reply = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "say 7: red"}], max_tokens=4, temperature=0
        )
        assert reply.usage.completion_tokens <= 4
        assert reply.choices[0].finish_reason in ("stop", "length")
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=40) == 0


def test_torchrun_starts_the_same_ranks(line):
    torchrun = Path(sys.executable).parent / "torchrun"
    command = [torchrun, "--standalone", "--nproc-per-node", "2", ROOT / "steadfast.py", "train"]
    changes = ["data.train=out/store", "run.dir=runs/torchrun", "train.max_steps=6", "engine.deepspeed=zero3"]
    done = subprocess.run(
        [*map(str, command), str(ROOT / "configs/tiny.yaml"), *changes], cwd=line, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first = json.loads((line / "runs/tiny/metrics.jsonl").read_text().splitlines()[0])
    again = json.loads((line / "runs/torchrun/metrics.jsonl").read_text().splitlines()[0])
    assert again["train/loss"] == first["train/loss"]


def test_nothing_was_compiled(line, tmp_path):
    """DeepSpeed builds operators on first use unless told not to; a CPU run must need no compiler at all."""
    cache = tmp_path / "extensions"
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(cache), "CXX": "/bin/false", "CC": "/bin/false"}
    words = ["data.train=out/store", f"run.dir={tmp_path / 'run'}", "train.max_steps=1", "--nproc", "2"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "steadfast.py"), "train", str(ROOT / "configs/tiny.yaml"), *words],
        cwd=line,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not cache.exists()


def test_a_short_demo(tmp_path):
    done = steadfast("demo", "--steps", 150, "--out", tmp_path / "demo", cwd=ROOT)
    assert "asking the run to stop" in done.stdout
    assert "resuming at step" in done.stdout
    outcome = json.loads((tmp_path / "demo/outcome.json").read_text())
    assert {"exact_match", "logit_max_diff", "loss_first", "loss_last", "tokens_per_second"} <= outcome.keys()
    assert outcome["loss_last"] < outcome["loss_first"] / 2
    assert outcome["logit_max_diff"] <= 1e-4


def readme_blocks():
    return re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readme_names_real_commands_and_a_valid_configuration():
    text = "\n".join(readme_blocks()).replace("\\\n", "")
    named = {shlex.split(line, comments=True)[1] for line in text.splitlines() if line.startswith("steadfast ")}
    assert {"data", "config", "train", "export", "serve"} <= named <= COMMANDS.keys()
    recipe = re.search(r"cat > my.yaml <<'EOF'\n(.*?)EOF", text, re.DOTALL)[1]
    assert Config.model_validate(yaml.safe_load(recipe)).engine.deepspeed == "zero3-offload-cpu"
    targets = re.findall(r"^make (\w+)", text, re.MULTILINE)
    assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in targets)


HEAVY = {
    *(
        "torch",
        "deepspeed",
        "transformers",
        "tokenizers",
        "datasets",
        "ray",
        "tensorboard",
        "safetensors",
        "accelerate",
    ),
    *("pyarrow", "pandas", "scipy", "sklearn", "fsspec", "aiohttp", "requests", "fastapi", "uvicorn", "jinja2"),
}


@pytest.mark.parametrize("name", [[], *[[name] for name in COMMANDS]])
def test_help_imports_nothing_heavy(name):
    """What makes --help answer at once on a busy login node; time itself is not a thing to test on a busy machine."""
    script = (
        "import sys\nfrom steadfast import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print('imported:', *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *name, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = {*done.stdout.splitlines()[-1].split()}
    assert {"imported:", "argparse", "steadfast"} <= imported
    assert not imported & HEAVY
