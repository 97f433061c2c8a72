"""What is kept of a step that was skipped for a gradient that is not finite.

A bundle is one JSON file, run.dir/bad-steps/step-NNNNNNNN-position-NNNNNNNN.json: every row of the global batch with
its decoded text, loss mask, place in the source files and loss on its own (the weights are those of the step: it was
skipped), the norms of every layer's weights, and the command that replays the step on a CPU.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer import collectives
from trainer.data.feed import StepBatch, deal
from trainer.data.micro_batch import EMPTY_ROW, MicroBatch
from trainer.data.store import TokenStore
from trainer.data.store.inspect import decoded_rows
from trainer.data.store.packing import RowPlan
from trainer.durable import write_errors, write_file
from trainer.engine.protocol import SavableEngine
from trainer.errors import SteadfastError
from trainer.observe.weights import layer_norms
from trainer.state import StepResult, TrainState, finite
from trainer.world import World

MOST_BUNDLES = 20
"""Bundles of one start; a run that diverges for good tells nothing new after that."""


@dataclass
class Forensics:
    """Every rank has one and calls `on_skip` together with the others, right after the step was skipped."""

    run_dir: Path
    engine: SavableEngine
    store: TokenStore
    plan: RowPlan
    world: World
    streak: list[dict[str, Any]] = field(default_factory=list)
    """The steps that were skipped one after the other, up to the newest."""
    _bundles: int = 0

    def on_skip(self, state: TrainState, batch: StepBatch, result: StepResult) -> None:
        """Write the bundle; a disk that does not take it is a warning."""
        step = {"step": state.step, "position": batch.position, "rows": [int(row) for row in batch.rows]}
        if self.streak and self.streak[-1]["step"] != state.step - 1:
            self.streak.clear()
        self.streak.append({**step, "gradient_norm": finite(result.gradient_norm)})
        self._bundles += 1
        if self._bundles > MOST_BUNDLES:
            return
        losses = self._row_losses(batch)
        norms = layer_norms(self.engine)
        if not self.world.is_first:
            return
        path = self.run_dir / "bad-steps" / f"step-{state.step:08d}-position-{batch.position:08d}.json"
        try:
            with write_errors(path):
                path.parent.mkdir(exist_ok=True)
            write_file(path, json.dumps(self._bundle(step, result, losses, norms), ensure_ascii=False, indent=1) + "\n")
        except (SteadfastError, OSError) as error:
            sys.stderr.write(f"warning: the rows of step {state.step} could not be kept: {error}\n")
            return
        bad = [row for row, loss in losses.items() if not math.isfinite(loss)]
        culprit = f"row {bad[0]} alone gives a loss of {losses[bad[0]]}" if bad else "no row alone gives a bad loss"
        sys.stderr.write(
            f"warning: step {state.step} was skipped: its gradient norm is {result.gradient_norm}; {culprit}; its rows "
            f"are in {path}\n"
        )

    def _row_losses(self, batch: StepBatch) -> dict[int, float]:
        """Mean loss of every row of the global batch on its own, over all ranks."""
        size = len(batch.micro_batches[0].input_ids)
        mine = deal(batch.rows, size, self.world.rank, self.world.world_size)
        found: dict[str, float | str] = {}
        for rows, micro_batch in zip(mine, batch.micro_batches, strict=True):
            for index, row in enumerate(rows):
                part = slice(index, index + 1)
                one = MicroBatch(micro_batch.input_ids[part], micro_batch.targets[part], micro_batch.position_ids[part])
                # Empty rows too: under ZeRO-3 a forward pass is collective.
                summed = self.engine.evaluate_loss(one)
                if row != EMPTY_ROW:
                    found[str(int(row))] = repr(summed / max(int(self.plan.supervised[row]), 1))
        return {int(row): float(loss) for answer in collectives.exchange(found) for row, loss in answer.items()}

    def _bundle(
        self,
        step: dict[str, Any],
        result: StepResult,
        losses: dict[int, float],
        norms: dict[str, tuple[float, float]],
    ) -> dict[str, Any]:
        by_loss = sorted(losses, key=lambda row: (math.isfinite(losses[row]), -losses[row]))
        rows = decoded_rows(self.store, self.plan, by_loss)
        bundle: dict[str, Any] = finite(
            {
                **step,
                "loss": result.loss,
                "gradient_norm": result.gradient_norm,
                "learning_rate": result.learning_rate,
                "replay": f"steadfast blame {self.run_dir} --step {step['step']}",
                "bad_rows": [row for row in by_loss if not math.isfinite(losses[row])],
                "layers": [
                    {"layer": layer, "weight_norm": weights, "moment_norm": moments}
                    for layer, (weights, moments) in norms.items()
                ],
                "rows_by_loss": [{"loss": losses[row["row"]], **row} for row in rows],
            }
        )
        return bundle
