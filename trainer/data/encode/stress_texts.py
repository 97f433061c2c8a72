"""Texts on which two tokenizers that are not the same are likely to differ."""

from __future__ import annotations

import random
from collections.abc import Sequence

STRESS_TEXTS = (
    "",
    " ",
    "   leading and trailing   ",
    "\n\n\n",
    "a\r\nb\tc\n",
    "0123456789 3.14159 2024-02-29",
    "😀👩‍👩‍👧‍👦🇨🇳 e\u0301 é ﬁ Ａ",
    "汉字漢字かなカナ한글，。！？「」",
    "zero\u200bwidth\u200djoiner\ufeff\u2060",
    "\x01\x02\x1f\x7f\x85\u2028\u2029\u00a0\u3000",
    "<|im_start|>user\nhello<|im_end|>\n<|pad|><unk></s><0x41>",
    "مرحبا שלום नमस्ते ไทย 𝔘𝔫𝔦 𐍈",
    "    def f(x):\n\t    return {'a': [1, 2]}  # ----====\n",
    "aaaaaaaaaaaaaaaaaaaaaaa bbbbbbbb abababababa",
)

_MORE = (
    "I'm you'RE we'Ve they'LL he'D it'S don't 'ſ 'K rock'n'roll ''s",
    "CamelCaseWord XMLHttpRequest straßE ǅ İstanbul ıI ŉ",
    "1234567890" * 12,
    "٣٤٥ ²³ ½ Ⅷ 一二三 １２３ ①②",
    "a  b   c    d \n e\n  f\t\tg \t h\u00a0\u00a0i\u3000j\u2003 k",
    " \n \r\n\r\n\t\n  \n",
    "\n  x\n\n\ny   \n",
    "x \x00 y\x00\x00\x1c\x1d\x1e\x1f\x7f",
    "....,,,,!!!!????----====////\n\n::: ;;;\n~~~",
    "http://a.b/c?d=e&f=g#h <a href='x'>y</a> C:\\dir\\file.txt $x^2$ a_b_c __init__",
    "한국어 ᄒ\u1161ᆫ e\u0301\u0323 a\u0315\u0300\u05ae\u0300\u0062 \u0958 \u2126 \u212b \uf900 \u0344",
    "👍🏽🏳️‍🌈 ☎️ ✔ ♥ \U0001f468\u200d\U0001f4bb \ufffd \ufffe \U0010fffd \ue000",
    "เธอรักฉัน ກຂ ကမ္မ ខ្មែរ ཀཿ ꦗꦮ",
    "a" * 300 + " " * 300 + "!" * 300 + "汉" * 300 + "\n" * 300 + "7" * 300,
    "the The THE tHe" * 20,
)

_POOLS = (
    "abc ABC xyz \n\t.,!?'\"()1234567890",
    "汉字，。！的是不了在 おカ한",
    "éüßñ\u0301\u0327\u200b\u3000\u00a0ﬁＡ①ſ",
    "😀👩\u200d👧🇨🇳\ufe0f",
    "\x00\x01\x1c\x1f\x7f\x85\u2028\r\n  ",
)


def stress_texts(tokens: Sequence[str] = ()) -> list[str]:
    """STRESS_TEXTS, more of their kind, `tokens` in several surroundings, and random Unicode by a fixed seed."""
    around = (("", ""), ("a", "b"), (" ", " "), ("a ", " b"), ("\n", "\n"), ("\u3000\t", "\u00a0\x1f"), ("汉", "字"))
    texts = [*STRESS_TEXTS, *_MORE]
    texts += [f"{before}{token}{after}" for token in tokens for before, after in around]
    texts += [f"{token}{token} {token[:-1]}{token[1:]}" for token in tokens]
    source = random.Random(0)
    for _ in range(300):
        characters = [_character(source) for _ in range(source.randint(1, 40))]
        for token in source.choices(tokens, k=source.randint(0, 2)) if tokens else ():
            characters.insert(source.randint(0, len(characters)), token)
        texts.append("".join(characters))
    return texts


def _character(source: random.Random) -> str:
    if source.random() < 0.9:
        return source.choice(source.choice(_POOLS))
    return chr(
        source.choice((source.randint(0x80, 0x2FFF), source.randint(0xA000, 0xD7FF), source.randint(0x1D000, 0x1FFFF)))
    )
