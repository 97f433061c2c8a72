"""What has to be there, and to fit together, before an engine is built. Torch-free but for a model from scratch."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from trainer.adapter_file import CONFIG_NAME, AdapterConfig
from trainer.checkpoint.verify import committed_steps
from trainer.config.document import parse
from trainer.config.resume_law import settings_text, tuned
from trainer.config.schema import Config
from trainer.data.encode.tokenizer import PROBE_TEXTS, load_tokenizer
from trainer.data.mixture import MixedOrder, mixed_order, weights_of
from trainer.data.order import BlockOrder, GlobalOrder, Order
from trainer.data.store import TokenStore, open_store
from trainer.data.store.packing import PlanSpec, RowPlan
from trainer.data.store.remote import ShardCache
from trainer.data.teacher import read_teacher_manifest
from trainer.durable import write_errors, write_file
from trainer.errors import DataError, UsageError
from trainer.model.remote_code import own_classes
from trainer.run_directory import RunDirectory
from trainer.world import World

PROBE_PROMPTS, PROBE_LENGTH = 4, 64
NO_ARCHITECTURE = ("_name_or_path", "dtype", "torch_dtype", "transformers_version")
"""Entries of config.json that say nothing about the network."""
RECIPE = "made-from.json"
"""Inside an initial model: what it was made from."""
REMOTE_SHUFFLE_BLOCKS = 16
"""Blocks shuffled together for a store at a URL: a batch then mixes about as many shards."""


def prepare_model(config: Config, store: TokenStore, rows: RowPlan, run: RunDirectory) -> None:
    """Rank 0: make sure that the model directory to load is there and fits the store.

    Raises DataError when it does not, ConfigError when model.config describes no model.
    """
    from trainer.model.load import check_inventory, write_initial_model

    source = model_directory(config, run)
    if config.model.config is not None and _is_outdated(config, store, run):
        shutil.rmtree(source, ignore_errors=True)
        recipe = initial_recipe(config, store)
        write_initial_model(config.model, store.vocabulary_size, recipe["special_ids"], config.run.seed, source)
        write_file(source / RECIPE, json.dumps(recipe, sort_keys=True) + "\n")
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
    if config.model.path is not None and any(
        (source / name).is_file() for name in ("tokenizer.json", "tokenizer.model")
    ):
        _same_ids(load_tokenizer(source), load_tokenizer(store.tokenizer_path), source, store)


def collect_model_files(
    config: Config, store: TokenStore, run: RunDirectory, adapter: AdapterConfig | None = None
) -> None:
    """Rank 0: gather what every checkpoint carries along: configuration and code of the model, adapter, tokenizer."""
    source = model_directory(config, run)
    names = ("config.json", "generation_config.json", CONFIG_NAME)
    # A tokenizer's directory may hold the configuration of another model.
    tokenizer = [file for file in store.tokenizer_path.iterdir() if file.name not in names]
    described = [source / name for name in names[:2] if (source / name).is_file()]
    if own_classes(source):
        described += sorted(source.glob("*.py"))
    with write_errors(run.model_files):
        shutil.rmtree(run.model_files, ignore_errors=True)
        run.model_files.mkdir()
        for file in [*tokenizer, *described]:
            shutil.copyfile(file, run.model_files / file.name)
    if adapter is not None:
        write_file(run.model_files / CONFIG_NAME, json.dumps(adapter.as_json(), indent=2) + "\n")


def changed_settings(config: Config, run: RunDirectory) -> list[str]:
    """Tunable settings that differ from those of the previous start, one `section.key: old -> new` each."""
    try:
        text = run.config.read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return []
    return tuned(parse(text, str).value, config)


def open_cache(config: Config, world: World) -> ShardCache | None:
    """The cache of this node, if data.cache_dir names one; the first rank of each node fetches."""
    if config.data.cache_dir is None:
        return None
    return ShardCache(
        Path(config.data.cache_dir),
        int(config.data.cache_gib * 2**30),
        downloads=world.local_rank == 0,
        shared=world.local_world_size > 1,
        patience_seconds=config.engine.timeout_seconds,
    )


def row_spec(config: Config, store: TokenStore) -> PlanSpec:
    """How the rows of a store are made in this run; a mixture needs rows of one source each."""
    data = config.data
    return store.plan_spec(
        data.sequence_length,
        window=data.window,
        overlap=data.overlap,
        pin_prefix=data.pin_prefix,
        long_text=data.long_text,
        packing=data.packing,
        by_source=True if data.mixture else None,
    )


def left_out(rows: RowPlan) -> list[str]:
    """What training will not see although the store has it, one line each."""
    found = []
    if rows.spec.long_text != "windows" and (documents := int((rows.lost > 0).sum())):
        found.append(
            f"long_text={rows.spec.long_text} with windows of {rows.spec.window} tokens: {int(rows.lost.sum()):,} "
            f"supervised tokens of {documents:,} documents are not trained on"
        )
    if rows.spec.pin_prefix and (documents := int(rows.unpinned.sum())):
        found.append(
            f"pin_prefix: the heads of {documents:,} documents are longer than half a window and are not pinned"
        )
    return found


def row_order(config: Config, store: TokenStore, rows: RowPlan) -> Order:
    """The order in which the rows are trained on.

    Raises:
        UsageError: a cache that is too small for the shuffle, or a mixture of sources that the store does not have.
        DataError: a source with a weight has no row.
    """
    data, seed = config.data, config.run.seed
    blocks = _shuffle_blocks(config, store)
    block_rows = -(-rows.n_rows // max(store.n_shards, 1))
    if store.is_remote and blocks is not None:
        _refuse_small_cache(config, store, blocks)

    def order_of(n_rows: int, seed: int) -> Order:
        return GlobalOrder(n_rows, seed) if blocks is None else BlockOrder(n_rows, seed, block_rows, blocks)

    if data.mixture is None:
        return order_of(rows.n_rows, seed)
    names = store.source_names
    sizes = np.diff(rows.source_rows).tolist()
    segments = []
    for number, segment in enumerate(data.mixture):
        weights = weights_of(segment.weights, names, f"data.mixture.{number}.weights")
        for name, weight, size in zip(names, weights, sizes, strict=True):
            if weight and not size:
                raise DataError(
                    f"source {name} of {store.location} has no row to train on", "take it out of data.mixture"
                )
        segments.append((segment.rows, weights))
    # Sources of equal size must not be in lockstep.
    orders = [order_of(size, seed + 1 + number) if size else None for number, size in enumerate(sizes)]
    return mixed_order(orders, rows.source_rows[:-1], segments, seed)


def source_epochs(config: Config, store: TokenStore, rows: RowPlan, order: Order) -> dict[str, float]:
    """How often the run sees each source of a mixture; empty without a mixture."""
    if not isinstance(order, MixedOrder):
        return {}
    drawn = order.drawn_before(config.train.max_steps * config.train.global_batch_size)
    sizes = np.diff(rows.source_rows)
    return {
        name: round(int(count) / max(int(size), 1), 4)
        for name, count, size in zip(store.source_names, drawn, sizes, strict=True)
    }


def _shuffle_blocks(config: Config, store: TokenStore) -> int | None:
    """Blocks that are shuffled together; None: all rows."""
    return config.data.shuffle_blocks or (REMOTE_SHUFFLE_BLOCKS if store.is_remote else None)


def _refuse_small_cache(config: Config, store: TokenStore, blocks: int) -> None:
    """UsageError when the shards of one shuffle window do not fit the cache: each would be fetched again and again."""
    windows = len(store.source_names) if config.data.mixture else 1
    # A block is about a shard of rows and rarely begins where a shard does.
    needed = min(store.shard_bytes, (2 * blocks + 1) * windows * store.largest_shard_bytes)
    if needed > config.data.cache_gib * 2**30:
        raise UsageError(
            f"shuffling {blocks} blocks of {store.location} needs up to {needed / 2**30:.3g} GiB of its "
            f"{store.shard_bytes / 2**30:.3g} GiB at once, the cache holds {config.data.cache_gib:g}",
            "set a larger data.cache_gib or a smaller data.shuffle_blocks",
        )


def open_held_out(
    config: Config, store: TokenStore, *, rank: int, world_size: int, cache: ShardCache | None = None
) -> TokenStore | None:
    """The store of data.eval, if any; DataError when it was built with another tokenizer than the training store."""
    if config.data.eval is None:
        return None
    held_out = open_store(config.data.eval, rank=rank, world_size=world_size, cache=cache)
    if held_out.manifest["tokenizer_fingerprint"] != store.manifest["tokenizer_fingerprint"]:
        raise DataError(
            f"{config.data.eval} and {config.data.train} were built with different tokenizers",
            "build both with the same one",
        )
    return held_out


def model_directory(config: Config, run: RunDirectory) -> Path:
    """The transformers directory whose weights training starts from."""
    return Path(config.model.path) if config.model.path else run.initial_model


def run_identity(
    config: Config, store: TokenStore, rows: RowPlan, run: RunDirectory, code: str | None = None
) -> dict[str, str]:
    """What a resumed run must share with the run that saved (see `trainer.config.resume_law`), as it took effect.

    `code` is the revision of the model's own code, if it has any.
    """
    if config.model.config is not None:
        model = settings_text("model.config", config.model.config)
    else:
        settings = json.loads((model_directory(config, run) / "config.json").read_text())
        model = settings_text("architecture", {key: settings[key] for key in settings if key not in NO_ARCHITECTURE})
    spec = asdict(rows.spec)
    by_source = spec.pop("by_source")
    return {
        **model,
        **({} if code is None else {"code": code}),
        "model.trainable": ", ".join(config.model.trainable or ["*"]),
        **settings_text("model.lora", config.model.lora.model_dump() if config.model.lora else {}),
        "data": store.fingerprint[:16],
        "tokenizer": store.manifest["tokenizer_fingerprint"][:16],
        "template": store.manifest["template_sha256"][:16],
        **({} if config.data.teacher is None else {"teacher": _teacher_fingerprint(Path(config.data.teacher))}),
        "by_source": str(by_source),
        **settings_text("data", spec),
        "data.mixture": _mixture_text(config),
        "data.shuffle_blocks": str(_shuffle_blocks(config, store) or "all"),
        "optimizer.type": config.optimizer.type,
        "train.global_batch_size": str(config.train.global_batch_size),
        "run.seed": str(config.run.seed),
    }


def _teacher_fingerprint(path: Path) -> str:
    return str(read_teacher_manifest(path)["body_sha256"])[:16]


def _mixture_text(config: Config) -> str:
    segments = [segment.model_dump(exclude_none=True) for segment in config.data.mixture or []]
    return json.dumps(segments, sort_keys=True) if segments else "none"


def initial_recipe(config: Config, store: TokenStore) -> dict[str, Any]:
    """All that the first weights of a model from scratch depend on."""
    tokenizer = load_tokenizer(store.tokenizer_path)
    return {
        "config": config.model.config,
        "vocabulary_size": store.vocabulary_size,
        "special_ids": {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "seed": config.run.seed,
    }


def probe_prompts(store: TokenStore, sequence_length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Token ids [prompts, length]: heads of the longest of the first documents; short ones repeat to fill."""
    length = min(PROBE_LENGTH, sequence_length)
    heads = [np.asarray(store.document(index)[0][:length], np.int64) for index in range(min(64, store.n_documents))]
    longest = sorted(heads, key=len, reverse=True)[:PROBE_PROMPTS]
    return np.stack([np.resize(head, length) for head in longest])


def _is_outdated(config: Config, store: TokenStore, run: RunDirectory) -> bool:
    """Whether the initial model must be made (again). Once a checkpoint rests on it, it stays: resuming will refuse."""
    recipe = run.initial_model / RECIPE
    if not recipe.is_file():
        return True
    return json.loads(recipe.read_text()) != initial_recipe(config, store) and not committed_steps(run.checkpoints)


def _same_ids(model: Any, used: Any, source: Path, store: TokenStore) -> None:
    for text in PROBE_TEXTS:
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (model, used)]
        if ids[0] != ids[1]:
            raise DataError(
                f"{store.location} was built with another tokenizer than that of the model {source}",
                f"build the store with --tokenizer {source}",
            )
