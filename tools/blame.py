"""Which documents made a step, and which of them hurt: their place, text, loss and gradient, worst first.

    steadfast blame runs/NAME --step 1200
    steadfast blame runs/NAME --step 1200 --documents 50 --json

The step is replayed on the CPU in fp32, one document at a time, with the weights of the newest checkpoint from before
the step (the weights training starts from, when there is none): losses are those of the step when the checkpoint is
from right before it, and near them otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.arguments import add_trust_argument
from trainer.errors import DataError, MissingInputError, UsageError

if TYPE_CHECKING:
    from trainer.config.schema import Config
    from trainer.run_directory import RunDirectory

MOST_DOCUMENTS = 200
EXCERPT = 160


@dataclass(frozen=True)
class Blamed:
    """One sample of the step: a document, or a window of one."""

    row: int
    document: int
    place: str
    loss: float
    """Mean over its supervised tokens."""
    gradient_norm: float
    """Of the mean loss of its tokens alone."""
    supervised_tokens: int
    text: str
    window: dict[str, Any]


@dataclass(frozen=True)
class Blame:
    """A replayed step; `samples` are sorted, worst first."""

    step: int
    weights: str
    """Where the weights come from."""
    weights_step: int
    samples: list[Blamed]
    left_out: int
    """Samples that were not replayed, because there are more than were asked for."""
    loss: float
    """Over all replayed samples."""
    layers: dict[str, float]
    """Gradient norm of each layer, over all replayed samples together."""
    teacher_share: float
    """Share of the run's loss that a teacher has: all losses here are the cross entropy with the data alone."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `steadfast blame`."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="step to replay")
    parser.add_argument("--documents", type=int, default=MOST_DOCUMENTS, metavar="N", help="most to replay")
    add_trust_argument(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON, whole texts included")


def run(arguments: argparse.Namespace) -> int:
    """Replay and print."""
    from tools.model_directory.loading import quiet_transformers
    from trainer.data.store.inspect import visible
    from trainer.state import finite

    if arguments.documents < 1:
        raise UsageError(f"--documents {arguments.documents} is too few", "give 1 or more")
    quiet_transformers()
    blame = blame_step(arguments.run_dir, arguments.step, arguments.documents, arguments.trust_remote_code)
    if arguments.json:
        print(json.dumps(finite(asdict(blame)), ensure_ascii=False))
        return 0
    behind = blame.step - 1 - blame.weights_step
    how_near = "right before it" if behind == 0 else f"{behind} steps before it"
    print(
        f"step {blame.step}: {len(blame.samples)} samples, loss {blame.loss:.4f}; weights of {blame.weights}, "
        f"{how_near}"
    )
    if blame.teacher_share:
        print(f"losses are the cross entropy alone: {blame.teacher_share:.0%} of the run's own is its teacher's")
    if blame.left_out:
        print(f"{blame.left_out} more samples were not replayed (--documents)")
    print(f"{'loss':>9} {'gradient':>9} {'tokens':>7}  place")
    for sample in blame.samples:
        text = visible(" ".join(sample.text.split()))
        print(f"{sample.loss:9.4f} {sample.gradient_norm:9.3f} {sample.supervised_tokens:7d}  {sample.place}")
        print(f"{'':29}{text[:EXCERPT]}{'…' if len(text) > EXCERPT else ''}")
    worst = sorted(blame.layers, key=lambda layer: (math.isfinite(blame.layers[layer]), -blame.layers[layer]))[:5]
    print("gradient norm by layer: " + ", ".join(f"{layer} {blame.layers[layer]:.3g}" for layer in worst))
    return 0


def blame_step(run_dir: Path, step: int, most: int = MOST_DOCUMENTS, trusted_code: str | None = None) -> Blame:
    """Replay `step` of a run; `trusted_code` is the revision of the model's own code that may run.

    Raises:
        UsageError: the model needs code of its own, and that is not the revision.
        MissingInputError: no run, or it has not made that step.
        DataError: the store has been built anew since.
    """
    from trainer.config.load import load_config
    from trainer.data.store import open_store
    from trainer.data.store.inspect import decoded_rows
    from trainer.model.remote_code import trust_remote_code
    from trainer.prepare import model_directory, row_spec
    from trainer.run_directory import RunDirectory

    run = RunDirectory(run_dir)
    if not run.config.is_file():
        raise MissingInputError(f"{run_dir} is no run directory: it has no config.yaml", "name one that has trained")
    config = load_config(run.config, [])
    trust_remote_code(model_directory(config, run), trusted_code)
    rows = _rows_of(run, step)
    store = open_store(config.data.train)
    plan = store.plan(row_spec(config, store))
    if max(rows) >= plan.n_rows:
        raise DataError(
            f"step {step} has row {max(rows)}, {store.location} has {plan.n_rows}",
            "give it the store it was trained on",
        )
    found = [(row["row"], sample) for row in decoded_rows(store, plan, rows) for sample in row["samples"]]
    found = [(row, sample) for row, sample in found if sample["spans"]]
    model, weights, weights_step = _weights_before(config, run, step)
    samples, loss, layers = _replay(model, found[:most])
    samples.sort(key=lambda sample: (math.isfinite(sample.loss), -sample.loss))
    taught = config.train.teacher_share if config.data.teacher is not None else 0.0
    return Blame(step, weights, weights_step, samples, len(found) - len(samples), loss, layers, taught)


def _rows_of(run: RunDirectory, step: int) -> list[int]:
    from trainer.observe.ledger import read_lines

    # A bundle is also there for steps that were made anew since.
    for bundle in sorted((run.path / "bad-steps").glob(f"step-{step:08d}-*.json"), reverse=True):
        return [int(row) for row in json.loads(bundle.read_text(encoding="utf-8"))["rows"]]
    last = 0
    for entry in read_lines(run.step_ledger):
        last = int(entry.get("step", 0))
        if last == step:
            return [int(row) for row in entry["rows"]]
    raise MissingInputError(f"{run.path} has not made step {step}", f"its steps are 1 to {last}")


def _weights_before(config: Config, run: RunDirectory, step: int) -> tuple[Any, str, int]:
    import torch

    from trainer.checkpoint.slices import SliceReader
    from trainer.checkpoint.verify import committed_steps, step_directory, verify_checkpoint
    from trainer.errors import CheckpointError
    from trainer.model.load import load_language_model
    from trainer.model.lora import add_adapters
    from trainer.model.supervised import SupervisedLanguageModel
    from trainer.prepare import model_directory

    attention = "eager" if config.model.attention == "eager" else "sdpa"
    start = model_directory(config, run)
    network = load_language_model(start, dtype="float32", attention=attention, gradient_checkpointing=False)
    if config.model.lora is not None:
        add_adapters(network, config.model.lora, config.run.seed)
    parameters = dict(network.named_parameters())
    for saved in committed_steps(run.checkpoints):
        path = step_directory(run.checkpoints, saved)
        if saved >= step:
            continue
        try:
            verify_checkpoint(path)
        except CheckpointError:
            continue
        reader = SliceReader(path)
        with torch.no_grad():
            for name in reader.parameters:
                parameters[name].copy_(torch.from_numpy(reader.read("master", name)).view(parameters[name].shape))
        return SupervisedLanguageModel(network), str(path), saved
    return SupervisedLanguageModel(network), str(start), 0


def _replay(model: Any, found: list[tuple[int, dict[str, Any]]]) -> tuple[list[Blamed], float, dict[str, float]]:
    import torch

    from trainer.data.micro_batch import IGNORED
    from trainer.observe.weights import layer_of

    model.eval()
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.language_model.named_parameters()}
    tokens = sum(stop - start for _, sample in found for start, stop in sample["spans"])
    total = 0.0
    samples = []
    for row, sample in found:
        ids = torch.tensor([sample["ids"]])
        targets = torch.full_like(ids, IGNORED)
        for start, stop in sample["spans"]:
            targets[0, start - 1 : stop - 1] = ids[0, start:stop]
        own = sum(stop - start for start, stop in sample["spans"])
        model.zero_grad(set_to_none=True)
        summed = model(ids, torch.arange(ids.shape[1])[None], targets)
        summed.backward()
        square = 0.0
        for name, parameter in model.language_model.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad
                square += float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)) ** 2
        loss = float(summed.detach())
        total += loss
        window = {name: int(value) for name, value in sample["window"].items()}
        samples.append(
            Blamed(
                row,
                sample["document"],
                sample["place"],
                loss / own,
                math.sqrt(square) / own,
                own,
                sample["text"],
                window,
            )
        )
    layers: dict[str, float] = {}
    for name, gradient in sums.items():
        layers[layer_of(name)] = layers.get(layer_of(name), 0.0) + float(gradient.double().square().sum())
    return samples, total / tokens, {layer: math.sqrt(square) / tokens for layer, square in layers.items()}
