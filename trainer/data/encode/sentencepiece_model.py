"""A SentencePiece model as a `tokenizers` backend with the very same ids, or a refusal that says why not.

Such conversions go wrong silently (a lost newline, a space more), so the result is compared with SentencePiece on a
stress list before anybody uses it. What `tokenizers` cannot do: normalise like SentencePiece around combining
characters (`nmt_nfkc`), and put one space before a text that is cut at user-defined symbols.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.data.encode.stress_texts import stress_texts
from trainer.errors import DataError

MODEL_NAMES = ("tokenizer.model", "sentencepiece.model", "spiece.model")
SPACE = "\u2581"
# Kinds of pieces and models (sentencepiece_model.proto).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2
# Far below any piece's own: text never becomes a control or byte piece while there is another way to write it.
_NEVER = -1e6


def find_model(directory: Path) -> Path | None:
    """The SentencePiece model in a tokenizer directory; None when there is none."""
    return next((directory / name for name in MODEL_NAMES if (directory / name).is_file()), None)


def is_sentencepiece(file: Path) -> bool:
    """Whether `file` can be read as a SentencePiece model (others also name theirs tokenizer.model)."""
    return _processor(file) is not None


def sentencepiece_encoder(file: Path) -> Callable[[str], list[int]] | None:
    """SentencePiece's own encoder of the model in `file`; None when it cannot be read."""
    model = _processor(file)
    return None if model is None else model.encode


def tokenizer_from_model(file: Path) -> Any:
    """A transformers tokenizer with the ids of the SentencePiece model `file`.

    Special tokens and the chat template come from the files beside it where there are any.

    Raises:
        DataError: the ids cannot be had.
    """
    from transformers import PreTrainedTokenizerFast

    raw = file.read_bytes()
    try:
        backend = _equal_backend(file, raw)
        with tempfile.TemporaryDirectory() as temporary:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(_with_settings(file, backend, Path(temporary)))
        if _working_parts(tokenizer.backend_tokenizer) != _working_parts(backend):
            raise _NotConvertibleError("the settings beside it change how it works")
    except _NotConvertibleError as error:
        raise DataError(
            f"{file}: no transformers tokenizer has the ids of this SentencePiece model: {error}",
            "put a tokenizer.json beside it, or train it with normalization_rule_name=identity, "
            "add_dummy_prefix=false and remove_extra_whitespaces=false",
        ) from error
    tokenizer.name_or_path = str(file.parent)
    return tokenizer


def _equal_backend(file: Path, raw: bytes) -> Any:
    try:
        return _check_equal(file, backend_of(raw))
    except _NotConvertibleError:
        return _check_equal(file, backend_of(raw, cut_controls=True))


def backend_of(raw: bytes, cut_controls: bool = False) -> Any:
    """A `tokenizers.Tokenizer` that does what the serialised SentencePiece model `raw` does.

    The unigram model of `tokenizers` finds control and byte pieces in text, SentencePiece never does. Here they cost
    more than any other way to write the text, which fails where there is no other way: a character that is no piece.
    `cut_controls` cuts their texts in two instead, which fails where a piece reaches over the cut.

    SentencePiece joins the neighbours whose union has the best score, so every way to cut a piece in two is a merge,
    ranked by the score of the union. Control pieces become special tokens, user-defined symbols added ones.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(raw)
    trainer, pieces = proto.trainer_spec, proto.pieces
    _check_convertible(proto)
    if trainer.model_type == _BPE:
        vocabulary = {piece.piece: index for index, piece in enumerate(pieces)}
        scores = {piece.piece: piece.score for piece in pieces if piece.type == _NORMAL}
        merges = [
            (text[:at], text[at:])
            for text in sorted(scores, key=lambda text: -scores[text])
            for at in range(1, len(text))
            if text[:at] in scores and text[at:] in scores
        ]
        model: Any = models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    else:
        in_text = (_NORMAL, _USER_DEFINED)
        never = 0.0 if cut_controls else _NEVER
        scored = [(piece.piece, piece.score if piece.type in in_text else never) for piece in pieces]
        model = models.Unigram(scored, trainer.unk_id, trainer.byte_fallback)
    backend = Tokenizer(model)
    backend.normalizer = _normalizer(proto.normalizer_spec)
    if cut_controls and trainer.model_type == _UNIGRAM:
        texts = [piece.piece for piece in pieces if piece.type in (_UNKNOWN, _CONTROL, _BYTE)]
        cuts = "|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in texts)
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(cuts), "merged_with_previous")
    spaces: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        spaces.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(spaces)
    backend.add_tokens(
        [
            AddedToken(piece.piece, special=piece.type != _USER_DEFINED, normalized=False)
            for piece in pieces
            if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    return backend


class _NotConvertibleError(Exception):
    """Why the ids of a model cannot be had; becomes a DataError with its place."""


def _check_convertible(proto: Any) -> None:
    spec, kinds = proto.normalizer_spec, {piece.type for piece in proto.pieces}
    if proto.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        raise _NotConvertibleError("it is neither a BPE nor a unigram model")
    if _UNUSED in kinds:
        raise _NotConvertibleError("it has pieces that are marked unused")
    if proto.trainer_spec.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        raise _NotConvertibleError("it does not put the space before the word")
    if _USER_DEFINED in kinds:
        what = [
            words
            for words, has in (
                ("a space before the text", spec.add_dummy_prefix),
                ("spaces removed", spec.remove_extra_whitespaces),
                (f"{spec.name} normalisation", spec.precompiled_charsmap),
            )
            if has
        ]
        if what:
            raise _NotConvertibleError(f"it has user-defined symbols together with {' and '.join(what)}")
    scores = [piece.score for piece in proto.pieces if piece.type == _NORMAL]
    if proto.trainer_spec.model_type == _BPE and len(set(scores)) < len(scores):
        raise _NotConvertibleError("two of its pieces have the same score")


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    steps.append(normalizers.Replace(" ", SPACE))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return steps[0] if len(steps) == 1 else normalizers.Sequence(steps)


def _with_settings(file: Path, backend: Any, directory: Path) -> Path:
    """Write what PreTrainedTokenizerFast loads: the backend, and the settings that lie beside the model."""
    model = _processor(file)
    backend.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {
        f"{name}_token": model.id_to_piece(index)
        for name, index in (
            ("unk", model.unk_id()),
            ("bos", model.bos_id()),
            ("eos", model.eos_id()),
            ("pad", model.pad_id()),
        )
        if index >= 0
    }
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        beside = file.parent / name
        if beside.is_file():
            settings |= json.loads(beside.read_bytes())
    # The classes of models rebuild the backend in their own way.
    settings = {name: value for name, value in settings.items() if name not in ("tokenizer_class", "auto_map")}
    template = file.parent / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def _working_parts(backend: Any) -> list[Any]:
    definition = json.loads(backend.to_str())
    vocabulary = definition["model"]["vocab"]
    if isinstance(vocabulary, list):
        # The last digit of a score may differ: they are written in decimal.
        definition["model"]["vocab"] = [piece for piece, _ in vocabulary]
    return [definition[part] for part in ("model", "normalizer", "pre_tokenizer")]


def _check_equal(file: Path, backend: Any) -> Any:
    from tokenizers import Tokenizer

    model = _processor(file)
    # Texts of control pieces are plain text for SentencePiece.
    plain = Tokenizer.from_str(backend.to_str())
    plain.encode_special_tokens = True
    controls = [
        model.id_to_piece(index)
        for index in range(min(model.vocab_size(), 1000))
        if model.is_control(index) or model.is_unknown(index) or model.is_byte(index)
    ]
    added = [token.content for token in plain.get_added_tokens_decoder().values()]
    texts = stress_texts([*controls[:16], *[token for token in added if token not in controls][:64]])
    encodings = plain.encode_batch(texts, add_special_tokens=False)
    for text, encoding, expected in zip(texts, encodings, model.encode(texts), strict=True):
        if encoding.ids != expected:
            shown = text if len(text) <= 60 else f"{text[:60]}..."
            raise _NotConvertibleError(f"they differ on {shown!r}")
    return backend


def _processor(file: Path) -> Any:
    """The SentencePieceProcessor of `file`; None when it is no SentencePiece model."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
    except RuntimeError:
        return None
