"""Fixtures shared by all kinds of tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.corpora import alpaca_rows, tiny_store
from tests.support.ranks import RankPool

# The suite runs on the CPU everywhere: two ranks would meet on one GPU, and results are compared to 1e-6 in fp32.
os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --seed: what random tests start from, to replay a failure."""
    parser.addoption("--seed", type=int, default=7, help="seed of the random tests (default 7)")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this run, printed so that a failure tells it."""
    value: int = request.config.getoption("--seed")
    print(f"replay with --seed {value}")
    return value


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    """A warm process that is the only rank."""
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    """A warm pair of ranks."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    """Four warm ranks, of which cases may use fewer (see tests.support.training.train_among)."""
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A token store with rows of 384 tokens: 90 short conversations, and four long ones that are cut into windows."""
    rows = alpaca_rows(90, longest=4) + alpaca_rows(4, seed=1, longest=120)
    return tiny_store(tmp_path_factory.mktemp("store"), rows, sequence_length=384)
