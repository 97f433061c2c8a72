"""Optimizer state in swap files (NVMe offload) is state like any other: equal steps, exact resumes, any way to load it.

Once with DeepSpeed's transfers done by plain reads and writes, and in the long tests with libaio.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.support.training import LLAMA, digest, gathered, losses, settings
from trainer.checkpoint.verify import committed_steps

TRAIN = "tests.support.training:train"
SWAPPING = "tests.support.swapping:train_swapping"


def libaio_is_missing() -> bool:
    from trainer.engine import device
    from trainer.errors import ConfigError

    device.prepare()
    try:
        device.require_asynchronous_io()
    except ConfigError:
        return True
    return False


@pytest.fixture(
    scope="module", params=["plain", pytest.param("libaio", marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
def swap(request, tmp_path_factory):
    """(values that swap, the case's arguments): sub-groups of the small model, or with libaio of a larger one."""
    if request.param == "libaio" and libaio_is_missing():
        pytest.skip("libaio-dev or a C++ compiler is missing")
    directory = tmp_path_factory.mktemp("swap")
    plain = request.param == "plain"
    zero = {"stage": 3, "sub_group_size": 15000 if plain else 300_000, "stage3_param_persistence_threshold": 40}
    files = {}
    for device in ("nvme", "cpu"):
        files[device] = directory / f"{device}.json"
        content = {"zero_optimization": {**zero, "offload_optimizer": {"device": device}}}
        files[device].write_text(json.dumps(content | ({"aio": {"block_size": 4096}} if plain else {})))
    model = LLAMA if plain else {**LLAMA, "hidden_size": 256, "intermediate_size": 512}

    def values(run: Path, store, device: str, **changes):
        return settings(
            run,
            store.path,
            model__config=model,
            engine__deepspeed=str(files[device]),
            engine__nvme_path=str(directory / "nvme"),
            engine__timeout_seconds=60 if plain else 1800,
            checkpoint__every_steps=3,
            checkpoint__keep=9,
            **changes,
        )

    return values, {"plain": plain}


@pytest.fixture(scope="module")
def straight(swap, tmp_path_factory, two_ranks, store):
    """An uninterrupted run of two ranks that swap, with a checkpoint in the middle."""
    values, arguments = swap
    run = tmp_path_factory.mktemp("swapping") / "run"
    found = two_ranks.run(SWAPPING, values=values(run, store, "nvme"), **arguments)
    assert all(isinstance(files, int) and files >= 6 for files in found), found
    assert committed_steps(run / "checkpoints") == [6, 3]
    assert not list(Path(values(run, store, "nvme")["engine"]["nvme_path"]).iterdir()), "files outlive the run"
    return run


def continued(source: Path, run: Path) -> Path:
    """A copy of a run as it was after the checkpoint in its middle."""
    shutil.copytree(source, run)
    shutil.rmtree(run / "checkpoints/step-00000006")
    return run


def test_swapping_changes_no_bit(swap, straight, tmp_path, two_ranks, store):
    values, _ = swap
    assert two_ranks.run(TRAIN, values=values(tmp_path / "run", store, "cpu")) == [None, None]
    assert losses(tmp_path / "run") == losses(straight)
    assert digest(tmp_path / "run") == digest(straight)


def test_it_resumes_to_the_bit(swap, straight, tmp_path, two_ranks, store):
    values, arguments = swap
    run = continued(straight, tmp_path / "run")
    found = two_ranks.run(SWAPPING, values=values(run, store, "nvme"), **arguments)
    assert all(isinstance(files, int) for files in found), found
    assert losses(run) == losses(straight)
    assert digest(run) == digest(straight)


def test_other_stages_take_it_up_and_it_takes_up_theirs(swap, straight, tmp_path, two_ranks, store):
    values, arguments = swap
    run = continued(straight, tmp_path / "to-zero1")
    plain = values(run, store, "nvme")
    plain["engine"]["deepspeed"] = "zero1"
    assert two_ranks.run(TRAIN, values=plain) == [None, None]
    check_equal_to_rounding(run, straight)
    back = continued(run, tmp_path / "from-zero1")
    found = two_ranks.run(SWAPPING, values=values(back, store, "nvme"), **arguments)
    assert all(isinstance(files, int) for files in found), found
    check_equal_to_rounding(back, straight)


def test_an_adapter_is_swapped_too(swap, tmp_path, two_ranks, store):
    values, arguments = swap
    runs = [tmp_path / "nvme", tmp_path / "cpu"]
    lora = {"rank": 256, "targets": ["q_proj", "up_proj", "down_proj"]}
    found = two_ranks.run(SWAPPING, values=values(runs[0], store, "nvme", model__lora=lora), **arguments)
    assert all(isinstance(files, int) and files for files in found), found
    assert two_ranks.run(TRAIN, values=values(runs[1], store, "cpu", model__lora=lora)) == [None, None]
    assert losses(runs[0]) == losses(runs[1])
    assert digest(runs[0]) == digest(runs[1])


def test_a_swap_file_that_is_gone_or_cut_is_no_state(tmp_path):
    from types import SimpleNamespace as Stub

    from trainer.engine.swapping import mapped
    from trainer.errors import MissingInputError

    path = tmp_path / "0_1.tensor.swp"
    info = Stub(tensors=[Stub(swap_path=str(path))])
    optimizer = Stub(
        fp16_partitioned_groups_flat_numel=[100],
        fp32_partitioned_groups_flat=[Stub(ds_id="0_1")],
        optimizer_swapper=Stub(swap_params_info={"0_1": info}),
    )
    path.write_bytes(np.arange(128, dtype=np.float32).tobytes())
    assert mapped(optimizer, 0)["master"].tolist() == list(range(100))
    path.write_bytes(bytes(399))
    for _ in range(2):
        with pytest.raises(MissingInputError, match=r"0_1\.tensor\.swp is gone or cut"):
            mapped(optimizer, 0)
        path.unlink(missing_ok=True)
    assert not path.exists()


def check_equal_to_rounding(left: Path, right: Path) -> None:
    assert np.allclose(losses(left), losses(right), rtol=1e-5, atol=0)
    first, second = gathered(left), gathered(right)
    for name, array in first.items():
        assert np.linalg.norm(array - second[name]) <= 1e-5 * max(np.linalg.norm(array), 1e-30), name
