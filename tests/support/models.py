"""Tiny seeded language models with a tokenizer and a chat template, built in code and saved like any other model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer without merges: 4 special tokens and 256 bytes, so any text has tokens."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(tokenizer: Any, *, seed: int = 0, tied: bool = False, positions: int = 256) -> Any:
    """A Llama of about 60 thousand parameters in fp32, drawn from `seed`; weights large enough to have opinions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_theta=10000.0,
    )
    return LlamaForCausalLM(config).eval()


def save_tiny_model(directory: Path, *, seed: int = 0, tied: bool = False, positions: int = 256) -> Path:
    """Write model, tokenizer, chat template and generation configuration to `directory` and return it."""
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer, seed=seed, tied=tied, positions=positions).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_slice_checkpoint(
    run: Path,
    model: Any,
    tokenizer: Any,
    *,
    step: int = 100,
    world_size: int = 2,
    dtype: str = "float32",
    kept_positions: int = 4,
    frozen: Collection[str] = (),
) -> Path:
    """Write a committed checkpoint of `model` (fp32) below `run`, cut over `world_size` ranks at uneven places.

    `dtype` is what the manifest says the live model computed in. Parameters that share memory are stored once. The
    probe holds the logits of `model` itself. Of `frozen` parameters the file holds no moments.
    """
    import numpy as np
    import torch

    from trainer.checkpoint.slices import KINDS, rank_file, slice_key
    from trainer.checkpoint.verify import MANIFEST_NAME, Manifest, manifest_text, step_directory
    from trainer.durable import xxh3_of_file
    from trainer.tensor_file import TensorFileWriter

    path = step_directory(run / "checkpoints", step)
    (path / "model").mkdir(parents=True)
    names = dict(model.named_parameters(remove_duplicate=False))
    owners = {name: first for first, tensor in model.named_parameters() for name in names if names[name] is tensor}
    parameters = {name: tensor.detach().numpy().reshape(-1) for name, tensor in model.named_parameters()}
    for rank in range(world_size):
        pieces: dict[str, Any] = {}
        for name, values in parameters.items():
            # Uneven cuts, and none at all for short parameters: some ranks own nothing of them.
            cuts = [values.size * part // (world_size * 2 - 1) * 2 for part in range(world_size)] + [values.size]
            if values.size < 64:
                cuts = [0] + [values.size] * world_size
            for kind in KINDS[:1] if name in frozen else KINDS:
                if cuts[rank] < cuts[rank + 1]:
                    part = values[cuts[rank] : cuts[rank + 1]]
                    pieces[slice_key(kind, cuts[rank], name)] = part if kind == "master" else np.zeros_like(part)
        shapes = {key: ("F32", piece.shape) for key, piece in pieces.items()}
        with TensorFileWriter(path / rank_file(rank, world_size), shapes) as writer:
            for key, piece in pieces.items():
                writer.write(key, piece)
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(4, len(tokenizer), (3, 24), generator=generator)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, -kept_positions:].float().contiguous()
    shapes = {"input_ids": ("I64", tuple(ids.shape)), "logits": ("F32", tuple(logits.shape))}
    with TensorFileWriter(path / "probe.safetensors", shapes) as writer:
        writer.write("input_ids", ids.numpy())
        writer.write("logits", logits.numpy())
    (path / "state.json").write_text("{}\n")
    model.config.save_pretrained(path / "model")
    model.generation_config.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    manifest = Manifest(
        step=step,
        world_size=world_size,
        files={
            str(file.relative_to(path)): {"bytes": file.stat().st_size, "xxh3_128": xxh3_of_file(file)}
            for file in files
        },
        parameters={
            name: {
                "shape": list(names[name].shape),
                "dtype": dtype,
                **({"frozen": True} if name in frozen else {}),
            }
            for name in parameters
        },
        tied={name: owner for name, owner in owners.items() if name != owner},
        buffers={},
        identity={"data": "d41d8c", "tokenizer": "98f00b"},
        provenance={"tokens_seen": 123456, "versions": {"torch": torch.__version__}},
    )
    (path / MANIFEST_NAME).write_text(manifest_text(manifest))
    return path
