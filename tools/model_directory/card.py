"""The README.md of an exported or merged model: what it is, where it comes from, what was shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_FILES = "Sizes and sha256 of all files: `manifest.json`.\n"


def model_card(name: str, sentence: str, facts: Mapping[str, Any], proven: str) -> str:
    """Markdown with the front matter of the model hub; `facts` become a table, nested ones `key value` lists."""
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {name}\n\n{sentence}\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n\n{_table(facts)}\n\n{proven}\n\n{_FILES}'
    )


def adapter_card(name: str, sentence: str, facts: Mapping[str, Any], proven: str, *, base: str) -> str:
    """The same of an adapter in peft's format, for the model `base`."""
    return (
        f"---\nlibrary_name: peft\nbase_model: {json.dumps(base)}\npipeline_tag: text-generation\n---\n\n"
        f"# {name}\n\n{sentence}\n\n```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")\n```\n\n'
        f"{_table(facts)}\n\n{proven}\n\n{_FILES}"
    )


def _table(facts: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in facts.items() if value is not None)
    return f"| | |\n|---|---|\n{rows}"


def _cell(value: Any) -> str:
    text = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
