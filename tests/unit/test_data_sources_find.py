"""What the user may name as an input, here and over the network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from datasets import Dataset

from trainer.data.sources import chunks, fetch, locate
from trainer.errors import CannotWriteError, DataError, MissingInputError

LINE = b'{"a": 1}\n'


def names(tmp_path: Path, *patterns: str) -> list[str]:
    files = locate([str(tmp_path / pattern) for pattern in patterns], tmp_path / "spool")
    return [Path(file.name).relative_to(tmp_path).as_posix() for file in files]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        *(
            "b.jsonl",
            "a.json",
            "c/d/e.jsonl.gz",
            "c/f.csv",
            ".hidden.jsonl",
            ".cache/x.jsonl",
            "README.md",
            "c/_SUCCESS",
        ),
        *("c/dataset_info.json", "model.bin", "pack.idx", "notes.txt", "[1].jsonl"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(LINE)
    Dataset.from_list([{"a": 1}]).save_to_disk(str(tmp_path / "c" / "saved"))
    return tmp_path


def test_directories_are_searched_and_globs_expanded(tree: Path) -> None:
    everything = ["[1].jsonl", "a.json", "b.jsonl", "c/d/e.jsonl.gz", "c/f.csv", "c/saved", "notes.txt"]
    assert names(tree, "") == everything
    assert names(tree, "c", "b.jsonl", "c/f.csv", "b.jsonl") == ["c/d/e.jsonl.gz", "c/f.csv", "c/saved", "b.jsonl"]
    assert names(tree, "*.json*") == ["[1].jsonl", "a.json", "b.jsonl"]
    assert names(tree, "[ab].json*") == ["a.json", "b.jsonl"]
    assert names(tree, "[1].jsonl") == ["[1].jsonl"]
    assert names(tree, "**/*.jsonl*") == ["[1].jsonl", "b.jsonl", "c/d/e.jsonl.gz"]
    assert names(tree, "c/**") == ["c/_SUCCESS", "c/d/e.jsonl.gz", "c/f.csv", "c/saved"]
    assert names(tree, "README.md") == ["README.md"]
    (tree / "loop").symlink_to(tree, target_is_directory=True)
    assert names(tree, "") == everything


def test_what_is_not_there_is_said(tree: Path) -> None:
    (tree / "empty").mkdir()
    for pattern, words in [
        ("nothing.jsonl", "there is no input .*nothing.jsonl"),
        ("*.parquet", r"no file matches .*\*.parquet"),
        ("empty", "directory .*empty has no files to read; known extensions are .jsonl"),
        ("x" * 300, "cannot read x*.*: File name too long"),
    ]:
        with pytest.raises(MissingInputError, match=words):
            names(tree, pattern)
    (tree / "c" / "bad.json").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match=r"c/bad\.json is a zip archive"):
        names(tree, "c")


# --- URLs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "RETRY_SECONDS", (0.0, 0.01, 0.01))


@pytest.fixture
def memory() -> Iterator[Any]:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe({"/in/a.jsonl": LINE, "/in/sub/b.jsonl": LINE * 2, "/in/c.parquet.crc": b"x"})
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def test_urls_of_files_globs_and_directories(memory: Any, tmp_path: Path) -> None:
    for url, expected in [
        ("memory://in/a.jsonl", ["memory://in/a.jsonl"]),
        ("memory://in/*.jsonl", ["memory:///in/a.jsonl"]),
        ("memory://in", ["memory:///in/a.jsonl", "memory:///in/sub/b.jsonl"]),
    ]:
        files = locate([url], tmp_path)
        assert [file.name for file in files] == expected
        assert [row.place for chunk in chunks(files[0]) for row in chunk.rows()] == [f"{expected[0]}:1"]
    memory.pipe("/in/a.jsonl", LINE * 3)
    assert locate(["memory://in/a.jsonl"], tmp_path)[0].bytes == 3 * len(LINE)
    for url in ("memory://in/b.jsonl", "memory://in/*.csv", "memory://other"):
        with pytest.raises(MissingInputError, match=f"(there is no|no file matches) {url}".replace("*", r"\*")):
            locate([url], tmp_path)


def test_a_protocol_without_its_package_names_it(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"cannot fetch webhdfs2://x/a\.jsonl: .*webhdfs2"):
        locate(["webhdfs2://x/a.jsonl"], tmp_path)
    with pytest.raises(MissingInputError, match=r"cannot fetch oci://x/a\.jsonl: .*ocifs"):
        locate(["oci://x/a.jsonl"], tmp_path)


@pytest.fixture
def serve() -> Iterator[Callable[[Any], str]]:
    """Start a server with a request handler; its URL."""
    servers: list[ThreadingHTTPServer] = []

    def start(handler: Any) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words: Any) -> None:
        pass


def test_http_files_are_fetched_once(serve: Callable[[Any], str], tmp_path: Path) -> None:
    gets: list[str] = []

    class Counting(Quiet):
        def do_GET(self) -> None:
            gets.append(self.path)
            super().do_GET()

    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "a.jsonl").write_bytes(LINE * 1000)
    url = serve(partial(Counting, directory=str(tmp_path / "www")))
    for _ in range(2):
        (file,) = locate([f"{url}/a.jsonl?version=2"], tmp_path / "spool")
        assert (file.name, file.container, file.bytes) == (f"{url}/a.jsonl?version=2", "jsonl", 1000 * len(LINE))
    assert gets == ["/a.jsonl?version=2"]
    assert [path.name.endswith("-a.jsonl") for path in (tmp_path / "spool").iterdir()] == [True]
    with pytest.raises(MissingInputError, match=f"there is no {url}/b.jsonl"):
        locate([f"{url}/b.jsonl"], tmp_path / "spool")


def faulty(answers: list[str]) -> type[BaseHTTPRequestHandler]:
    """A server that gives one of `answers` to each GET: `cut`, a status, or `whole`."""

    class Faulty(BaseHTTPRequestHandler):
        def log_message(self, *words: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(100 * len(LINE)))
            self.end_headers()

        def do_GET(self) -> None:
            answer = answers.pop(0)
            if answer.isdigit():
                self.send_error(int(answer))
                return
            self.do_HEAD()
            self.wfile.write(LINE * (50 if answer == "cut" else 100))

    return Faulty


def test_a_connection_that_breaks_is_tried_again(serve: Callable[[Any], str], tmp_path: Path) -> None:
    answers = ["cut", "503", "429", "whole"]
    (file,) = locate([f"{serve(faulty(answers))}/a.jsonl"], tmp_path)
    assert file.bytes == 100 * len(LINE)
    assert not answers


def test_a_server_that_stays_broken_is_one_line(serve: Callable[[Any], str], tmp_path: Path) -> None:
    for answers, left in [(["cut"] * 5, 1), (["403"] * 3, 2), (["503"] * 4, 0)]:
        url = f"{serve(faulty(answers))}/a.jsonl"
        with pytest.raises(MissingInputError, match=f"cannot fetch {url}: ") as caught:
            locate([url], tmp_path)
        assert "\n" not in str(caught.value)
        assert len(answers) == left
        assert not list(tmp_path.iterdir())
    with pytest.raises(MissingInputError, match=r"cannot fetch http://127\.0\.0\.1:9/a\.jsonl: .*onnect"):
        locate(["http://127.0.0.1:9/a.jsonl"], tmp_path)


def test_a_spool_that_cannot_be_written_is_said(memory: Any, tmp_path: Path) -> None:
    (tmp_path / "spool").write_bytes(b"")
    with pytest.raises(CannotWriteError, match="spool"):
        locate(["memory://in/a.jsonl"], tmp_path / "spool")
