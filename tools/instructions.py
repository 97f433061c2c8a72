"""A small bilingual instruction set with answers that can be checked: what the demo trains on.

Six families in English and Chinese: addition written out digit by digit, sorting, date arithmetic, unit
conversion, slot extraction and sentiment. Everything follows from the seed. A share of the records are sessions of
many questions, longer than a training row, so that sliding windows have something to do. No held-out prompt occurs in
the training part, inside sessions neither.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from trainer.durable import write_file


@dataclass(frozen=True)
class Question:
    """One prompt with its only right answer."""

    family: str
    prompt: str
    answer: str


MONTHS = [
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
]  # fmt: skip
UNITS = {
    "en": [("cm", "mm", 10), ("m", "cm", 100), ("km", "m", 1000), ("kg", "g", 1000), ("euros", "cents", 100)],
    "zh": [("厘米", "毫米", 10), ("米", "厘米", 100), ("公里", "米", 1000), ("公斤", "克", 1000), ("元", "分", 100)],
}
PEOPLE = {
    "en": ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo"],
    "zh": ["小明", "小红", "小华", "小丽", "小刚", "小芳", "小军", "小燕", "小强", "小梅", "小龙", "小云"],
}
THINGS = {
    "en": ["tea", "coffee", "bread", "rice", "apples", "milk", "paper", "pens", "soap", "eggs"],
    "zh": ["茶", "咖啡", "面包", "米饭", "苹果", "牛奶", "纸", "钢笔", "肥皂", "鸡蛋"],
}
SUBJECTS = {
    "en": ["The film", "The room", "The food", "The book", "The service", "The phone", "The hotel", "The music"],
    "zh": ["这部电影", "这个房间", "这顿饭", "这本书", "这项服务", "这部手机", "这家酒店", "这段音乐"],
}
GOOD = {
    "en": ["wonderful", "excellent", "lovely", "great", "superb"],
    "zh": ["很棒", "非常好", "令人满意", "很出色", "太好了"],
}
BAD = {
    "en": ["terrible", "awful", "boring", "poor", "dreadful"],
    "zh": ["很糟糕", "非常差", "令人失望", "很无聊", "太差了"],
}
ENDINGS = {
    "en": ["I stayed for {n} days.", "I paid {n} dollars.", "We were {n} people.", "It took {n} hours."],
    "zh": ["我待了{n}天。", "我花了{n}元。", "我们有{n}个人。", "用了{n}个小时。"],
}


def addition(random: Random, language: str) -> Question:
    """Two two-digit numbers; the answer shows each column with its carry, then the sum."""
    left, right = random.randint(10, 99), random.randint(10, 99)
    ones = left % 10 + right % 10
    carry = ones // 10
    tens = left // 10 + right // 10 + carry
    steps = f"{left % 10}+{right % 10}={ones}, {left // 10}+{right // 10}+{carry}={tens}"
    prompt = f"Add {left} and {right}." if language == "en" else f"{left}加{right}等于多少？"
    return Question("addition", prompt, f"{steps}: {left + right}")


def sorting(random: Random, language: str) -> Question:
    """Four different digits in ascending order."""
    digits = random.sample(range(10), 4)
    listed = " ".join(map(str, digits))
    prompt = f"Sort these digits: {listed}" if language == "en" else f"把这些数字从小到大排列：{listed}"
    return Question("sorting", prompt, " ".join(map(str, sorted(digits))))


def date(random: Random, language: str) -> Question:
    """The date some days after another, within ten days of the same month; the answer shows the sum it rests on."""
    month, later = random.randrange(12), random.randint(1, 8)
    day = 10 * random.randint(0, 2) + random.randint(1, 9 - later)
    step = f"{day % 10}+{later}={day % 10 + later}"
    if language == "en":
        prompt = f"Which date is {later} days after {day} {MONTHS[month]}?"
        return Question("date", prompt, f"{step}: {day + later} {MONTHS[month]}")
    return Question("date", f"{month + 1}月{day}日之后{later}天是哪一天？", f"{step}: {month + 1}月{day + later}日")


def conversion(random: Random, language: str) -> Question:
    """A whole number of one unit in a smaller one."""
    (large, small, factor), count = random.choice(UNITS[language]), random.randint(2, 99)
    if language == "en":
        return Question("conversion", f"Convert {count} {large} to {small}.", f"{count * factor} {small}")
    return Question("conversion", f"{count}{large}等于多少{small}？", f"{count * factor}{small}")


def slots(random: Random, language: str) -> Question:
    """Who wants how much of what, and when."""
    person, thing = random.choice(PEOPLE[language]), random.choice(THINGS[language])
    count, hour = random.randint(2, 9), random.randint(8, 20)
    if language == "en":
        text = random.choice(
            [
                f"{person} would like {count} packs of {thing} at {hour}:00.",
                f"At {hour}:00 please bring {count} packs of {thing} to {person}.",
            ]
        )
        return Question(
            "slots", f"Extract the order: {text}", f"name={person}; item={thing}; count={count}; time={hour}:00"
        )
    text = random.choice([f"{person}想在{hour}点要{count}份{thing}。", f"请在{hour}点给{person}送{count}份{thing}。"])
    return Question("slots", f"提取订单：{text}", f"姓名={person}；物品={thing}；数量={count}；时间={hour}点")


def sentiment(random: Random, language: str) -> Question:
    """Positive or negative, the verdict hidden beside something that does not matter."""
    good = random.random() < 0.5
    word = random.choice((GOOD if good else BAD)[language])
    subject = random.choice(SUBJECTS[language])
    ending = random.choice(ENDINGS[language]).format(n=random.randint(2, 60))
    if language == "en":
        parts = [f"{subject} was {word}.", ending]
        random.shuffle(parts)
        return Question("sentiment", f"Positive or negative? {' '.join(parts)}", "positive" if good else "negative")
    parts = [f"{subject}{word}。", ending]
    random.shuffle(parts)
    return Question("sentiment", f"这条评价是正面还是负面？{''.join(parts)}", "正面" if good else "负面")


FAMILIES: Sequence[Callable[[Random, str], Question]] = (addition, sorting, date, conversion, slots, sentiment)


def draw(random: Random) -> Question:
    """One question of a random family and language."""
    return random.choice(FAMILIES)(random, random.choice(["en", "zh"]))


def write_instructions(out: Path, *, seed: int, records: int, held_out: int, session_share: float = 0.04) -> None:
    """Write out/train.jsonl and out/held_out.jsonl (OpenAI messages, one record a line, with `family`).

    `session_share` of the training records are sessions of 12 to 30 questions.
    """
    random = Random(seed)
    held: dict[str, Question] = {}
    while len(held) < held_out:
        question = draw(random)
        held[question.prompt] = question

    def unseen() -> Question:
        while (question := draw(random)).prompt in held:
            pass
        return question

    train = [
        [unseen() for _ in range(random.randint(12, 30) if random.random() < session_share else 1)]
        for _ in range(records)
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "train.jsonl", "".join(map(_line, train)))
    write_file(out / "held_out.jsonl", "".join(_line([question]) for question in held.values()))


def _line(questions: Sequence[Question]) -> str:
    messages = [
        message
        for question in questions
        for message in (
            {"role": "user", "content": question.prompt},
            {"role": "assistant", "content": question.answer},
        )
    ]
    record: dict[str, Any] = {"messages": messages, "family": questions[0].family if len(questions) == 1 else "session"}
    return json.dumps(record, ensure_ascii=False) + "\n"
