import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.corpora import (
    alpaca_rows,
    message_rows,
    recipe_of,
    save_tokenizer,
    sharegpt_rows,
    tiny_store,
    write_json,
    write_json_lines,
)
from trainer.data.build.run import build_store
from trainer.data.encode.tokenizer import load_tokenizer
from trainer.data.store import open_store, reader, verify_store
from trainer.data.store.packing import PLAN_ARRAYS, RowPlan
from trainer.data.store.reader import MANIFEST
from trainer.data.store.shards import read_arrays
from trainer.errors import CannotWriteError, DataError, MissingInputError, UsageError

ROOT = Path(__file__).resolve().parents[2]


def test_the_fingerprint_is_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")

    def built(name: str, rows: int, length: int = 200) -> str:
        (tmp_path / name).mkdir()
        file = write_json(tmp_path / name / "a.json", alpaca_rows(rows))
        report = build_store(recipe_of([file], tokenizer, length), tmp_path / name / "store")
        return str(report["stores"][0]["fingerprint"])

    first = built("here", 12)
    assert built("elsewhere", 12) == first
    assert built("longer rows", 12, 300) == first
    assert built("more rows", 13) != first


def test_round_trip(tmp_path: Path) -> None:
    files = [
        write_json(tmp_path / "a.json", alpaca_rows(12)),
        write_json_lines(tmp_path / "m.jsonl", message_rows(9)),
        write_json_lines(tmp_path / "s.jsonl", sharegpt_rows(4)),
    ]
    recipe = recipe_of(files, save_tokenizer(tmp_path / "tokenizer"), 200)
    (report,) = build_store(recipe, tmp_path / "store")["stores"]
    store = open_store(tmp_path / "store")
    assert store.fingerprint == report["fingerprint"]
    assert [source["format"] for source in report["sources"]] == ["alpaca", "messages", "sharegpt"]
    assert [source["rows"] for source in report["sources"]] == [12, 9, 4]
    assert [source["methods"] for source in report["sources"]] == [{"markers": 12}, {"markers": 9}, {"markers": 4}]
    assert store.n_documents == report["documents"] == 25
    assert store.vocabulary_size == 259
    assert store.place(12) == f"{files[1]}:1"
    tokenizer = load_tokenizer(store.tokenizer_path)
    ids, spans = store.document(0)
    assert ids.dtype == np.uint16
    answer = alpaca_rows(12)[0]["output"]
    assert [tokenizer.decode(ids[start:stop].astype(int)) for start, stop in spans] == [f"{answer}<|im_end|>"]
    assert report["tokens"] == sum(len(store.document(i)[0]) for i in range(25))
    assert report["supervised_tokens"] == sum(
        int((s[:, 1] - s[:, 0]).sum()) for s in (store.document(i)[1] for i in range(25))
    )
    assert report["sources"][0]["bytes"] == files[0].stat().st_size
    verified = verify_store(tmp_path / "store")
    assert (verified.documents, verified.tokens) == (25, report["tokens"])
    # Any safetensors reader can read it.
    for entry in store.manifest["files"]:
        if entry["name"].endswith(".safetensors"):
            assert load_file(tmp_path / "store" / entry["name"])


def test_stored_plan_equals_computed_plan(tmp_path: Path) -> None:
    store = tiny_store(tmp_path)
    stored = store.plan()
    computed = store.compute_plan(store.spec)
    assert isinstance(stored, RowPlan)
    for name in PLAN_ARRAYS:
        assert np.array_equal(getattr(stored, name), getattr(computed, name)), name
        assert getattr(stored, name).dtype == getattr(computed, name).dtype
    assert stored.padding_share == pytest.approx(store.manifest["padding_share"], abs=1e-6)
    assert store.plan_spec(64).overlap == 8
    for settings in ({"overlap": 64}, {"window": 65}, {"window": 8, "overlap": 9}):
        with pytest.raises(UsageError):
            store.plan_spec(64, **settings)


def test_opening_with_a_stored_plan_touches_no_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_store(tmp_path, shard_tokens=500).path

    def touched(*_: object, **__: object) -> None:
        raise RuntimeError("offsets or spans of all documents were read")

    monkeypatch.setattr(reader, "plan_rows", touched)
    store = open_store(path)
    assert store.plan().n_rows > 0
    with pytest.raises(RuntimeError, match="were read"):
        store.plan(store.plan_spec(64))


def test_several_shards_make_the_same_plan_as_one(tmp_path: Path) -> None:
    one, many = (tiny_store(tmp_path / name, shard_tokens=size) for name, size in (("one", 1 << 20), ("many", 500)))
    assert len(list((many.path / "tokens").iterdir())) > 3
    for name in PLAN_ARRAYS:
        assert np.array_equal(
            getattr(one.plan(one.plan_spec(64)), name), getattr(many.plan(many.plan_spec(64)), name)
        ), name


def test_ranks_share_the_checking_of_files(tmp_path: Path) -> None:
    store = tiny_store(tmp_path, shard_tokens=500)
    for index, file in enumerate(store.manifest["files"]):
        path = store.path / file["name"]
        content = path.read_bytes()
        # The last byte: what a reader of the header does not see.
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        for rank in range(3):
            if rank == index % 3:
                with pytest.raises(DataError, match="checksum"):
                    open_store(store.path, rank=rank, world_size=3)
            else:
                open_store(store.path, rank=rank, world_size=3)
        open_store(store.path, verify=False, rank=index % 3, world_size=3)
        path.write_bytes(content)


def test_too_many_open_files_is_no_damage(tmp_path: Path) -> None:
    path = tiny_store(tmp_path, shard_tokens=100).path
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 10, limits[1]))
        with pytest.raises(MissingInputError) as caught:
            open_store(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "too many open files" in str(caught.value)
    assert "ulimit -n" in str(caught.value)
    assert open_store(path).n_documents == 40


def test_equal_input_gives_an_equal_store(tmp_path: Path) -> None:
    first = tiny_store(tmp_path)
    before = {path.name: path.read_bytes() for path in first.path.rglob("*") if path.is_file()}
    second = tiny_store(tmp_path, overwrite=True)
    assert first.fingerprint == second.fingerprint
    assert before == {path.name: path.read_bytes() for path in second.path.rglob("*") if path.is_file()}


def test_every_damage_is_named(tmp_path: Path) -> None:
    store = tiny_store(tmp_path)
    files = [path for path in store.path.rglob("*") if path.is_file()]
    assert len(files) >= 5
    for path in files:
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 4
        # (The last byte of the manifest is a line end: its content is hashed, not its layout.)
        for damaged in (bytes(flipped), content[:-2], content + b"\0", b""):
            path.write_bytes(damaged)
            for check in (open_store, verify_store):
                with pytest.raises(DataError) as caught:
                    check(store.path)
                assert path.name in str(caught.value)
        path.unlink()
        with pytest.raises((DataError, MissingInputError)) as missing:
            open_store(store.path)
        assert path.name in str(missing.value)
        path.write_bytes(content)
    verify_store(store.path)


def test_a_shard_that_lies_is_refused_without_checksums(tmp_path: Path) -> None:
    store = tiny_store(tmp_path)
    shard = next((store.path / "tokens").iterdir())
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(DataError, match=r"tok-.* is damaged"):
        open_store(store.path, verify=False)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ids", 259, "id 259 is not below the vocabulary size"),
        ("loss_spans", 10**6, "supervised spans out of order or out of range"),
        ("turn_ends", 10**6, "ends of turns out of order or out of range"),
        ("head", 10**6, "head out of range"),
        ("source", 1, "source out of range"),
        ("file", 1, "file out of range"),
    ],
)
def test_verify_refuses_numbers_that_cannot_be(tmp_path: Path, name: str, value: int, said: str) -> None:
    store = tiny_store(tmp_path, alpaca_rows(3))
    file = next((store.path / "tokens").iterdir())
    arrays = {key: array.copy() for key, array in read_arrays(file).items()}
    arrays["turn_ends"] = np.array([4, 9, 5], dtype=np.uint32)
    arrays["turn_offsets"] = np.array([0, 2, 3, 3], dtype=np.uint64)
    reader._check_shard(file, arrays, store.manifest)
    arrays[name].flat[-1] = value
    with pytest.raises(DataError, match=said):
        reader._check_shard(file, arrays, store.manifest)
    if name == "turn_ends":
        arrays[name][:] = (9, 4, 5)
        with pytest.raises(DataError, match=said):
            reader._check_shard(file, arrays, store.manifest)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no token store"):
        open_store(tmp_path / "nowhere")
    with pytest.raises(MissingInputError, match="is no token store"):
        open_store(tmp_path)


def test_an_existing_store_is_kept_unless_told(tmp_path: Path) -> None:
    store = tiny_store(tmp_path)
    with pytest.raises(CannotWriteError, match="--overwrite"):
        tiny_store(tmp_path)
    other = tiny_store(tmp_path, alpaca_rows(5), overwrite=True)
    assert other.fingerprint != store.fingerprint
    assert open_store(tmp_path / "store").n_documents == 5
    stranger = tmp_path / "holiday"
    stranger.mkdir()
    (stranger / "photo.jpg").write_bytes(b"x")
    with pytest.raises(CannotWriteError, match="is no token store"):
        build_store(recipe_of([tmp_path / "rows.jsonl"], tmp_path / "tokenizer", 64), stranger, overwrite=True)
    assert (stranger / "photo.jpg").exists()


def test_a_bad_row_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:3: 'output' must be a string, this is null"):
        tiny_store(tmp_path, [*alpaca_rows(2), {"instruction": "a", "output": None}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "tokenizer"]


def test_nothing_supervised_is_an_error(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hello"}]}] * 3
    with pytest.raises(DataError, match=r"rows\.jsonl:1: no supervised token in 3 rows"):
        tiny_store(tmp_path, rows)


def test_rows_that_teach_nothing_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        *alpaca_rows(2),
        {"instruction": "say nothing", "output": " "},
        {"instruction": "say nothing", "output": ""},
    ]
    source = tiny_store(tmp_path, rows).manifest["sources"][0]
    assert (source["rows"], source["kept"], source["documents"]) == (4, 2, 2)
    assert source["left_out"]["counts"] == {"rows with an empty answer": 2}
    assert source["left_out"]["first"]["rows with an empty answer"].endswith("rows.jsonl:3")


def test_windows_without_targets_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"instruction": "a" * 1000, "output": "yes"}, {"instruction": "b", "output": "no"}]
    store = tiny_store(tmp_path, rows, sequence_length=64)
    source = store.manifest["sources"][0]
    assert source["windows_dropped"] > 10
    assert store.plan().n_samples == 2
    assert store.plan().supervised.sum() == source["supervised_tokens"] == len("yes") + len("no") + 2


def test_a_tokenizer_without_template_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer", template=None)
    with pytest.raises(DataError, match="no chat template"):
        tiny_store(tmp_path)
    with pytest.raises(MissingInputError, match="no tokenizer directory"):
        build_store(recipe_of([tmp_path / "rows.jsonl"], tmp_path / "other", 64), tmp_path / "store")


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    save_tokenizer(tmp_path / "tokenizer")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotWriteError, match="no space left"):
        tiny_store(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "tokenizer"]


def test_manifest_numbers_are_checked_by_verify(tmp_path: Path) -> None:
    store = tiny_store(tmp_path)
    manifest = json.loads((store.path / MANIFEST).read_text())
    (store.path / MANIFEST).write_text(json.dumps({**manifest, "rows": manifest["rows"] + 1}))
    with pytest.raises(DataError, match="does not match its own hash"):
        open_store(store.path)
    manifest["tokens"] += 1
    manifest["body_sha256"] = reader.body_hash(manifest)
    (store.path / MANIFEST).write_text(reader.manifest_text(manifest))
    with pytest.raises(DataError, match="tokens"):
        verify_store(store.path)
    manifest["schema"] = 99
    manifest["body_sha256"] = reader.body_hash(manifest)
    (store.path / MANIFEST).write_text(reader.manifest_text(manifest))
    with pytest.raises(DataError, match="schema 99"):
        open_store(store.path)


def test_a_manifest_that_lost_shards_is_refused(tmp_path: Path) -> None:
    store = tiny_store(tmp_path, shard_tokens=300)
    assert store.n_shards > 2
    manifest = json.loads((store.path / MANIFEST).read_text())
    shards = [file for file in manifest["files"] if file["name"].startswith("tokens/")]
    for lost, sentence in ((shards[-1:], "is a plan of"), (shards, "has no documents")):
        changed = manifest | {
            "files": [file for file in manifest["files"] if file not in lost],
            "documents": manifest["documents"] - sum(file["documents"] for file in lost),
        }
        changed["body_sha256"] = reader.body_hash(changed)
        (store.path / MANIFEST).write_text(reader.manifest_text(changed))
        with pytest.raises(DataError, match=sentence):
            open_store(store.path, verify=False).plan()
