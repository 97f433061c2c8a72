"""A student learns from what its teacher really predicts, on any rows and any number of ranks."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.corpora import alpaca_rows, message_rows, tiny_store
from tests.support.training import losses, settings
from tools.blame import blame_step
from tools.export import export_checkpoint
from tools.model_directory.loading import load_model
from tools.teach import teach
from trainer.data.feed import Feed
from trainer.data.micro_batch import IGNORED
from trainer.data.order import GlobalOrder
from trainer.data.store import TokenStore
from trainer.data.teacher import MANIFEST_NAME, open_teacher
from trainer.errors import CannotWriteError, DataError, UsageError
from trainer.model.supervised import SupervisedLanguageModel

TRAIN = "tests.support.training:train"
ROOT = Path(__file__).resolve().parents[2]
TOP_K, TEMPERATURE = 5, 2.0


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """A store whose documents are never cut, in several shards."""
    rows = alpaca_rows(60, longest=4)
    return tiny_store(tmp_path_factory.mktemp("store"), rows, sequence_length=384, shard_tokens=900)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, two_ranks: Any, short: TokenStore) -> Path:
    """The teacher: a model that was trained for a few steps."""
    directory = tmp_path_factory.mktemp("teacher")
    assert two_ranks.run(TRAIN, values=settings(directory / "run", short.path)) == [None, None]
    export_checkpoint(directory / "run", directory / "model", verify=False)
    return directory / "model"


@pytest.fixture(scope="module")
def predictions(tmp_path_factory: pytest.TempPathFactory, short: TokenStore, model: Path) -> Path:
    out = tmp_path_factory.mktemp("predictions") / "out"
    report = teach(model, short.path, out, TOP_K, TEMPERATURE)
    assert report.shards == short.n_shards > 2
    assert report.targets == short.manifest["supervised_tokens"]
    assert 0 < report.held < 1
    return out


def compare(store: TokenStore, model: Path, predictions: Path, rows: dict[str, Any]) -> None:
    """Every target of the first step comes with what the model predicts there."""
    plan = store.plan(store.plan_spec(**rows))
    network = SupervisedLanguageModel(load_model(model)[0])
    feed = Feed(
        store,
        plan,
        order=GlobalOrder(plan.n_rows, 1),
        global_batch_size=6,
        micro_batch_size=3,
        rank=0,
        world_size=1,
        teacher=open_teacher(predictions, store),
    )
    for batch in feed.next_step().micro_batches:
        assert batch.teacher is not None
        with torch.inference_mode():
            logits = network(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids))
        wanted = torch.from_numpy(batch.targets) != IGNORED
        expected = (logits[wanted][:, : store.vocabulary_size] / TEMPERATURE).log_softmax(dim=1)
        best, chosen = expected.topk(TOP_K, dim=1)
        assert np.array_equal(batch.teacher.candidates, chosen.numpy())
        # float16 keeps eleven bits.
        assert np.allclose(batch.teacher.log_probabilities[:, :-1], best.numpy(), rtol=1e-3)
        assert np.allclose(np.exp(batch.teacher.log_probabilities).sum(axis=1), 1, atol=2e-3)
    feed.close()


@pytest.mark.parametrize("rows", [{}, {"packing": False}, {"sequence_length": 256}])
def test_every_target_comes_with_what_the_teacher_predicts_there(
    short: TokenStore, model: Path, predictions: Path, rows: dict[str, Any]
) -> None:
    compare(short, model, predictions, rows)


def test_long_documents_are_read_in_the_windows_of_the_store(tmp_path: Path, model: Path) -> None:
    system = {"role": "system", "content": "be brief"}
    rows = [
        {"messages": [system, *(turn for turn in row["messages"] if turn["role"] != "system")]}
        for row in message_rows(8, seed=3, turns=9, longest=20)
    ]
    store = tiny_store(tmp_path, rows, 128, ["windows.pin_prefix=true"], shard_tokens=900)
    assert store.plan().head.any()
    assert (store.plan().start > 0).any()
    teach(model, store.path, tmp_path / "out", TOP_K, TEMPERATURE)
    compare(store, model, tmp_path / "out", {})


def test_a_student_that_is_its_teacher_has_nothing_to_learn_and_others_learn_on_any_ranks(
    tmp_path: Path, one_rank: Any, two_ranks: Any, short: TokenStore, model: Path, predictions: Path
) -> None:
    def trained(pool: Any, name: str, share: float, path: Path | None = None) -> list[float]:
        values = settings(
            tmp_path / name, short.path, data__teacher=str(predictions), train__teacher_share=share, train__max_steps=4
        )
        if path is not None:
            values["model"] = {"path": str(path), "dtype": "float32"}
        assert set(pool.run(TRAIN, values=values)) == {None}
        return losses(tmp_path / name)

    assert trained(two_ranks, "itself", 1.0, model)[0] < 1e-4
    apart = trained(one_rank, "one", 0.5)
    assert np.allclose(apart, trained(two_ranks, "two", 0.5), rtol=1e-5)
    without = settings(tmp_path / "without", short.path, train__max_steps=4)
    assert two_ranks.run(TRAIN, values=without) == [None, None]
    assert not np.allclose(apart, losses(tmp_path / "without"), rtol=1e-2)
    # Both begin with the same weights: what is blamed for a step is the cross entropy, and it says so.
    blame = blame_step(tmp_path / "one", 1)
    assert blame.teacher_share == 0.5
    assert np.isclose(blame.loss, losses(tmp_path / "without")[0], rtol=1e-5)
    # The share is tunable; whether there is a teacher, and which, is not.
    without = settings(tmp_path / "one", short.path, train__max_steps=6)
    (refused,) = one_rank.run(TRAIN, values=without)
    assert "76" in refused
    assert "teacher" in refused
    assert "--allow-change teacher" in refused


def test_what_does_not_fit_is_refused(tmp_path: Path, short: TokenStore, model: Path, predictions: Path) -> None:
    for top_k, temperature in ((0, 1.0), (short.vocabulary_size, 1.0), (4, 0.0), (4, float("nan"))):
        with pytest.raises(UsageError):
            teach(model, short.path, tmp_path / "out", top_k, temperature)
    with pytest.raises(CannotWriteError, match="exists already"):
        teach(model, short.path, predictions)
    other = tiny_store(tmp_path / "other", alpaca_rows(5, seed=9), sequence_length=384)
    with pytest.raises(DataError, match="another store"):
        open_teacher(predictions, other)
    some = open_teacher(predictions, short)
    arrays = [{name: array[::2] for name, array in shard.items()} for shard in some._shards]
    some._shards = arrays
    plan = short.plan()
    feed = Feed(
        short, plan, order=GlobalOrder(plan.n_rows, 1), global_batch_size=4, micro_batch_size=4, rank=0, world_size=1,
        teacher=some,
    )  # fmt: skip
    with pytest.raises(DataError, match="says nothing of some tokens"):
        feed.next_step()
    feed.close()


@pytest.mark.parametrize("place", ["manifest", "shard", "name"])
def test_damage_is_found_and_named(tmp_path: Path, short: TokenStore, predictions: Path, place: str) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in predictions.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    damaged = copy / MANIFEST_NAME if place == "manifest" else next(copy.glob("*.safetensors"))
    if place == "name":
        damaged.unlink()
    else:
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    with pytest.raises(DataError, match=damaged.name):
        open_teacher(copy, short)


KILLED = """
import os, signal, sys
from pathlib import Path
from trainer.data import teacher
from tools.teach import teach
original = teacher.write_shard
def write_shard(directory, number, *rest):
    if number == 2:
        (directory / "teacher-00002-0000.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return original(directory, number, *rest)
teacher.write_shard = write_shard
model, store, out, top_k, temperature = sys.argv[1:]
teach(Path(model), Path(store), Path(out), int(top_k), float(temperature))
"""


def test_a_killed_teacher_goes_on_where_it_was(
    tmp_path: Path, short: TokenStore, model: Path, predictions: Path
) -> None:
    out = tmp_path / "out"
    words = [str(model), str(short.path), str(out), str(TOP_K), str(TEMPERATURE)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    finished = sorted(tmp_path.glob(".out.unfinished/teacher-0000[01]-*"))
    kept = [file.stat().st_mtime_ns for file in finished]
    assert len(kept) == 2
    teach(model, short.path, out, TOP_K, TEMPERATURE)
    assert [(out / file.name).stat().st_mtime_ns for file in finished] == kept
    assert {file.name: file.read_bytes() for file in out.iterdir()} == {
        file.name: file.read_bytes() for file in predictions.iterdir()
    }
