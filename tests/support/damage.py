"""Ways in which files on disk go bad, applied to a random file of a directory by a seeded die."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

KINDS = ("flip", "zero", "truncate", "grow", "empty", "missing", "overwritten", "duplicate", "foreign", "link")


def damage(directory: Path, dice: random.Random) -> tuple[str, set[str]]:
    """Spoil one file below `directory`; returns what was done and the names, one of which a finder must name."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    file = dice.choice(files)
    content = file.read_bytes()
    kind = dice.choice(KINDS)
    if not content and kind in ("flip", "zero", "truncate", "empty"):
        kind = "grow"
    if kind == "flip":
        spoilt = bytearray(content)
        spoilt[dice.randrange(len(spoilt))] ^= 1 << dice.randrange(8)
        file.write_bytes(spoilt)
    elif kind == "zero":
        begin = dice.randrange(len(content))
        spoilt = content[:begin] + b"\0" * len(content[begin : begin + 4096]) + content[begin + 4096 :]
        file.write_bytes(
            spoilt if spoilt != content else b"\1" + content[1:] if content[0] != 1 else b"\2" + content[1:]
        )
    elif kind == "truncate":
        file.write_bytes(content[: dice.randrange(len(content))])
    elif kind == "grow":
        file.write_bytes(content + dice.randbytes(dice.randint(1, 64)))
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "missing":
        file.unlink()
    elif kind == "overwritten":
        other = dice.choice([path for path in files if path.read_bytes() != content])
        shutil.copyfile(other, file)
    elif kind in ("duplicate", "foreign"):
        added = file.with_name(f"{dice.choice(['copy of ', '.', 'rank-00007-'])}{file.name}")
        if kind == "duplicate":
            shutil.copyfile(file, added)
        else:
            added.write_bytes(dice.randbytes(dice.randint(0, 64)))
        return f"{kind} {added.name}", {added.name}
    else:
        added = file.with_name(f"link-{file.name}")
        added.symlink_to(file.name)
        return f"link {added.name}", {added.name}
    return f"{kind} {file.name}", {file.name}
