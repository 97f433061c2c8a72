"""tools/ is separate from training: it knows the file formats and nothing else of trainer/."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FORMATS = {
    "trainer.errors",
    "trainer.checkout",  # where a process of ours finds the code
    "trainer.durable",
    "trainer.locks",
    "trainer.remote",
    "trainer.names",
    "trainer.tensor_file",
    "trainer.orphans",  # an engine dies with its gateway
    "trainer.adapter_file",
    "trainer.weight_files",
    "trainer.data.encode.rendering",  # chat templates are rendered in one way only
    "trainer.checkpoint.slices",
    "trainer.checkpoint.verify",
    "trainer.config.arguments",
    "trainer.model.remote_code",  # code of a model runs in one way only
}
COMMANDS = ("export", "quantize", "serve", "verify", "diff", "merge", "push")
FILES = [
    *(ROOT / "tools" / f"{name}.py" for name in COMMANDS),
    *(ROOT / "tools/exporting").glob("*.py"),
    *(ROOT / "tools/model_directory").glob("*.py"),
    # The cluster application alone is about Ray.
    *(file for file in (ROOT / "tools/serving").glob("*.py") if file.name != "ray_app.py"),
]


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_tools_import_nothing_of_training_but_the_formats() -> None:
    assert len(FILES) > 30
    for file in FILES:
        found = set(imports(file))
        assert {name for name in found if name.startswith("trainer")} <= FORMATS, file
        assert not {name.split(".")[0] for name in found} & {"deepspeed", "launch", "datasets", "ray"}, file


def test_no_module_of_trainer_imports_tools() -> None:
    for file in (ROOT / "trainer").rglob("*.py"):
        assert "tools" not in {name.split(".")[0] for name in imports(file)}, file
