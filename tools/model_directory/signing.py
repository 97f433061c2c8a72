"""Signatures of models by model_signing (https://github.com/sigstore/model-transparency), with a key and offline.

    openssl ecparam -name prime256v1 -genkey -noout -out key.pem
    openssl ec -in key.pem -pubout -out key.pub

`model.sig` beside the files is a Sigstore bundle over all of them: `model_signing verify key` reads it too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.model_directory.writing import SIGNATURE_NAME
from trainer.errors import DataError, MissingInputError, NotEqualError, UsageError

INSTALL = "pip install -e '.[sign]'"


def require_signing() -> None:
    """UsageError when the extra is not installed: to be called before hours of work."""
    _model_signing()


def require_key(key: Path) -> None:
    """MissingInputError when there is no file `key`."""
    if not key.is_file():
        raise MissingInputError(
            f"there is no key {key}", "openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
        )


def sign(model: Path, private_key: Path) -> Path:
    """Sign all files in `model` with an unencrypted PEM key on a NIST curve; returns the signature file.

    Raises DataError when the key cannot be used, UsageError when model_signing is not installed.
    """
    signing, _, hashing = _model_signing()
    signature = model / SIGNATURE_NAME
    require_key(private_key)
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)
    except Exception as error:
        raise _bad_key(private_key, error) from error
    config.set_hashing_config(_every_file(hashing)).sign(model, signature)
    return signature


def check_signature(model: Path, public_key: Path) -> None:
    """NotEqualError naming what differs from what the owner of the key signed; MissingInputError without signature."""
    _, verifying, hashing = _model_signing()
    signature = model / SIGNATURE_NAME
    require_key(public_key)
    if not signature.is_file():
        raise MissingInputError(f"{model} has no {SIGNATURE_NAME}", "export with --sign KEY, or ask whoever made it")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:
        raise _bad_key(public_key, error) from error
    try:
        config.set_hashing_config(_every_file(hashing)).verify(model, signature)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NotEqualError(
            f"{model} is not what the owner of {public_key} signed: {reason}", "do not use it"
        ) from error


def _every_file(hashing: Any) -> Any:
    # The library leaves out what git owns by default; here everything in the directory counts.
    return hashing.Config().set_ignored_paths(paths=[SIGNATURE_NAME], ignore_git_paths=False)


def _bad_key(key: Path, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(f"{key} is no key that can be used: {reason}", "give an unencrypted PEM key on curve prime256v1")


def _model_signing() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ModuleNotFoundError as error:
        raise UsageError(f"signatures need a package that is not installed ({error.name})", INSTALL) from error
    return signing, verifying, hashing
