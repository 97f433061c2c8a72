"""Personal data and secrets to typed placeholders, each kind with a validator, so that numbers stay numbers.

A pattern only proposes; a checksum, a table of prefixes or the standard library decides. What is replaced:

    api_key    well-known prefixes (OpenAI, AWS, GitHub, ...) with a random-looking rest, JSON web tokens, private keys
    email      but no package versions, file names (icon@2x.png) or git@ addresses of repositories
    iban       length of the country and the remainder modulo 97 (ISO 13616)
    cn_id      18-digit identity numbers of China: province, date and ISO 7064 MOD 11-2 checksum (GB 11643)
    card       payment cards: issuer prefix, its lengths, usual grouping and the Luhn checksum (ISO/IEC 7812)
    cn_mobile  11-digit mobile numbers of China with an assigned prefix, +86 or not
    ipv6, ipv4 addresses of hosts, private networks too; no loopback, networks, masks, multicast, versions or sections
    phone      international numbers written with +; off unless asked for

A checksum of one digit lets one random number in ten through: a 16-digit identifier that looks like a card in every
other way is replaced now and then.
"""

from __future__ import annotations

import ipaddress
import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from hashlib import blake2b

from trainer.data.quality.text import map_text
from trainer.data.records import Record
from trainer.errors import UsageError

DEFAULT_KINDS = ("api_key", "email", "iban", "cn_id", "card", "cn_mobile", "ipv6", "ipv4")
KINDS = (*DEFAULT_KINDS, "phone")  # in order of precedence where two would overlap
MIN_ENTROPY = 3.0  # bits a character of the random part of a key (Shannon); words and XXXX are below


@dataclass(frozen=True)
class Finding:
    """text[start:stop] is a `kind`; `value` is its canonical form: equal for two spellings of the same thing."""

    kind: str
    start: int
    stop: int
    value: str


def replace_pii(text: str, kinds: Sequence[str] = DEFAULT_KINDS, salt: str = "") -> tuple[str, Counter[str]]:
    """(text with placeholders, replacements of each kind).

    Without a salt a placeholder is `[EMAIL]`. With one it is `[EMAIL_1a2b3c]`: 24 bits of a keyed hash of the value, so
    that equal values stay equal over the whole data set and nobody without the salt can try values out.

    Raises:
        UsageError: an unknown kind.
    """
    pieces, counts, last = [], Counter[str](), 0
    for finding in find_pii(text, kinds):
        pieces += [text[last : finding.start], placeholder(finding, salt)]
        counts[finding.kind] += 1
        last = finding.stop
    return ("".join([*pieces, text[last:]]), counts) if counts else (text, counts)


def replace_pii_in(record: Record, kinds: Sequence[str] = DEFAULT_KINDS, salt: str = "") -> tuple[Record, Counter[str]]:
    """`replace_pii` over every text of a record; a `TokenIds` has none and stays."""
    counts = Counter[str]()

    def change(text: str) -> str:
        replaced, found = replace_pii(text, kinds, salt)
        counts.update(found)
        return replaced

    return map_text(record, change), counts


def placeholder(finding: Finding, salt: str = "") -> str:
    """`[KIND]`, or `[KIND_1a2b3c]` with a salt."""
    if not salt:
        return f"[{finding.kind.upper()}]"
    key = blake2b(salt.encode(), digest_size=32).digest()
    digest = blake2b(f"{finding.kind}:{finding.value}".encode(), key=key, digest_size=3).hexdigest()
    return f"[{finding.kind.upper()}_{digest}]"


def find_pii(text: str, kinds: Sequence[str] = DEFAULT_KINDS) -> list[Finding]:
    """Findings in order, without overlaps.

    Raises:
        UsageError: an unknown kind.
    """
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise UsageError(f"unknown kind of personal data: {', '.join(unknown)}", f"known: {', '.join(KINDS)}")
    taken: list[Finding] = []  # by start
    for kind in KINDS:
        if kind not in kinds:
            continue
        for found in _FINDERS[kind](text):
            at = bisect_left(taken, found.start, key=lambda other: other.start)
            free_before = at == 0 or taken[at - 1].stop <= found.start
            if free_before and (at == len(taken) or found.stop <= taken[at].start):
                taken.insert(at, found)
    return taken


# --- e-mail -----------------------------------------------------------------------------------------------------------

_EMAIL = re.compile(
    r"(?<![A-Za-z0-9_])([A-Za-z0-9_](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_+-])?)"
    r"@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24})(?![A-Za-z0-9@]|-[A-Za-z0-9])"
)
_FILE_ENDINGS = frozenset(
    ("png", "jpg", "jpeg", "gif", "svg", "webp", "bmp", "ico", "css", "js", "ts", "json", "html", "txt")
)


def _emails(text: str) -> Iterable[Finding]:
    if "@" not in text:
        return
    for match in _EMAIL.finditer(text):
        local, domain = match.groups()
        labels = domain.lower().split(".")
        version = len(labels) > 2 and labels[0].isdigit() and labels[1][0].isdigit()
        if not (version or ".." in local or labels[-1] in _FILE_ENDINGS or local == "git"):
            yield Finding("email", match.start(), match.end(), match.group().lower())


# --- secrets ----------------------------------------------------------------------------------------------------------

_KEY_PREFIXES = (
    r"sk-(?:ant-|proj-|or-|svcacct-)?(?P<a>[A-Za-z0-9_-]{20,200})",
    r"(?:AKIA|ASIA)(?P<b>[A-Z0-9]{16})",
    r"gh[opsur]_(?P<c>[A-Za-z0-9]{36,251})",
    r"github_pat_(?P<d>[A-Za-z0-9_]{50,255})",
    r"glpat-(?P<e>[A-Za-z0-9_-]{20,64})",
    r"xox[abeoprs]-(?P<f>[A-Za-z0-9-]{10,250})",
    r"AIza(?P<g>[A-Za-z0-9_-]{35})",
    r"hf_(?P<h>[A-Za-z0-9]{30,64})",
    r"(?:sk|rk|pk)_(?:live|test)_(?P<i>[A-Za-z0-9]{16,247})",
    r"npm_(?P<j>[A-Za-z0-9]{36})",
    r"pypi-(?P<k>[A-Za-z0-9_-]{50,255})",
    r"SG\.(?P<l>[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43})",
    r"LTAI(?P<m>[A-Za-z0-9]{12,24})",
    r"AKID(?P<n>[A-Za-z0-9]{28,40})",
    r"eyJ(?P<o>[A-Za-z0-9_-]{10,4096}\.eyJ[A-Za-z0-9_-]{10,8192}\.[A-Za-z0-9_-]{10,1024})",
)
_KEY = re.compile(rf"(?<![A-Za-z0-9_-])(?:{'|'.join(_KEY_PREFIXES)})(?![A-Za-z0-9_-])")
_KEY_HINTS = (
    *("sk-", "sk_", "rk_", "pk_", "AKIA", "ASIA", "gho_", "ghp_", "ghr_", "ghs_", "ghu_", "github_pat_", "glpat-"),
    *("xox", "AIza", "hf_", "npm_", "pypi-", "SG.", "LTAI", "AKID", "eyJ"),
)
# A secret has a long run that mixes letters and digits; words-joined-by-hyphens have none.
_LONG_RUN = re.compile(r"[A-Za-z0-9]{8,}")
_PRIVATE_KEY = re.compile(
    r"-----BEGIN ((?:[A-Z]+ ){0,3}PRIVATE KEY)-----(?:[A-Za-z0-9+/=\s:,.]|-(?!-)){40,16384}-----END \1-----"
)


def _keys(text: str) -> Iterable[Finding]:
    if any(hint in text for hint in _KEY_HINTS):
        for match in _KEY.finditer(text):
            secret = match[match.lastgroup] if match.lastgroup else ""
            if _entropy(secret) >= MIN_ENTROPY and any(map(_mixes_letters_and_digits, _LONG_RUN.findall(secret))):
                yield Finding("api_key", match.start(), match.end(), match.group())
    if "PRIVATE KEY-----" in text:
        for match in _PRIVATE_KEY.finditer(text):
            yield Finding("api_key", match.start(), match.end(), match.group())


def _mixes_letters_and_digits(run: str) -> bool:
    return any(map(str.isdigit, run)) and any(map(str.isalpha, run))


def _entropy(text: str) -> float:
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


# --- numbers with a checksum ------------------------------------------------------------------------------------------

# Total length of an IBAN by country (ISO 13616 registry).
_IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO",
        16: "BE",
        18: "DK FI FO GL NL SD",
        19: "MK SI",
        20: "AT BA EE KZ LT LU XK MN",
        21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA",
        23: "AE GI IL IQ TL SO OM",
        24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "PT ST LY",
        26: "IS TR",
        27: "BI DJ FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
        29: "BR EG PS QA UA",
        30: "JO KW MU YE",
        31: "MT SC",
        32: "LC",
        33: "RU",
    }.items()
    for country in countries.split()
}
_IBAN_START = re.compile(r"[A-Z]{2}[0-9]{2} ?[A-Z0-9]{4}")
_LONG_NUMBER = re.compile(r"[0-9][0-9 -]{9}")  # cheap to search for; most texts have none and need no more
_ALPHANUMERIC = re.compile(r"[A-Za-z0-9]")
_CN_ID = re.compile(
    r"(?<![0-9A-Za-z_.])[1-9][0-9]{5}(?:18|19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])"
    r"[0-9]{3}[0-9Xx](?![0-9A-Za-z_])"
)
_CN_PROVINCES = frozenset(
    (*range(11, 16), *range(21, 24), *range(31, 38), *range(41, 47), *range(50, 55), *range(61, 66), 71, 81, 82, 83)
)
_CN_ID_WEIGHTS = [pow(2, 17 - place, 11) for place in range(17)]
_CARD = re.compile(
    r"(?<![0-9A-Za-z_$#+-])(?<![0-9]\.)(?:"
    # 4-4-4-4, and UnionPay's 4-4-4-4-3; one more group of four makes it a row of numbers
    r"(?<![0-9]{4}[ -])[2-6][0-9]{3}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4}(?:\1[0-9]{3}(?![0-9])|(?!\1[0-9]{4}))"
    r"|3[0-9]{3}([ -])[0-9]{6}\2[0-9]{4,5}"  # American Express 4-6-5, Diners Club 4-6-4
    r"|62[0-9]{4}([ -])[0-9]{13}"  # UnionPay 6-13
    r"|[2-6][0-9]{12,18}"
    r")(?![0-9A-Za-z_%]|[.-][0-9])"
)
_CN_MOBILE = re.compile(
    r"(?<![0-9A-Za-z_+$#€£¥￥])(?<![0-9][.-])(?<![A-Za-z][/-])(?:(?:\+|00)?86[- ]?)?"
    r"(1(?:3[0-9]|4[014-9]|5[0-35-9]|6[2567]|7[0-8]|8[0-9]|9[0-35-9]))([- ]?)([0-9]{4})\2([0-9]{4})"
    r"(?![0-9A-Za-z_]|[.-][0-9])(?!\s?(?:%|元|円|万|亿|美元|bytes?\b|[KMG]?i?B\b|km\b|[mn]s\b|USD\b|dollars?\b|people\b|years?\b))"
)


def _ibans(text: str) -> Iterable[Finding]:
    for match in _IBAN_START.finditer(text):
        length = _IBAN_LENGTHS.get(match.group()[:2])
        if length is None or (match.start() and _ALPHANUMERIC.match(text, match.start() - 1)):
            continue
        stop, value = match.start(), ""
        while len(value) < length and stop < len(text):
            character = text[stop]
            if character == " " and value and text[stop - 1] != " ":
                pass
            elif character.isascii() and (character.isdigit() or character.isupper()):
                value += character
            else:
                break
            stop += 1
        if len(value) == length and not _ALPHANUMERIC.match(text, stop) and _mod_97(value) == 1:
            yield Finding("iban", match.start(), stop, value)


def _mod_97(value: str) -> int:
    return int("".join(str(int(character, 36)) for character in value[4:] + value[:4])) % 97


def _cn_ids(text: str) -> Iterable[Finding]:
    for match in _CN_ID.finditer(text) if _LONG_NUMBER.search(text) else ():
        value = match.group().upper()
        if int(value[:2]) in _CN_PROVINCES and _is_date(value[6:14]) and value[17] == _cn_id_check(value):
            yield Finding("cn_id", match.start(), match.end(), value)


def _is_date(digits: str) -> bool:
    try:
        date(int(digits[:4]), int(digits[4:6]), int(digits[6:]))
    except ValueError:
        return False
    return True


def _cn_id_check(value: str) -> str:
    total = sum(weight * int(digit) for weight, digit in zip(_CN_ID_WEIGHTS, value, strict=False))
    return "10X98765432"[total % 11]


def _cards(text: str) -> Iterable[Finding]:
    for match in _CARD.finditer(text) if _LONG_NUMBER.search(text) else ():
        value = match.group().replace(" ", "").replace("-", "")
        if _is_issued(value) and _luhn(value) and not _is_round(value):
            yield Finding("card", match.start(), match.end(), value)


def _is_issued(value: str) -> bool:
    """Whether the issuer of this prefix has cards of this length (maestro is left out: its prefixes say too little)."""
    length, two, three, four = len(value), int(value[:2]), int(value[:3]), int(value[:4])
    if length == 14:
        return 300 <= three <= 305 or two in (36, 38, 39)  # Diners Club
    if length == 15:
        return two in (34, 37)  # American Express
    if value[0] == "4":
        return length in (13, 16, 19)  # Visa
    if length == 16 and (51 <= two <= 55 or 2221 <= four <= 2720):
        return True  # Mastercard
    longer = two in (62, 65) or four == 6011 or 644 <= three <= 649 or 3528 <= four <= 3589
    return longer and 16 <= length <= 19  # UnionPay, Discover, JCB


def _luhn(value: str) -> bool:
    total = 0
    for place, digit in enumerate(map(int, reversed(value))):
        total += digit if place % 2 == 0 else (2 * digit if digit < 5 else 2 * digit - 9)
    return total % 10 == 0


def _is_round(digits: str) -> bool:
    """Numbers people and machines count with: powers of two and their neighbours, many zeros, one digit repeated."""
    value = int(digits)
    near_power = any((value + d) & (value + d - 1) == 0 for d in (-1, 0, 1))
    return near_power or digits.endswith("00000") or len(set(digits[1:])) == 1


def _cn_mobiles(text: str) -> Iterable[Finding]:
    for match in _CN_MOBILE.finditer(text) if _LONG_NUMBER.search(text) else ():
        value = match[1] + match[3] + match[4]
        if not _is_round(value):
            yield Finding("cn_mobile", match.start(), match.end(), value)


# --- addresses --------------------------------------------------------------------------------------------------------

_IPV4_HINT = re.compile(r"\.[0-9]{1,3}\.[0-9]")
_IPV4 = re.compile(
    r"(?<![A-Za-z0-9_+*^$])(?<![0-9]\.)(?<![A-Za-z]-)(?:[0-9]{1,3}\.){3}[0-9]{1,3}"
    r"(?![A-Za-z0-9_%]|\.[0-9]|-[0-9](?![0-9.]*\.))"
)
_NO_ADDRESS_BEFORE = re.compile(
    r"(?:(?<![A-Za-z])(?:versions?|v|ver|release|build|firmware|rev|revision|section|chapter|clause|figure|oid)"
    r"|§|版本|章节|固件|第)(?:[.:\"'=： ]|号|为|是|is\b|v\b|to\b|and\b|number\b|[0-9][0-9.]*){0,6}$"
    r"|[A-Za-z]/$|[=<>~^!]=\s?$",
    re.IGNORECASE,
)
_IPV6_HINT = re.compile(r":[0-9A-Fa-f]{0,4}:")
_IPV6 = re.compile(r"(?<![A-Za-z0-9_:.])(?:[0-9A-Fa-f]{1,4}:{1,2}){1,8}(?:[0-9A-Fa-f]{1,4})?(?![A-Za-z0-9_:]|\.[0-9])")


def _ipv4s(text: str) -> Iterable[Finding]:
    for match in _IPV4.finditer(text) if _IPV4_HINT.search(text) else ():
        try:
            address = ipaddress.IPv4Address(match.group())
        except ValueError:
            continue
        octets = address.packed
        if octets[0] == 0 or octets[0] == 255 or octets[3] in (0, 255) or address.is_loopback or address.is_multicast:
            continue
        if not _NO_ADDRESS_BEFORE.search(text[max(match.start() - 24, 0) : match.start()]):
            yield Finding("ipv4", match.start(), match.end(), str(address))


def _ipv6s(text: str) -> Iterable[Finding]:
    for match in _IPV6.finditer(text) if _IPV6_HINT.search(text) else ():
        spelled = match.group()
        if spelled.endswith(":") and not spelled.endswith("::"):
            spelled = spelled[:-1]  # a colon of the sentence
        try:
            address = ipaddress.IPv6Address(spelled)
        except ValueError:
            continue
        # Global unicast (2000::/3) and unique local (fc00::/7); this also leaves out a::b of program text.
        if address.packed[0] >> 5 == 0b001 or address.packed[0] >> 1 == 0b1111110:
            yield Finding("ipv6", match.start(), match.start() + len(spelled), str(address))


_PHONE = re.compile(r"(?<![A-Za-z0-9_+.,*/^)-])\+[1-9](?:[ .()-]{0,2}[0-9]){7,14}(?![A-Za-z0-9_%]|[.,][0-9])")


def _phones(text: str) -> Iterable[Finding]:
    for match in _PHONE.finditer(text):
        digits = "".join(filter(str.isdigit, match.group()))
        yield Finding("phone", match.start(), match.end(), f"+{digits}")


_FINDERS: dict[str, Callable[[str], Iterable[Finding]]] = {
    "api_key": _keys,
    "email": _emails,
    "iban": _ibans,
    "cn_id": _cn_ids,
    "card": _cards,
    "cn_mobile": _cn_mobiles,
    "ipv6": _ipv6s,
    "ipv4": _ipv4s,
    "phone": _phones,
}
