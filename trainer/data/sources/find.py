"""What the user named, as a list of files on this machine: files, directories, globs, saved datasets, URLs."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path

from trainer.data.sources.detect import CONTAINERS, container_of, extension_of
from trainer.data.sources.fetch import Fetched, fetch, is_url
from trainer.data.sources.rows import InputFile
from trainer.data.sources.streams import cannot_read
from trainer.errors import DataError, MissingInputError

_ABOUT_THE_DATA = {f"{name}{extension}" for name in ("readme", "license", "licence") for extension in (".md", ".txt")}
_ABOUT_THE_DATA |= {"dataset_info.json", "dataset_infos.json", "changelog.md", "notice.txt"}


def locate(patterns: Sequence[str], spool: Path) -> list[InputFile]:
    """The inputs that `patterns` name, in their order; what one pattern finds is sorted by path.

    A pattern is a file, a directory, a glob (`**` crosses directories), or a URL of any protocol fsspec knows, fetched
    into `spool` once. Of a directory all files of known extensions are taken, in its subdirectories too, but no hidden
    files and nothing named README, LICENSE or the like; a directory that `Dataset.save_to_disk` wrote is one input. A
    Megatron pair is named by its .idx, its .bin or what they have in common. What several patterns find is taken once.

    Raises:
        MissingInputError: nothing is there, or it cannot be read or fetched.
        DataError: a file is nothing that can be read.
    """
    found: dict[str, InputFile] = {}
    for pattern in patterns:
        if is_url(pattern):
            inputs = [_input_of_url(fetched) for fetched in fetch(pattern, spool)]
        else:
            inputs = [_input_of_path(path) for path in _paths(pattern)]
        for item in inputs:
            found.setdefault(str(item.path.resolve()), item)
    return list(found.values())


def require_input(path: Path) -> None:
    """Refuse what is not there, and pipes and devices: an input is read more than once, so parts would be lost.

    Raises:
        MissingInputError: no file or directory is at `path`.
    """
    if path.is_file() or path.is_dir():
        return
    if path.exists():
        raise MissingInputError(f"{path} is a pipe or a device, not a file", "write it to a file first")
    raise MissingInputError(f"there is no input {path}", "check the path given with --input")


def _paths(pattern: str) -> list[Path]:
    path = Path(pattern)
    try:
        if path.is_dir():
            return _files_below(path)
        if path.exists():
            require_input(path)
            return [path]
        if (index := path.with_name(path.name + ".idx")).is_file():
            return [index]
        if not glob.has_magic(pattern):
            require_input(path)
        return _matches(pattern)
    except OSError as error:
        raise cannot_read(pattern, error) from error


def _matches(pattern: str) -> list[Path]:
    # Path.glob would match hidden files too.
    matches = sorted(Path(match) for match in glob.glob(pattern, recursive=True))  # noqa: PTH207
    files = [
        match
        for match in matches
        if _is_saved_dataset(match)
        or (match.is_file() and not _is_about_the_data(match) and not _is_saved_dataset(match.parent))
    ]
    if not files:
        raise MissingInputError(f"no file matches {pattern}", "check the pattern given with --input")
    return files


def _files_below(directory: Path) -> list[Path]:
    found: list[Path] = []
    waiting, seen = [directory], set()
    while waiting:
        place = waiting.pop()
        if _is_saved_dataset(place):
            found.append(place)
        elif (resolved := place.resolve()) not in seen:
            seen.add(resolved)
            children = [child for child in place.iterdir() if not child.name.startswith(".")]
            waiting += [child for child in children if child.is_dir()]
            found += [child for child in children if child.is_file() and _is_of_known_kind(child)]
    if not found:
        known = " ".join(CONTAINERS)
        raise MissingInputError(f"directory {directory} has no files to read", f"known extensions are {known}")
    return sorted(found)


def _is_of_known_kind(path: Path) -> bool:
    if path.suffix == ".idx" and not path.with_suffix(".bin").is_file():
        return False
    return extension_of(path.name) in CONTAINERS and not _is_about_the_data(path)


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _only_split(directory: Path) -> Path:
    """The dataset in a directory of splits. Raises DataError: it has several, and training on all is no default."""
    if not (directory / "dataset_dict.json").is_file():
        return directory
    try:
        splits = [str(name) for name in json.loads((directory / "dataset_dict.json").read_bytes())["splits"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{directory}: dataset_dict.json is not one of save_to_disk", "save it again") from error
    if len(splits) != 1:
        names = ", ".join(splits) or "none"
        raise DataError(f"{directory} holds several splits ({names})", "give one of its subdirectories")
    return directory / splits[0]


def _is_about_the_data(path: Path) -> bool:
    return path.name.lower() in _ABOUT_THE_DATA


def _input_of_path(path: Path) -> InputFile:
    if path.is_dir():
        from trainer.data.sources.arrow import files_of_saved_dataset

        path = _only_split(path)
        files = files_of_saved_dataset(path, str(path))
        for file in files:
            require_input(file)
        return InputFile(str(path), path, "dataset", sum(file.stat().st_size for file in files))
    index = path.with_suffix(".idx")
    return _input_file(index if path.suffix == ".bin" and index.is_file() else path, str(path))


def _input_of_url(fetched: Fetched) -> InputFile:
    if container_of(fetched.path, fetched.url) == "megatron":
        raise DataError(f"{fetched.url} is one of a pair of files", "fetch .idx and .bin yourself")
    return _input_file(fetched.path, fetched.url)


def _input_file(path: Path, name: str) -> InputFile:
    container = container_of(path, name)
    size = path.stat().st_size
    if container == "megatron":
        data = path.with_suffix(".bin")
        require_input(data)
        size += data.stat().st_size
    return InputFile(name, path, container, size)
