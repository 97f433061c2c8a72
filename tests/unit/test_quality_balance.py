import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.quality.balance import class_weights, copies
from trainer.errors import UsageError

labels_lists = st.lists(st.integers(-1, 3), max_size=60)


def keys_of(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 1 << 63, n).astype(np.uint64)


def sizes(labels: np.ndarray, times: np.ndarray) -> dict[int, int]:
    return {int(label): int(times[labels == label].sum()) for label in np.unique(labels) if label >= 0}


@given(labels_lists, st.floats(0.1, 1.0))
@settings(max_examples=60, deadline=None)
def test_over_lifts_the_rare_and_loses_nothing(values: list[int], ratio: float) -> None:
    labels = np.array(values, dtype=np.int64)
    times = copies(labels, keys_of(len(labels)), "over", ratio)
    assert (times >= 1).all()
    assert (times[labels == -1] == 1).all()
    before = sizes(labels, np.ones_like(times))
    largest = max(before.values(), default=0)
    assert sizes(labels, times) == {label: max(count, round(ratio * largest)) for label, count in before.items()}
    for label in before:
        assert np.ptp(times[labels == label]) <= 1


@given(labels_lists, st.floats(1.0, 3.0))
@settings(max_examples=60, deadline=None)
def test_under_drops_the_frequent(values: list[int], ratio: float) -> None:
    labels = np.array(values, dtype=np.int64)
    times = copies(labels, keys_of(len(labels)), "under", ratio)
    assert set(times.tolist()) <= {0, 1}
    assert (times[labels == -1] == 1).all()
    before = sizes(labels, np.ones_like(times))
    smallest = min(before.values(), default=0)
    assert sizes(labels, times) == {label: min(count, round(ratio * smallest)) for label, count in before.items()}


def test_the_order_of_documents_does_not_matter_but_the_seed_does() -> None:
    labels, keys = np.arange(200) % 7 // 5, keys_of(200)
    shuffled = np.random.default_rng(1).permutation(200)
    times = copies(labels, keys, "under")
    assert np.array_equal(copies(labels[shuffled], keys[shuffled], "under"), times[shuffled])
    assert not np.array_equal(copies(labels, keys, "under", seed=1), times)


def test_class_weights() -> None:
    weights = class_weights({"a": 10, "b": 40})
    assert weights == pytest.approx({"a": 1.6, "b": 0.4})
    flat = class_weights({0: 10, 1: 40}, "effective", beta=0.0)
    assert flat == {0: 1.0, 1: 1.0}
    effective = class_weights({0: 10, 1: 4000}, "effective", beta=0.99)
    assert effective[0] / effective[1] == pytest.approx((1 - 0.99**4000) / (1 - 0.99**10))
    assert sum(effective.values()) == pytest.approx(2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: copies(np.array([0]), keys_of(1), "sideways"),  # type: ignore[arg-type]
        lambda: copies(np.array([0]), keys_of(1), "over", 1.5),
        lambda: copies(np.array([0]), keys_of(1), "under", 0.5),
        lambda: class_weights({}),
        lambda: class_weights({"a": 0}),
        lambda: class_weights({"a": 1}, beta=1.0),
        lambda: class_weights({"a": 1}, "other"),  # type: ignore[arg-type]
    ],
)
def test_what_makes_no_sense_is_refused(call: object) -> None:
    with pytest.raises(UsageError):
        call()  # type: ignore[operator]
