"""DeepSpeed ZeRO-1/2/3 behind the engine protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.config.deepspeed import offloads_optimizer, swaps_optimizer, zero_stage
from trainer.data.micro_batch import MicroBatch
from trainer.engine import partitions, swapping
from trainer.engine.device import DeviceType, adamw, require_asynchronous_io
from trainer.engine.partitions import OwnedSlice
from trainer.optim.groups import decay_groups


def has_dropout(language_model: Any) -> bool:
    """Whether training and evaluation give different logits; some models hand a rate of their config to a function."""
    layers = (module.p for module in language_model.modules() if isinstance(module, nn.Dropout))
    settings = language_model.config.to_dict()
    rates = (value for name, value in settings.items() if name.endswith(("dropout", "_pdrop", "dropout_prob")))
    return any(isinstance(rate, float) and rate > 0 for rate in (*layers, *rates))


class ZeroThreeHook:
    """Tells transformers to build models sharded. transformers keeps only a weak reference: hold this object.

    With it in force `from_pretrained` creates every parameter already partitioned; without it a rank would need the
    memory of the whole model.
    """

    def __init__(self, deepspeed_config: dict[str, Any]) -> None:
        import deepspeed
        from transformers.integrations.deepspeed import set_hf_deepspeed_config

        # Sharded construction asks DeepSpeed, not torch, for the world; this makes it take over torch's process group.
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        self.config = deepspeed_config
        set_hf_deepspeed_config(self)

    def is_zero3(self) -> bool:
        """Whether models are to be built sharded; the name is transformers' contract."""
        return zero_stage(self.config) == 3

    def release(self) -> None:
        """Models built from now on are whole again."""
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


class DeepSpeedEngine:
    """A wrapped model with its ZeRO optimizer. All ranks construct it together and call every method in step.

    `model` is a SupervisedLanguageModel; `share_of_peak` maps the number of applied steps to a share of the peak rate.
    Without `saves_frozen` the frozen parameters are those of a base model that lies elsewhere: no checkpoint has them.
    """

    def __init__(
        self,
        model: nn.Module,
        deepspeed_config: dict[str, Any],
        *,
        optimizer_settings: dict[str, Any],
        weight_decay: float,
        saves_frozen: bool,
        share_of_peak: Callable[[int], float],
        device: torch.device,
        kind: DeviceType,
    ) -> None:
        import deepspeed

        if swaps_optimizer(deepspeed_config):
            require_asynchronous_io()
        offloaded = offloads_optimizer(deepspeed_config)
        # Built per engine: ZeRO takes the groups apart.
        optimizer = adamw(decay_groups(model, weight_decay), optimizer_settings, kind, offloaded)
        self.device = device
        self.kind = kind
        self._engine, self._zero, _, self._schedule = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config,
            lr_scheduler=lambda inner: torch.optim.lr_scheduler.LambdaLR(inner, share_of_peak),
            dist_init_required=False,
        )
        self._ranks = torch.distributed.get_world_size()
        self._supervised: Any = self._engine.module
        self._saves_frozen = saves_frozen
        self._watched_ids: np.ndarray[Any, np.dtype[np.int64]] | None = None
        self._watch = 0
        # Asked at every save, for which training waits.
        self._has_dropout = has_dropout(self.language_model)

    @property
    def language_model(self) -> Any:
        """The transformers model itself, with its own parameter names (sharded under ZeRO-3)."""
        return self._engine.module.language_model

    @property
    def learning_rate(self) -> float:
        """Rate the next step will use."""
        return float(self._schedule.get_last_lr()[0])

    def summed_loss(self, batch: MicroBatch) -> Tensor:
        """See Engine.summed_loss."""
        self._engine.train()
        if self._watch:
            # Positions count up within a sample and begin anew with the next one.
            positions = batch.position_ids[0, : self._watch]
            length = int((positions == np.arange(len(positions))).sum())
            self._watched_ids = batch.input_ids[:1, :length].copy()
            self._supervised.positions_to_keep, self._watch = length, 0
        taught = () if batch.teacher is None else (0, *map(self._moved, batch.teacher))
        loss: Tensor = self._engine(*self._tensors(batch), *taught)
        return loss

    def backward(self, summed_loss: Tensor, global_supervised_tokens: int) -> None:
        """See Engine.backward. DeepSpeed averages over ranks, hence the factor; it does not average micro-batches."""
        self._engine.backward(summed_loss * (self._ranks / global_supervised_tokens), scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def step(self) -> tuple[float, bool]:
        """See Engine.step."""
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm), bool(self._engine.was_step_applied())

    def evaluate_loss(self, batch: MicroBatch) -> float:
        """See Engine.evaluate_loss."""
        self._engine.eval()
        with torch.no_grad():
            return float(self._engine(*self._tensors(batch)))

    def logits(self, batch: MicroBatch, keep: int) -> Tensor:
        """See Engine.logits."""
        self._engine.eval()
        input_ids, position_ids, _ = self._tensors(batch)
        with torch.no_grad():
            logits: Tensor = self._engine(input_ids, position_ids, None, keep)
        return logits.float().cpu()

    def watch_training(self, positions: int) -> bool:
        """See SavableEngine.watch_training."""
        self._watched_ids = None
        self._watch = 0 if self._has_dropout else positions
        return self._watch > 0

    def watched(self) -> tuple[Any, Tensor] | None:
        """See SavableEngine.watched."""
        if self._watched_ids is None:
            return None
        return self._watched_ids, self._supervised.kept_logits

    def saved_parameters(self) -> dict[str, Any]:
        """See SavableEngine.saved_parameters."""
        return {
            name: parameter
            for name, parameter in self.language_model.named_parameters()
            if parameter.requires_grad or self._saves_frozen
        }

    def owned_slices(self) -> list[OwnedSlice]:
        """See SavableEngine.owned_slices."""
        return self._slices(whole_frozen=False)

    def held_slices(self) -> list[OwnedSlice]:
        """See SavableEngine.held_slices."""
        return self._slices(whole_frozen=True)

    def _slices(self, *, whole_frozen: bool) -> list[OwnedSlice]:
        partitions.create_moments(self._zero)
        found = list(partitions.owned_slices(self.language_model, self._zero))
        if self._saves_frozen:
            found += partitions.frozen_slices(self.language_model, whole=whole_frozen)
        return found

    def counters(self) -> dict[str, Any]:
        """Optimizer step count and schedule state: plain values for a checkpoint."""
        return {"optimizer_steps": partitions.optimizer_steps(self._zero), "schedule_steps": self._schedule.last_epoch}

    def resume(self, counters: dict[str, Any]) -> None:
        """After the tensors of `held_slices` were overwritten: set the counters and publish the weights."""
        partitions.set_optimizer_steps(self._zero, int(counters["optimizer_steps"]))
        self._set_schedule(int(counters["schedule_steps"]))
        with torch.no_grad():
            partitions.publish_masters(self._zero)

    def _set_schedule(self, steps: int) -> None:
        # The same product LambdaLR makes, so that the rate is equal to the last bit; its own load_state_dict would
        # leave the optimizer's rate as it is.
        schedule = self._schedule
        rates = [base * share(steps) for base, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule.last_epoch, schedule._last_lr = steps, rates

    def close(self) -> None:
        """Free the engine's buffers and hooks; the process can build another engine afterwards."""
        self._engine.destroy()
        swapping.remove_files(self._zero)

    def _tensors(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        return self._moved(batch.input_ids), self._moved(batch.position_ids), self._moved(batch.targets)

    def _moved(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)
