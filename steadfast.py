"""The command `steadfast`: finds this checkout, picks the room that owns the command, and hands over.

Nothing heavy is imported here: `steadfast --help` must answer at once on a login node. Each command lives in a
module with two functions, `configure(parser)` and `run(arguments) -> exit code`, and only the module of the
command that was typed is imported.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

# This folder goes first: `trainer`, `launch` and `tools` are also the names of packages other people publish, and
# site-packages would win over an editable install.
ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("tools.demo", "the whole line on this machine: data, tokenizer, training, export, serving"),
    "tokenizer": ("trainer.data.tokenizer_command", "train a SentencePiece tokenizer on your files"),
    "data": ("trainer.data.command", "build, inspect and verify a token store"),
    "config": ("trainer.config.command", "check, show and explain a configuration; print its JSON schema"),
    "train": ("launch.train_command", "train: N local processes, or one rank when a launcher started us"),
    "launch": ("launch.command", "start a training run here, with Slurm or on Ray; status, logs, stop"),
    "doctor": ("launch.doctor", "is this machine fit to train?"),
    "preflight": ("launch.preflight.command", "are all hosts of a run fit to train it? Run before a long job"),
    "goodput": ("tools.goodput", "where the time of a run went, and how often it should save"),
    "prove": ("tools.prove", "are two runs equal, step by step; if not, where and why they part"),
    "drill": ("tools.drill", "run a small job under random faults and show that nothing is lost"),
    "blame": ("tools.blame", "which documents made a step, and which of them hurt"),
    "checkpoint": ("tools.checkpoint", "list, verify, prune, pin and import checkpoints"),
    "export": ("tools.export", "turn a checkpoint into a safetensors model and prove it"),
    "verify": ("tools.verify", "is a model whole, complete and signed by whom it should be?"),
    "push": ("tools.push", "copy a model to object storage, its manifest last"),
    "diff": ("tools.diff", "how two models differ: every tensor, settings, tokenizer; 1 when they do"),
    "merge": ("tools.merge", "merge models: weighted average, SLERP, TIES"),
    "quantize": ("tools.quantize", "make a smaller model and say what it lost"),
    "teach": ("tools.teach", "write down what a teacher predicts, for a smaller model to learn from"),
    "eval": ("tools.eval", "how good models are, side by side, with confidence intervals"),
    "bench": (
        "tools.bench",
        "measure the data path and exports beside other tools, what checkpoints cost, and serving",
    ),
    "serve": ("tools.serve", "serve a model over an OpenAI-compatible HTTP interface"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code; user-facing errors become lines on stderr, never tracebacks."""
    from trainer.cli import run_command

    for room in ("trainer", "launch", "tools"):
        if not (ROOT / room).is_dir():
            sys.stderr.write(
                f"error: {ROOT} has no {room}/ beside steadfast.py; install the checkout itself: pip install -e .\n"
            )
            return 70
    return run_command(COMMANDS, import_module, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
