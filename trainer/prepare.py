"""What has to be there, and to fit together, before an engine is built. Torch-free but for a model from scratch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.schema import Config
from trainer.data.packing import RowPlan
from trainer.data.store import TokenStore, open_store
from trainer.data.tokenize import load_tokenizer
from trainer.durable import sha256_of_file, write_errors
from trainer.errors import DataError
from trainer.run_directory import RunDirectory

PROBE_PROMPTS, PROBE_LENGTH = 4, 64


def prepare_model(config: Config, store: TokenStore, rows: RowPlan, run: RunDirectory) -> None:
    """Rank 0: make sure the model directory to load exists, and collect the files every checkpoint carries along.

    These are config.json, generation_config.json and the tokenizer of the store, chat template included. Raises
    DataError when model and store do not fit each other.
    """
    from trainer.model.load import check_inventory, write_initial_model

    if config.model.config is not None and not run.initial_model.exists():
        tokenizer = load_tokenizer(store.tokenizer_path)
        special_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_initial_model(config.model, store.vocabulary_size, special_ids, config.run.seed, run.initial_model)
    source = model_directory(config, run)
    check_inventory(source)
    settings = json.loads((source / "config.json").read_text())
    positions = settings.get("max_position_embeddings")
    if isinstance(positions, int) and positions < rows.sequence_length:
        raise DataError(
            f"rows of {rows.sequence_length} tokens do not fit the {positions} positions of the model {source}",
            f"set data.sequence_length={positions} or less",
        )
    vocabulary = settings.get("vocab_size")
    if isinstance(vocabulary, int) and vocabulary < store.vocabulary_size:
        raise DataError(
            f"{config.data.train} uses {store.vocabulary_size} token ids, the model {source} has {vocabulary}",
            "build the store with the tokenizer of this model",
        )
    with write_errors(run.model_files):
        run.model_files.mkdir(exist_ok=True)
        described = [source / name for name in ("config.json", "generation_config.json") if (source / name).is_file()]
        for file in [*described, *store.tokenizer_path.iterdir()]:
            shutil.copyfile(file, run.model_files / file.name)


def open_held_out(config: Config, store: TokenStore, *, verify: bool) -> TokenStore | None:
    """The store of data.eval, if any; DataError when it was built with another tokenizer than the training store."""
    if config.data.eval is None:
        return None
    held_out = open_store(Path(config.data.eval), verify=verify)
    if held_out.manifest["tokenizer_fingerprint"] != store.manifest["tokenizer_fingerprint"]:
        raise DataError(
            f"{config.data.eval} and {config.data.train} were built with different tokenizers",
            "build both with the same one",
        )
    return held_out


def model_directory(config: Config, run: RunDirectory) -> Path:
    """The transformers directory whose weights training starts from."""
    return Path(config.model.path) if config.model.path else run.initial_model


def run_identity(config: Config, store: TokenStore, rows: RowPlan, run: RunDirectory) -> dict[str, str]:
    """What a resumed run must share with the run that saved: the model, the data, and the order and batch of data."""
    return {
        "model": sha256_of_file(run.model_files / "config.json")[:16],
        "data": store.fingerprint[:16],
        "sequence_length": str(rows.sequence_length),
        "overlap": str(rows.overlap),
        "packing": str(rows.packing),
        "global_batch_size": str(config.train.global_batch_size),
        "seed": str(config.run.seed),
    }


def probe_prompts(store: TokenStore) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Token ids [prompts, length] of the heads of the first documents that are long enough; shorter ones repeat."""
    heads = [
        np.asarray(store.document(index)[0][:PROBE_LENGTH], np.int64) for index in range(min(64, store.n_documents))
    ]
    longest = sorted(heads, key=len, reverse=True)[:PROBE_PROMPTS]
    return np.stack([np.resize(head, PROBE_LENGTH) for head in longest])
