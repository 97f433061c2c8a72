"""Inputs to raw rows, each with its place `file:line`, so that every later complaint can name a line.

    patterns --locate--> InputFile --chunks--> Chunk --rows--> RawRow | BadRow

`find` and `fetch` turn paths, globs, directories and URLs into local files, `detect` says what container each is. One
module a container cuts it into chunks, by the input alone, and turns a chunk into rows; `pieces` does the cutting of
byte streams, `checks` says what makes a row unreadable. Bytes are decoded here, strictly, instead of by a general
loader: a general loader guesses encodings, replaces what it cannot decode and counts rows, not lines. Limits keep a
hostile or broken file from ending in a crash: a row has at most 16 MiB and 64 levels of nesting.
"""

from trainer.data.sources.find import locate, require_input
from trainer.data.sources.reading import chunks, read_lines, read_rows
from trainer.data.sources.rows import (
    MAX_DEPTH,
    MAX_ROW_BYTES,
    BadRow,
    Chunk,
    InputFile,
    RawRow,
    name_of_type,
)

__all__ = [
    "MAX_DEPTH",
    "MAX_ROW_BYTES",
    "BadRow",
    "Chunk",
    "InputFile",
    "RawRow",
    "chunks",
    "locate",
    "name_of_type",
    "read_lines",
    "read_rows",
    "require_input",
]
