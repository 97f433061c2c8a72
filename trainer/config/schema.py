"""What can be configured. One frozen class a section; a field's docstring is its help text.

Parsing reads nothing but the YAML file and imports no torch; whatever depends on the number of ranks is computed
later (`trainer.plan`). Unknown keys are errors everywhere. `gradient_accumulation_steps` is not a key: it follows
from the global batch, the micro-batch and the number of ranks.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

Count = Annotated[int, Strict(), Field(ge=1)]
CountOrZero = Annotated[int, Strict(), Field(ge=0)]
# Strict everywhere: otherwise `learning_rate: true` is 1.0 and `packing: 1` is true, and neither was meant.
PositiveFloat = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Strict(), Field(ge=0, le=1, allow_inf_nan=False)]
Flag = Annotated[bool, Strict()]


def _count_or_auto(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError as error:
        # One problem, not one for each of the two things it could have been.
        raise ValueError("checkpoint.every_steps should be a whole number of at least 1, or auto") from error


CountOrAuto = Annotated[Count | Literal["auto"], WrapValidator(_count_or_auto)]


LORA_LEARNING_RATE = 2e-4


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Run(Section):
    """Where the run lives and what seeds it."""

    dir: str
    """Directory of this run: configuration, ledgers, TensorBoard files and checkpoints. Starting again resumes."""
    seed: CountOrZero = 42
    """Seed of weight initialisation, dropout and the order of data."""
    share_with_group: Flag = False
    """Let the run directory's group read and write it (modes 2770 and 0660); otherwise only its owner can (0700 and
    0600): it holds weights and, in its ledgers, parts of the data."""


def _names_or_all(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError as error:
        raise ValueError("model.lora.targets should be all-linear or a list of names, e.g. [q_proj, v_proj]") from error


NamesOrAll = Annotated[Literal["all-linear"] | Annotated[list[str], Field(min_length=1)], WrapValidator(_names_or_all)]


class Lora(Section):
    """A low-rank adapter beside the frozen weights of the base model (LoRA)."""

    rank: Count = 16
    """Rank of the adapter."""
    alpha: PositiveFloat = 32.0
    """The adapter's part of the output is multiplied by alpha / rank."""
    dropout: Annotated[float, Strict(), Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    """Share of the adapter's inputs that are dropped while training."""
    targets: NamesOrAll = "all-linear"
    """Linear maps that get an adapter: all-linear (every one but the head), or ends of their names, e.g. [q_proj]."""


class Model(Section):
    """Which model is trained. Give `path` (a local Hugging Face directory) or `config` (from scratch), not both."""

    path: str | None = None
    """Local directory with config.json and safetensors weights."""
    config: dict[str, Any] | None = None
    """A transformers configuration, e.g. {model_type: llama, hidden_size: 128, ...}; the vocabulary size follows
    from the tokenizer of the token store."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype. bfloat16 keeps fp32 master weights in the optimizer. On a CPU use float32."""
    gradient_checkpointing: Flag = True
    """Recompute activations in the backward pass: much less memory, about a third more compute."""
    trainable: Annotated[list[str], Field(min_length=1)] | None = None
    """Train only the parameters whose names match one of these shell patterns; default: all."""
    lora: Lora | None = None
    """Train a LoRA adapter and leave the model as it is; checkpoints hold the adapter only. {} takes the defaults:
    {rank: 16, alpha: 32, dropout: 0, targets: all-linear}; targets may be ends of names, e.g. [q_proj, v_proj]."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation. Whatever is chosen, training starts only if packed samples cannot see each other."""

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if (self.path is None) == (self.config is None):
            raise ValueError("give exactly one of model.path (a local directory) and model.config (from scratch)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("model.config needs model_type, e.g. llama")
        if self.lora is not None and self.trainable is not None:
            raise ValueError("give model.lora or model.trainable, not both: under LoRA the adapter alone is trained")
        return self


class MixtureSegment(Section):
    """A stretch of rows with constant weights."""

    rows: Count | None = None
    """Rows drawn with these weights before the next segment begins; only the last segment has none."""
    weights: dict[str, NonNegativeFloat]
    """Source name to weight; only ratios count, and a source that is not named is not drawn."""


class Data(Section):
    """Which token store is read and how rows are made of it. A store is built with `steadfast data build`."""

    train: str
    """Token store to train on. A directory, or a URL (s3://, http://, ...), which needs data.cache_dir."""
    eval: str | None = None
    """Token store to evaluate on, built with the same tokenizer; a directory or a URL."""
    teacher: str | None = None
    """Directory with a teacher's predictions for data.train, made by `steadfast teach`, to learn from as well."""
    sequence_length: Count | None = None
    """Tokens in a row; default: the length the store was built for. Another length only makes a new plan."""
    window: Count | None = None
    """Most tokens of one sample; default: as the store was built, or the sequence length when that is another one."""
    overlap: Count | None = None
    """Tokens that neighbouring windows of a long document share; default: as the store was built."""
    pin_prefix: Flag | None = None
    """Put the system prompt or instruction in front of every window of a long document; default: as the store was
    built."""
    long_text: Literal["windows", "truncate", "drop", "error"] | None = None
    """What happens to a document longer than a window: cut into windows, truncated, left out, or an error; default: as
    the store was built."""
    packing: Flag = True
    """Put several samples into one row (they cannot see each other)."""
    mixture: Annotated[list[MixtureSegment], Field(min_length=1)] | None = None
    """How often rows of each source are drawn: segments {rows, weights: {source: weight}} in turn (a curriculum); the
    last has no rows. Default: every row once an epoch."""
    shuffle_blocks: Count | None = None
    """Blocks of neighbouring rows, each about a token shard, that are shuffled together; default: all rows of a local
    store, 16 blocks of a store at a URL, whose shards are fetched block by block."""
    cache_dir: str | None = None
    """Directory on a local disk of each node for what is fetched from a URL, and for plans that a store has not."""
    cache_gib: PositiveFloat = 32.0
    """Most GiB of token shards in data.cache_dir."""

    @model_validator(mode="after")
    def _fits(self) -> Data:
        for location in (self.train, self.eval):
            if location is not None and "://" in location and self.cache_dir is None:
                raise ValueError(
                    f"{location} is a URL: set data.cache_dir to a directory on a local disk to fetch it into"
                )
        for number, segment in enumerate(self.mixture or []):
            if (segment.rows is None) != (self.mixture is not None and number == len(self.mixture) - 1):
                raise ValueError("data.mixture: every segment needs rows, only the last has none")
            if not any(segment.weights.values()):
                raise ValueError(f"data.mixture.{number}.weights: no weight is positive, so nothing would be drawn")
        return self


class Optimizer(Section):
    """AdamW. Biases, norms and other vectors are never decayed."""

    type: Literal["adamw"] = "adamw"
    """Optimizer."""
    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate; with model.lora the default is 2e-4."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of matrices."""
    beta1: Fraction = 0.9
    """Decay of the mean of gradients."""
    beta2: Fraction = 0.95
    """Decay of the mean of squared gradients."""
    epsilon: PositiveFloat = 1e-8
    """Term that keeps the denominator from zero."""


class Schedule(Section):
    """Learning rate over the steps: warm-up from zero, then the chosen shape down to `final_ratio`."""

    type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: CountOrZero = 0
    """Steps over which the learning rate rises linearly to its peak."""
    final_ratio: Fraction = 0.1
    """Learning rate at the last step as a share of the peak."""


class Train(Section):
    """How much is trained."""

    max_steps: Count
    """Optimizer steps of the whole run; a resumed run stops at the same total."""
    global_batch_size: Count = 8
    """Rows in one optimizer step over all ranks; the same for any number of ranks."""
    micro_batch_size: Count = 1
    """Rows a rank processes at once."""
    teacher_share: Fraction = 0.5
    """With data.teacher: share of the loss that is the divergence from the teacher's predictions; the rest is the cross
    entropy with the data."""
    max_gradient_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this global norm; 0 switches clipping off."""
    max_skipped_steps: Count = 10
    """Steps in a row that may be skipped for a non-finite gradient before `on_divergence` is done."""
    on_divergence: Literal["stop", "rewind"] = "stop"
    """stop: end with exit code 78. rewind: go back to the newest checkpoint and leave out the rows of the skipped steps
    (run.dir/quarantine.json), at most three times in a start."""

    @model_validator(mode="after")
    def _micro_batch_fits(self) -> Train:
        if self.micro_batch_size > self.global_batch_size:
            raise ValueError(
                f"train.micro_batch_size ({self.micro_batch_size}) is larger than train.global_batch_size "
                f"({self.global_batch_size}): most rows of every step would be empty"
            )
        return self


class Engine(Section):
    """DeepSpeed."""

    deepspeed: str = "zero2"
    """A file of configs/ds/ by name (zero1, zero2, zero3, zero3-offload-cpu, ...) or a path to a DeepSpeed JSON."""
    nvme_path: str | None = None
    """Directory on a local disk of each node for optimizer state that engine.deepspeed offloads to nvme."""
    timeout_seconds: Count = 600
    """Bound on every wait for other ranks: a lost or stuck rank ends the run after this time."""
    hang_seconds: Count | None = None
    """Seconds in one phase of a step after which the run ends and the rank that holds it up is named; default: 60, or
    ten times the 95th percentile of a step's time if that is longer. At most nine tenths of timeout_seconds."""


class Checkpoint(Section):
    """When state is saved. A save that was committed is never lost."""

    every_steps: CountOrAuto = 500
    """Steps between checkpoints; the last step is always saved. auto: as many as lose least, from how long saves stop
    training, how long steps take and how often the run failed, within auto_at_least and auto_at_most."""
    auto_at_least: Count = 10
    """Fewest steps between checkpoints when every_steps is auto; the first save comes after so many."""
    auto_at_most: Count = 2000
    """Most steps between checkpoints when every_steps is auto."""
    keep: Count = 2
    """Checkpoints kept; the newest valid one, the best of those evaluated at their step and those that are pinned are
    never removed."""
    asynchronous: Flag = True
    """Write checkpoints while training goes on; takes host memory for a copy of a rank's state."""
    strict: Flag = False
    """Stop with exit code 74 when the newest checkpoint is damaged, instead of going on from the one before it."""
    upload: str | None = None
    """URL (s3://, gs://, file://, ...) that committed checkpoints are copied to in the background."""

    @model_validator(mode="after")
    def _bounds_fit(self) -> Checkpoint:
        if self.auto_at_least > self.auto_at_most:
            raise ValueError(
                f"checkpoint.auto_at_least ({self.auto_at_least}) is more than checkpoint.auto_at_most "
                f"({self.auto_at_most})"
            )
        return self


class Evaluate(Section):
    """Loss on data.eval."""

    every_steps: Count = 500
    """Steps between evaluations; the last step is always evaluated."""
    max_rows: Count = 256
    """Rows of data.eval used."""


class Logging(Section):
    """What is written down while training."""

    every_steps: Count = 10
    """Steps between lines of progress, metrics.jsonl and TensorBoard."""
    tensorboard: Flag = True
    """Write TensorBoard files below run.dir/tensorboard."""


class Config(Section):
    """A whole training run."""

    run: Run
    model: Model
    data: Data
    train: Train
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    logging: Logging = Logging()

    @model_validator(mode="before")
    @classmethod
    def _rate_of_lora(cls, values: Any) -> Any:
        # An adapter learns at ten to twenty times the rate of the weights themselves; 1e-5 would leave it near zero.
        if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
            return values
        optimizer = values.get("optimizer", {})
        if values["model"].get("lora") is None or not isinstance(optimizer, dict):
            return values
        return {**values, "optimizer": {"learning_rate": LORA_LEARNING_RATE, **optimizer}}
