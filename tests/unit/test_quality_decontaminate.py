import pickle
import random

import pytest

from trainer.data.quality.decontaminate import build_index, contamination

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
SHORT = "How many clips did she sell?"
CHINESE = "娜塔莉亚在四月份向她的四十八位朋友出售了发夹，然后在五月份卖出了一半数量的发夹。"
INDEX = build_index([QUESTION, SHORT, CHINESE, "Yes.", "北京"])


def test_what_is_indexed_is_counted() -> None:
    assert (INDEX.texts, INDEX.too_short, INDEX.lengths) == (3, 2, (6, 13, 20))
    assert (INDEX.hashes[1:] > INDEX.hashes[:-1]).all()
    assert contamination(QUESTION, pickle.loads(pickle.dumps(INDEX))) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        f"Solve this.\n{QUESTION} Thanks",
        QUESTION.upper().replace(",", " --"),
        "she said: " + " ".join(QUESTION.split()[2:15]),
        f"Then: how many CLIPS did\nshe sell??? {'x ' * 40}",
        f"请回答：{CHINESE[5:26]}吗",
    ],
)
def test_copies_are_found(text: str) -> None:
    assert 0 < contamination(text, INDEX) <= 1


@pytest.mark.parametrize(
    "text",
    [
        " ".join(QUESTION.split()[:12]) + " something else",
        "Natalia sold 48 clips. " * 5,
        CHINESE[:19],
        "Yes. 北京",
        "did she sell how many clips",
        "",
    ],
)
def test_other_texts_are_clean(text: str) -> None:
    assert contamination(text, INDEX) == 0.0


def test_the_share_is_of_words() -> None:
    filler = [f"w{i}" for i in random.Random(0).sample(range(1000), 60)]
    assert contamination(" ".join(filler + QUESTION.split()[:15]), INDEX) == pytest.approx(15 / 75)
    assert contamination("anything", build_index([])) == 0.0
