"""Any number of ranks, accumulation, ZeRO stage, packing and checkpointing: the same loss and the same weights.

The reference is a plain torch loop over single samples, one forward each: no packing, no engine, no feed arithmetic.
"""

import copy
import json

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.nn.utils import parametrize

from tests.support.corpora import message_rows, tiny_store
from tests.support.training import gathered, largest_difference, losses, settings
from trainer.checkpoint.verify import find_checkpoint
from trainer.config.schema import Lora, Schedule
from trainer.data.order import rows_at
from trainer.model.lora import add_adapters
from trainer.optim.schedules import share_of_peak

TRAIN = "tests.support.training:train"
TRAIN_BESIDE_BASE = "tests.support.training:train_beside_base"
TOLERANCE = 1e-6


def reference_run(store, values, initial_model, adapt=lambda model: None):
    """(losses, weights) of plain torch: every sample of a step alone, summed, divided by the step's targets.

    `adapt` changes the model before training.
    """
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    plan = store.plan(store.plan_spec(packing=values["data"].get("packing", True)))
    model = AutoModelForCausalLM.from_pretrained(initial_model, dtype=torch.float32)
    adapt(model)
    model.train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for p in trained.values() if p.ndim >= 2],
                "weight_decay": values["optimizer"]["weight_decay"],
            },
            {"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=values["optimizer"]["learning_rate"],
        betas=(0.9, 0.95),
        eps=values["optimizer"]["epsilon"],
    )
    share = share_of_peak(Schedule(**values["schedule"]), values["train"]["max_steps"])
    batch = values["train"]["global_batch_size"]
    found = []
    for step in range(values["train"]["max_steps"]):
        rows = rows_at(np.arange(step * batch, (step + 1) * batch), plan.n_rows, values["run"]["seed"])
        total, count = torch.zeros((), dtype=torch.float64), 0
        for row in rows:
            for sample in plan.samples_of(int(row)):
                document, start, stop, first = (
                    int(column[sample]) for column in (plan.document, plan.start, plan.stop, plan.first_target)
                )
                ids, spans = store.document(document)
                wanted = [t for a, b in spans for t in range(int(a), int(b)) if max(first, start + 1) <= t < stop]
                piece = torch.from_numpy(np.asarray(ids[start:stop], np.int64))
                logits = model(input_ids=piece[None], use_cache=False).logits[0]
                index = torch.tensor([t - start for t in wanted])
                total = total + functional.cross_entropy(logits[index - 1], piece[index], reduction="sum").double()
                count += len(wanted)
        loss = total / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = values["optimizer"]["learning_rate"] * share(step)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found, {name: parameter.detach().numpy().ravel() for name, parameter in trained.items()}


@pytest.fixture(scope="module")
def baseline(tmp_path_factory, one_rank, store):
    """The run all others are compared with: one rank, no accumulation."""
    run = tmp_path_factory.mktemp("baseline") / "run"
    values = settings(run, store.path, train__micro_batch_size=4)
    assert one_rank.run(TRAIN, values=values) == [None]
    return run


def test_one_rank_equals_plain_torch(store, baseline):
    expected, weights = reference_run(store, settings(baseline, store.path), baseline / "initial-model")
    assert np.abs(np.array(losses(baseline)) - expected).max() <= TOLERANCE
    masters = gathered(baseline)
    assert max(np.abs(masters[f"master {name}"] - weight).max() for name, weight in weights.items()) <= TOLERANCE


VARIANTS = {
    "accumulation 2": (1, {"train__micro_batch_size": 2}),
    "accumulation 4": (1, {"train__micro_batch_size": 1}),
    "accumulation 2, last slots empty": (1, {"train__micro_batch_size": 3}),
    "ZeRO-1": (1, {"engine__deepspeed": "zero1"}),
    "ZeRO-3": (1, {"engine__deepspeed": "zero3"}),
    "checkpointing": (1, {"model__gradient_checkpointing": True}),
    "2 ranks, ZeRO-1": (2, {"engine__deepspeed": "zero1"}),
    "2 ranks, ZeRO-2": (2, {"engine__deepspeed": "zero2"}),
    "2 ranks, ZeRO-2, accumulation 2": (2, {"engine__deepspeed": "zero2", "train__micro_batch_size": 1}),
    "2 ranks, ZeRO-2, slots empty on one rank": (2, {"engine__deepspeed": "zero2", "train__micro_batch_size": 3}),
    "2 ranks, ZeRO-3": (2, {"engine__deepspeed": "zero3"}),
    "2 ranks, ZeRO-3, accumulation 2, checkpointing": (
        2,
        {"engine__deepspeed": "zero3", "train__micro_batch_size": 1, "model__gradient_checkpointing": True},
    ),
    "2 ranks, ZeRO-3, offload": (2, {"engine__deepspeed": "zero3-offload-cpu"}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_split_gives_the_same_losses_and_weights(name, request, tmp_path, store, baseline):
    ranks, changes = VARIANTS[name]
    pool = request.getfixturevalue("one_rank" if ranks == 1 else "two_ranks")
    assert pool.run(TRAIN, values=settings(tmp_path / "run", store.path, **changes)) == [None] * ranks
    assert np.abs(np.subtract(losses(tmp_path / "run"), losses(baseline))).max() <= TOLERANCE
    assert largest_difference(tmp_path / "run", baseline) <= TOLERANCE


def test_the_step_ledger_is_the_same_for_any_number_of_ranks(tmp_path, two_ranks, store, baseline):
    two_ranks.run(TRAIN, values=settings(tmp_path / "run", store.path))
    both = [
        [json.loads(line) for line in (run / "steps/steps.jsonl").read_text().splitlines()]
        for run in (tmp_path / "run", baseline)
    ]
    # What a step came to may differ in the last bits, and so may the numbers that cover it.
    computed = {"ranks", "rng", "loss", "gradient_norm", "state_chain"}
    same = [[{name: line[name] for name in line.keys() - computed} for line in lines] for lines in both]
    assert same[0] == same[1]
    lines = both[1]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(len(line["rows"]) == 4 for line in lines)


def test_packed_equals_unpacked(tmp_path, one_rank, two_ranks, store):
    """One step = the whole store, so both see the same samples in every step."""
    runs = []
    for packing in (True, False):
        rows = store.plan(store.plan_spec(packing=packing)).n_rows
        run = tmp_path / str(packing)
        changes = {"data__packing": packing, "train__global_batch_size": rows, "train__micro_batch_size": 7}
        pool = two_ranks if packing else one_rank
        assert pool.run(TRAIN, values=settings(run, store.path, train__max_steps=3, **changes))[0] is None
        runs.append(run)
    assert store.plan().n_rows < store.plan(store.plan_spec(packing=False)).n_rows / 2
    assert np.abs(np.subtract(losses(runs[0]), losses(runs[1]))).max() <= TOLERANCE
    assert largest_difference(*runs) <= TOLERANCE


def test_windows_equal_whole_documents_when_the_overlap_covers_the_receptive_field(tmp_path, one_rank):
    """With attention over 8 tokens in 2 layers a token depends on the 14 before it: windows may not change its loss."""
    store = tiny_store(tmp_path / "data", message_rows(6, turns=9, longest=14), sequence_length=512)
    model = {
        **settings(tmp_path, store.path)["model"]["config"],
        "model_type": "mistral",
        "num_key_value_heads": 4,
        "sliding_window": 8,
    }
    runs, supervised = [], []
    for length, overlap in ((2048, 64), (128, 64)):
        plan = store.plan(store.plan_spec(length, overlap=overlap))
        run = tmp_path / f"run-{length}"
        changes = {
            "data__sequence_length": length,
            "data__overlap": overlap,
            "train__global_batch_size": plan.n_rows,
            "model__config": {**model, "max_position_embeddings": 2048},
        }
        assert one_rank.run(TRAIN, values=settings(run, store.path, train__max_steps=3, **changes)) == [None]
        runs.append(run)
        supervised.append(int(plan.supervised.sum()))
    assert supervised[0] == supervised[1]
    assert np.abs(np.subtract(losses(runs[0]), losses(runs[1]))).max() <= TOLERANCE
    assert largest_difference(*runs) <= TOLERANCE


def test_bfloat16_trains_with_fp32_masters(tmp_path, two_ranks, store, baseline):
    values = settings(
        tmp_path / "run", store.path, model__dtype="bfloat16", train__max_steps=2, schedule__warmup_steps=2
    )
    assert two_ranks.run(TRAIN, values=values) == [None, None]
    assert losses(tmp_path / "run")[0] == pytest.approx(losses(baseline)[0], rel=2e-2)
    manifest = json.loads((find_checkpoint(tmp_path / "run") / "MANIFEST.json").read_text())
    assert {entry["dtype"] for entry in manifest["parameters"].values()} == {"bfloat16"}


LORA = {"rank": 4, "alpha": 16.0}


class LowRank(torch.nn.Module):
    """The weight of an adapted map as its formula says: W + alpha / rank * B A."""

    def __init__(self, down, up):
        super().__init__()
        self.down, self.up = torch.nn.Parameter(down), torch.nn.Parameter(up)

    def forward(self, weight):
        return weight + LORA["alpha"] / LORA["rank"] * self.up @ self.down


def adapt(model):
    """Plain torch LoRA on all linear maps but the head; only the first A are ours."""
    drawn = copy.deepcopy(model)
    names = add_adapters(drawn, Lora(**LORA), seed=3)
    assert len(names) == 14
    model.requires_grad_(False)
    for name in names:
        linear = model.get_submodule(name)
        first = drawn.get_submodule(name).lora_A.weight.detach().clone()
        low_rank = LowRank(first, torch.zeros(linear.out_features, LORA["rank"]))
        parametrize.register_parametrization(linear, "weight", low_rank)
        linear.parametrizations.weight.original.requires_grad_(False)


@pytest.fixture(scope="module")
def lora_baseline(tmp_path_factory, one_rank, store):
    """The LoRA run that all others are compared with."""
    run = tmp_path_factory.mktemp("lora-baseline") / "run"
    values = settings(run, store.path, train__micro_batch_size=4, model__lora=LORA)
    assert one_rank.run(TRAIN, values=values) == [None]
    return run


def test_lora_equals_plain_torch_and_starts_as_the_base(store, baseline, lora_baseline):
    values = settings(lora_baseline, store.path)
    expected, weights = reference_run(store, values, lora_baseline / "initial-model", adapt)
    assert losses(lora_baseline)[0] == losses(baseline)[0]
    assert np.abs(np.array(losses(lora_baseline)) - expected).max() <= TOLERANCE
    masters = gathered(lora_baseline)
    assert len(masters) == 3 * len(weights) == 3 * 28
    for name, weight in weights.items():
        ours = name.replace("parametrizations.weight.0.down", "lora_A.weight")
        ours = ours.replace("parametrizations.weight.0.up", "lora_B.weight")
        assert np.abs(masters[f"master {ours}"] - weight).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {"engine__deepspeed": "zero3", "model__gradient_checkpointing": True}),
        (2, {"engine__deepspeed": "zero1"}),
        (2, {"engine__deepspeed": "zero2", "train__micro_batch_size": 1, "model__gradient_checkpointing": True}),
        (2, {"engine__deepspeed": "zero3"}),
        (2, {"engine__deepspeed": "zero3-offload-cpu", "model__gradient_checkpointing": True}),
    ],
)
def test_every_split_of_a_lora_run_gives_the_same(ranks, changes, request, tmp_path, store, lora_baseline):
    pool = request.getfixturevalue("one_rank" if ranks == 1 else "two_ranks")
    values = settings(tmp_path / "run", store.path, model__lora=LORA, **changes)
    assert pool.run(TRAIN_BESIDE_BASE, values=values) == [None] * ranks
    assert np.abs(np.subtract(losses(tmp_path / "run"), losses(lora_baseline))).max() <= TOLERANCE
    assert largest_difference(tmp_path / "run", lora_baseline) <= TOLERANCE
