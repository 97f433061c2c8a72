"""What is hidden, what is not, and that the hiding takes no time."""

import io
import json

import pytest

from trainer.redact import HIDDEN, RedactedStream, is_secret_name, redact, redacted

SECRET = "qX7-unguessable/+value=="


@pytest.mark.parametrize(
    "text",
    [
        f"fetching https://me:{SECRET[:8]}@host/store failed",
        f"s3://{SECRET[:8]}@bucket/x",
        f"https://host/x?X-Amz-Signature={SECRET[:8]}&a=1",
        f"https://host/x?sig={SECRET[:8]}",
        f'{{"api_key": "{SECRET[:8]}"}}',
        f"Authorization: Bearer {SECRET[:8]}",
        f"password={SECRET[:8]}",
        f"hf_token={SECRET[:8]}",
    ],
)
def test_what_stands_around_a_secret_betrays_it(text):
    hidden = redact(text, {})
    assert SECRET[:8] not in hidden
    assert HIDDEN in hidden
    assert redact(hidden, {}) == hidden, "hiding twice changes nothing"


@pytest.mark.parametrize(
    "token",
    ["hf_" + "aB3" * 12, "ghp_" + "x1" * 18, "sk-" + "a1B2" * 8, "AKIA" + "A1B2" * 4, "glpat-" + "a1_B" * 5,
     "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.SflKxwRJSMeKKF2QT4"],
)  # fmt: skip
def test_common_tokens_are_known_by_their_shape(token):
    assert redact(f"got {token}, stopping", {}) == f"got {HIDDEN}, stopping"


def test_values_of_secret_variables_are_hidden_in_every_spelling():
    environ = {"HF_TOKEN": SECRET, "AWS_SECRET_ACCESS_KEY": "two\nlines of it", "MY_KEY": "1", "HOME": "/home/me/x"}
    for text in (SECRET, f"x{SECRET}y", "qX7-unguessable%2F%2Bvalue%3D%3D", json.dumps("two\nlines of it")):
        assert HIDDEN in redact(text, environ)
        assert "unguessable" not in redact(text, environ)
        assert "lines of it" not in redact(text, environ)
    assert redact("1 of /home/me/x", environ) == "1 of /home/me/x"


@pytest.mark.parametrize(
    "text",
    [
        "step 3/10  loss 2.1  1234 tokens/s",
        "tokens_seen: 123456789, supervised_tokens=12345678",
        'sed "s/a@b/c/" ssh me@host.example',
        "the token store out/store was built with another tokenizer: tokenizer: 0123456789abcdef",
        "https://host/store/tokens/00000.safetensors",
        "optimizer.learning_rate=1e-05",
        "eos_token: <|im_end|>",
        "bos_token_id: 12345678901",
    ],
)
def test_ordinary_text_stays(text):
    assert redact(text, {}) == text


def test_names_of_secret_variables():
    for name in (
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "STEADFAST_API_KEY",
        "WANDB_API_KEY",
        "DB_PASSWORD",
    ):
        assert is_secret_name(name), name
    for name in ("TOKENIZERS_PARALLELISM", "SSH_AUTH_SOCK", "HOME", "RAY_AUTH_TOKEN_PATH", "AWS_ACCESS_KEY_ID"):
        assert not is_secret_name(name), name


def test_values_and_streams(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert redacted({"a": [SECRET, 1, None], SECRET: 2.5}) == {"a": [HIDDEN, 1, None], HIDDEN: 2.5}
    plain = io.StringIO()
    stream = RedactedStream(plain)
    assert stream.write(f"is {SECRET}\n") == len(SECRET) + 4
    stream.writelines([SECRET])
    assert plain.getvalue() == f"is {HIDDEN}\n{HIDDEN}"
    assert not stream.isatty()
