"""Stores at URLs: the same batches through a bounded cache, and every kind of trouble by its name."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from socket import gethostname
from typing import Any

import fsspec
import numpy as np
import pytest

from tests.support.corpora import message_rows, tiny_store
from trainer.cli import run_command
from trainer.config.load import config_from_text
from trainer.config.schema import Config
from trainer.data.feed import Feed, StepBatch
from trainer.data.order import BlockOrder, Order
from trainer.data.store import TokenStore, open_store, packing, remote
from trainer.data.store.reader import MANIFEST, body_hash, manifest_text
from trainer.data.store.remote import ShardCache, is_url
from trainer.errors import ConfigError, DataError, HangError, MissingInputError, UsageError
from trainer.prepare import left_out, row_order, row_spec, source_epochs

ROOT = Path(__file__).resolve().parents[2]
LARGE = 1 << 30


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """A store of many small shards."""
    rows = message_rows(180, seed=1, turns=3, longest=15)
    with pytest.MonkeyPatch.context() as patch:
        # A row takes its samples from so many neighbours; with real shards these lie in one or two of them.
        patch.setattr(packing, "LOOKAHEAD", 8)
        patch.setattr(packing, "OPEN_ROWS", 4)
        store = tiny_store(tmp_path_factory.mktemp("local"), rows, sequence_length=160, shard_tokens=700)
    assert store.n_shards > 35
    return store


@pytest.fixture
def url(local: TokenStore) -> Iterator[str]:
    """A copy of the store in memory that tests may damage."""
    files = fsspec.filesystem("memory")
    for path in local.path.rglob("*"):
        if path.is_file():
            files.pipe_file(f"/bucket/store/{path.relative_to(local.path)}", path.read_bytes())
    yield "memory://bucket/store"
    files.rm("/bucket", recursive=True)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)


def feed_of(store: TokenStore, *, rank: int = 0, world: int = 1, order: Order | None = None) -> Feed:
    plan = store.plan()
    order = order or BlockOrder(plan.n_rows, 3, block_rows=3, window_blocks=2)
    return Feed(store, plan, order=order, global_batch_size=4, micro_batch_size=2, rank=rank, world_size=world)


def steps_of(feed: Feed, count: int) -> list[StepBatch]:
    with closing(feed):
        return [feed.next_step() for _ in range(count)]


def same(one: StepBatch, other: StepBatch) -> bool:
    return one.rows.tolist() == other.rows.tolist() and all(
        np.array_equal(left.input_ids, right.input_ids) and np.array_equal(left.targets, right.targets)
        for left, right in zip(one.micro_batches, other.micro_batches, strict=True)
    )


def cached_bytes(directory: Path) -> int:
    total = 0
    for file in directory.glob("*/tokens/*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue
    return total


def damage(url: str, name: str, content: bytes | None) -> None:
    files, path = fsspec.core.url_to_fs(f"{url}/{name}")
    if content is None:
        files.rm_file(path)
    else:
        files.pipe_file(path, content)


def tokens(store: TokenStore) -> list[str]:
    return [file["name"] for file in store.manifest["files"] if file["name"].startswith("tokens/")]


def test_a_small_cache_gives_the_same_batches(local: TokenStore, url: str, tmp_path: Path) -> None:
    limit = 12 * local.largest_shard_bytes
    assert limit < local.shard_bytes / 1.5
    largest = 0
    with closing(ShardCache(tmp_path, limit)) as cache:
        store = open_store(url, cache=cache)
        assert not list(tmp_path.glob("*/tokens/*")), "opening fetches no shard"
        assert (store.fingerprint, store.name, store.location) == (local.fingerprint, "store", url)
        assert store.plan().n_rows == local.plan().n_rows
        expected = steps_of(feed_of(local), 3 * local.plan().n_rows // 4)
        assert expected[-1].epoch == 2
        with closing(feed_of(store)) as feed:
            for step in expected:
                assert same(feed.next_step(), step)
                largest = max(largest, cached_bytes(tmp_path))
        resumed = feed_of(store, rank=1, world=2)
        resumed.load_state_dict({"position": 20})
        assert same(steps_of(resumed, 1)[0], steps_of(at(feed_of(local, rank=1, world=2), 20), 1)[0])
        assert [store.place(index) for index in (0, 179)] == [local.place(index) for index in (0, 179)]
    assert 0 < largest <= limit
    assert not [*(tmp_path / "partial").iterdir(), *(tmp_path / "wanted").iterdir()]


def test_what_is_needed_waits_for_what_is_only_expected(
    local: TokenStore, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard on its way for later fills a small cache: no reason to call the cache too small."""
    underway, go_on, download = threading.Event(), threading.Event(), remote._download
    later: list[str] = []

    def held_up(place: str, target: Path) -> None:
        if place in later:
            underway.set()
            assert go_on.wait(20)
        download(place, target)

    monkeypatch.setattr(remote, "_download", held_up)
    with closing(ShardCache(tmp_path, 2 * local.largest_shard_bytes)) as cache:
        store = open_store(url, cache=cache)
        files = [file for file in store._remote.values() if file.evictable]
        later.append(files[1].url)
        cache.expect(files[:1], files[1:2])
        cache.path(files[0])
        assert underway.wait(20)
        cache.expect(files[2:3])
        with ThreadPoolExecutor() as pool:
            needed = pool.submit(cache.path, files[2])
            with pytest.raises(TimeoutError):
                needed.result(0.3)
            go_on.set()
            assert needed.result(20).is_file()
        assert cached_bytes(tmp_path) <= cache.limit_bytes
        cache.expect(files[3:6])
        with pytest.raises(UsageError, match=r"set a larger data\.cache_gib"):
            list(map(cache.path, files[3:6]))


def at(feed: Feed, position: int) -> Feed:
    feed.load_state_dict({"position": position})
    return feed


def test_shards_of_the_next_window_are_fetched_before_they_are_needed(
    local: TokenStore, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(ShardCache(tmp_path, LARGE)) as cache:
        store = open_store(url, cache=cache)
        plan = store.plan()
        order = BlockOrder(plan.n_rows, 3, block_rows=3, window_blocks=2)
        with closing(feed_of(store, order=order)) as feed:
            feed.next_step()
            near = {
                int(store._shard_of(plan.document[plan.samples_of(row)])[index])
                for low, high in order.ranges_near(0)
                for row in range(low, high + 1)
                for index in (0, -1)
            }
            deadline = time.monotonic() + 5
            names = {tokens(store)[number] for number in near}
            while time.monotonic() < deadline:
                here = {f"tokens/{path.name}" for path in tmp_path.glob("*/tokens/*")}
                if names <= here:
                    break
                time.sleep(0.01)
            assert names <= here
            assert len(here) < store.n_shards


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "is damaged: its checksum does not match"),
        (lambda content: content[:-7], r"is damaged: \d+ bytes instead of \d+"),
        (lambda content: None, "is missing"),
    ],
    ids=["flipped", "truncated", "missing"],
)
def test_a_bad_shard_is_fetched_once_more_and_then_named(
    local: TokenStore, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change, said: str
) -> None:
    name = tokens(local)[3]
    damage(url, name, change((local.path / name).read_bytes()))
    asked: list[str] = []
    download = remote._download
    monkeypatch.setattr(remote, "_download", lambda place, target: (asked.append(place), download(place, target)))
    with closing(ShardCache(tmp_path, LARGE)) as cache:
        store = open_store(url, cache=cache)
        with pytest.raises(DataError, match=said) as caught:
            steps_of(feed_of(store), 100)
        assert f"{url}/{name}" in str(caught.value)
        assert not list(tmp_path.glob(f"*/{name}"))
        assert asked.count(f"{url}/{name}") >= (1 if said == "is missing" else 2)
        # Nothing of it stays: once the store is whole again, the same process goes on.
        damage(url, name, (local.path / name).read_bytes())
        assert len(steps_of(feed_of(store), 20)) == 20


def test_what_fails_for_a_moment_is_tried_again(
    local: TokenStore, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download, failures = remote._download, {"left": 3}

    def flaky(place: str, target: Path) -> None:
        if failures["left"] and "tok-" in place:
            failures["left"] -= 1
            target.write_bytes(b"half")
            raise ConnectionResetError("reset by peer")
        download(place, target)

    monkeypatch.setattr(remote, "_download", flaky)
    with closing(ShardCache(tmp_path, LARGE)) as cache:
        assert same(steps_of(feed_of(open_store(url, cache=cache)), 1)[0], steps_of(feed_of(local), 1)[0])
        assert failures["left"] == 0
        failures["left"] = 10**9
        with pytest.raises(MissingInputError, match=r"cannot fetch memory://.*tok-.*reset by peer"):
            steps_of(feed_of(open_store(url, cache=cache)), 30)


def test_damage_in_the_cache_is_healed(local: TokenStore, url: str, tmp_path: Path) -> None:
    with closing(ShardCache(tmp_path, LARGE)) as cache:
        expected = steps_of(feed_of(open_store(url, cache=cache)), 10)
    for path in [*tmp_path.glob("*/tokens/*"), *tmp_path.glob("*/plans/*"), *tmp_path.glob("*/tokenizer/*")]:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (tmp_path / "partial" / f"left.{gethostname()}.999999999").write_bytes(b"x")
    with closing(ShardCache(tmp_path, LARGE)) as cache:
        store = open_store(url, cache=cache)
        assert all(same(*pair) for pair in zip(steps_of(feed_of(store), 10), expected, strict=True))
        assert (store.tokenizer_path / "tokenizer.json").read_bytes() == (
            local.tokenizer_path / "tokenizer.json"
        ).read_bytes()
    assert not list((tmp_path / "partial").iterdir())


def test_two_ranks_share_a_cache_and_one_of_them_fetches(
    local: TokenStore, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    download = remote._download
    monkeypatch.setattr(remote, "_download", lambda place, target: (asked.append(place), download(place, target)))
    found: dict[int, list[StepBatch]] = {}
    limit = 14 * local.largest_shard_bytes

    def rank(number: int) -> None:
        with closing(ShardCache(tmp_path, limit, downloads=number == 0, shared=True, patience_seconds=30)) as cache:
            store = open_store(url, cache=cache)
            found[number] = steps_of(feed_of(store, rank=number, world=2), 20)
            ends.wait()

    ends = threading.Barrier(2)
    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        expected = steps_of(feed_of(local, rank=number, world=2), 20)
        assert all(same(*pair) for pair in zip(found[number], expected, strict=True))
    assert asked.count(f"{url}/tokenizer/tokenizer.json") == 1
    assert cached_bytes(tmp_path) <= limit


OTHER_RANK = """
import sys
from pathlib import Path
from trainer.data.store.remote import ShardCache
from trainer.data.store import open_store
cache = ShardCache(Path(sys.argv[2]), 1 << 30, downloads=False, patience_seconds=60)
store = open_store(sys.argv[1], cache=cache)
plan = store.plan(store.plan_spec(64))
print(plan.n_rows, sum(int(store.document(i)[0].sum()) for i in range(store.n_documents)))
"""


def test_another_process_gets_shards_and_a_plan_that_is_not_stored(local: TokenStore, tmp_path: Path) -> None:
    url = f"file://{local.path}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER_RANK, url, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    with closing(ShardCache(tmp_path, LARGE, shared=True)) as cache:
        store = open_store(url, cache=cache)
        plan = store.plan(store.plan_spec(64))
        said, _ = process.communicate(timeout=60)
    expected = local.plan(local.plan_spec(64))
    assert np.array_equal(plan.row_samples, expected.row_samples)
    total = sum(int(local.document(index)[0].sum()) for index in range(local.n_documents))
    assert said.split() == [str(expected.n_rows), str(total)]
    # The plan is kept; a damaged one is not believed.
    (kept,) = tmp_path.glob("*/computed/*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-1] + b"\1")
    with closing(ShardCache(tmp_path, LARGE)) as cache:
        store = open_store(url, cache=cache)
        assert np.array_equal(store.plan(store.plan_spec(64)).tokens, expected.tokens)


def test_a_rank_that_waits_in_vain_says_so(local: TokenStore, url: str, tmp_path: Path) -> None:
    alone = ShardCache(tmp_path, LARGE, downloads=False, patience_seconds=0.1)
    with pytest.raises(HangError, match=r"tokenizer.*was not fetched into .* within 0\.1 seconds"):
        open_store(url, cache=alone)
    name = tokens(local)[0]
    damage(url, name, b"short")
    with (
        closing(ShardCache(tmp_path, LARGE, shared=True)) as first,
        closing(ShardCache(tmp_path, LARGE, downloads=False, patience_seconds=30)) as second,
    ):
        open_store(url, cache=first)
        with pytest.raises(DataError, match=f"{name} is damaged: 5 bytes"):
            open_store(url, cache=second).document(0)


def test_shards_of_the_steps_being_prepared_stay_and_the_longest_unused_go(
    local: TokenStore, url: str, tmp_path: Path
) -> None:
    with closing(ShardCache(tmp_path, 4 * local.largest_shard_bytes)) as cache:
        store = open_store(url, cache=cache)
        files = [store._remote_file(name) for name in tokens(local)[:10]]

        def here() -> list[int]:
            return [number for number, file in enumerate(files) if file.path.exists()]

        cache.expect(files[:2])
        for file in files[:6]:
            cache.path(file)
            assert file.path.exists()
        assert here() == [0, 1, 4, 5]
        cache.path(files[4])
        cache.path(files[6])
        assert here() == [0, 1, 4, 6]
        for number in (7, 8, 7, 8):
            cache.expect([files[number]])
            cache.path(files[number])
        cache.path(files[9])
        assert here() == [1, 7, 8, 9]


def test_a_cache_that_cannot_hold_one_step_is_refused(local: TokenStore, url: str, tmp_path: Path) -> None:
    with closing(ShardCache(tmp_path, local.largest_shard_bytes + 10)) as cache:
        store = open_store(url, cache=cache)
        with pytest.raises(UsageError, match=r"cannot hold .* data\.cache_gib"):
            steps_of(feed_of(store), 30)


def test_no_store_at_a_url(url: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is a URL; give a directory .* data\.cache_dir"):
        open_store(url)
    with closing(ShardCache(tmp_path, LARGE)) as cache:
        with pytest.raises(MissingInputError, match="there is no memory://bucket/nothing/manifest"):
            open_store("memory://bucket/nothing", cache=cache)
        with pytest.raises(MissingInputError, match="cannot fetch nosuch://bucket"):
            open_store("nosuch://bucket", cache=cache)
        files, path = fsspec.core.url_to_fs(f"{url}/{MANIFEST}")
        manifest = json.loads(files.cat_file(path))
        damage(url, MANIFEST, json.dumps({**manifest, "rows": 1}).encode())
        with pytest.raises(DataError, match="does not match its own hash"):
            open_store(url, cache=cache)
        manifest["files"].append({"name": "../../evil", "bytes": 1, "xxh3": "0" * 32, "sha256": "0" * 64})
        damage(url, MANIFEST, manifest_text({**manifest, "body_sha256": body_hash(manifest)}).encode())
        with pytest.raises(DataError, match="evil"):
            open_store(url, cache=cache)


@contextmanager
def served(directory: Path) -> Iterator[str]:
    """URL of a local HTTP server of a directory."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(directory))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_http(local: TokenStore, tmp_path: Path) -> None:
    with served(local.path.parent) as url, closing(ShardCache(tmp_path, LARGE)) as cache:
        store = open_store(f"{url}/store/", cache=cache)
        assert same(steps_of(feed_of(store), 1)[0], steps_of(feed_of(local), 1)[0])
        with pytest.raises(MissingInputError, match="there is no http"):
            open_store(f"{url}/other", cache=cache)


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs `steadfast data ...`; (exit code, everything it said)."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # As the store was built.
    monkeypatch.setattr(packing, "LOOKAHEAD", 8)
    monkeypatch.setattr(packing, "OPEN_ROWS", 4)

    def run(*words: object) -> tuple[int, str]:
        code = run_command({"data": ("trainer.data.command", "")}, import_module, ["data", *map(str, words)])
        return code, "".join(capsys.readouterr())

    return run


def looks_alike(local: TokenStore, url: str, out: Path, said: Callable[..., Any]) -> None:
    for words in (("inspect", "--json", "--rows", 3), ("card",), ("verify",)):
        here, there = (said(words[0], place, *words[1:]) for place in (local.path, url))
        assert here[0] == there[0] == 0, there
        assert there[1] == here[1].replace(str(local.path), url)
    assert said("diff", local.path, url)[0] == 0
    assert said("leakage", local.path, url)[0] == DataError.exit_code
    assert said("export", url, out, "--to", "parquet")[0] == 0


def test_commands_look_at_a_store_at_a_url(
    local: TokenStore, url: str, tmp_path: Path, said: Callable[..., Any]
) -> None:
    looks_alike(local, url, tmp_path / "rows.parquet", said)
    (shard,) = [file["name"] for file in local.manifest["files"] if file["name"].startswith("tokens/tok-00003")]
    content = bytearray((local.path / shard).read_bytes())
    content[-1] ^= 1
    damage(url, shard, bytes(content))
    code, reason = said("verify", url)
    assert code == DataError.exit_code
    assert shard in reason
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"], "what was fetched is removed"


def test_commands_look_over_http(local: TokenStore, tmp_path: Path, said: Callable[..., Any]) -> None:
    with served(local.path.parent) as url:
        looks_alike(local, f"{url}/store", tmp_path / "rows.parquet", said)
        assert said("verify", f"{url}/other")[0] == MissingInputError.exit_code


def config_of(store: str, tmp_path: Path, **data: object) -> Config:
    return config_from_text(
        json.dumps(
            {
                "run": {"dir": "x", "seed": 5},
                "model": {"path": "m"},
                "data": {"train": store, "cache_dir": str(tmp_path), **data},
                "train": {"max_steps": 8, "global_batch_size": 16},
            }
        ),
        "c.yaml",
    )


def test_the_order_follows_from_store_and_configuration(local: TokenStore, url: str, tmp_path: Path) -> None:
    rows = local.plan()
    everything = row_order(config_of(str(local.path), tmp_path), local, rows)
    assert type(everything).__name__ == "GlobalOrder"
    block = -(-rows.n_rows // local.n_shards)
    chosen = row_order(config_of(str(local.path), tmp_path, shuffle_blocks=4), local, rows)
    assert chosen == BlockOrder(rows.n_rows, 5, block, 4)
    with closing(ShardCache(tmp_path, LARGE)) as cache:
        store = open_store(url, cache=cache)
        assert row_order(config_of(url, tmp_path), store, rows) == BlockOrder(rows.n_rows, 5, block, 16)
        few = local.shard_bytes / 2**30 / 2
        with pytest.raises(UsageError, match=r"shuffling 1000 blocks of memory.* data\.shuffle_blocks"):
            row_order(config_of(url, tmp_path, shuffle_blocks=1000, cache_gib=few), store, rows)
        row_order(config_of(url, tmp_path, shuffle_blocks=1, cache_gib=few), store, rows)
    with pytest.raises(ConfigError, match=r"is a URL: set data\.cache_dir"):
        config_of(url, tmp_path, cache_dir=None)
    assert not is_url("/data/store")


def test_what_a_plan_leaves_out_is_said(local: TokenStore) -> None:
    assert left_out(local.plan(local.plan_spec(40))) == []
    rows = local.plan(local.plan_spec(40, long_text="truncate"))
    assert rows.lost.sum() > 0
    documents = int((rows.lost > 0).sum())
    assert left_out(rows) == [
        f"long_text=truncate with windows of 40 tokens: {rows.lost.sum():,} supervised tokens of {documents:,} "
        "documents are not trained on"
    ]


def test_a_mixture_follows_from_store_and_configuration(local: TokenStore, tmp_path: Path) -> None:
    def config(*segments: dict[str, object]) -> Config:
        return config_of(str(local.path), tmp_path, mixture=list(segments))

    good = config({"rows": 30, "weights": {"rows": 1}}, {"weights": {"rows": 2.5}})
    spec = row_spec(good, local)
    assert spec.by_source
    rows = local.plan(spec)
    order = row_order(good, local, rows)
    assert source_epochs(good, local, rows, order) == {"rows": round(8 * 16 / rows.n_rows, 4)}
    with pytest.raises(UsageError, match=r"data\.mixture\.0\.weights: the store has no source 'news'.*rows"):
        row_order(config({"weights": {"news": 1}}), local, rows)
    for bad, said in (
        ([{"rows": 5, "weights": {"a": 1}}], "only the last has none"),
        ([{"weights": {"a": 1}}, {"weights": {"a": 1}}], "only the last has none"),
        ([{"weights": {"a": 0}}], "no weight is positive"),
        ([{"weights": {"a": -1}}], "greater than or equal to 0"),
        ([], "at least 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            config(*bad)
