from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.quality.pii import KINDS, find_pii, replace_pii, replace_pii_in
from trainer.data.records import Conversation
from trainer.errors import UsageError


def with_luhn(digits: str) -> str:
    return next(
        digits + last
        for last in "0123456789"
        if sum(int(c) if i % 2 == 0 else sum(divmod(2 * int(c), 10)) for i, c in enumerate(reversed(digits + last)))
        % 10
        == 0
    )


def with_mod_97(country: str, account: str) -> str:
    as_number = "".join(str(int(c, 36)) for c in account + country)
    return f"{country}{98 - int(as_number + '00') % 97:02d}{account}"


def with_id_check(digits: str) -> str:
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    return digits + "10X98765432"[sum(w * int(d) for w, d in zip(weights, digits, strict=True)) % 11]


def in_fours(digits: str) -> str:
    return " ".join(digits[i : i + 4] for i in range(0, len(digits), 4))


# Made from parts, so that no scanner takes this file for a leak.
RANDOM = "a8F3kQz9Lm2Xc7Vb4Nw6Rt1Yp5Hj0Gd8Se3Ua7Ti2"
SECRETS = [
    "sk-" + RANDOM,
    "sk-" + "proj-" + RANDOM,
    "AK" + "IA" + "Q7Z3M8X2C9V4B1N6",
    "gh" + "p_" + RANDOM[:36],
    "github" + "_pat_" + RANDOM + "_" + RANDOM,
    "glpat" + "-" + RANDOM[:20],
    "xox" + "b-123456789012-" + RANDOM[:24],
    "AI" + "za" + RANDOM[:35],
    "h" + "f_" + RANDOM[:34],
    "sk" + "_live_" + RANDOM[:24],
    "LT" + "AI" + RANDOM[:20],
    "ey" + "J" + RANDOM + ".ey" + "J" + RANDOM + RANDOM + "." + RANDOM,
    "-----BEGIN " + "RSA PRIVATE KEY-----\n" + (RANDOM + "\n") * 5 + "-----END RSA PRIVATE KEY-----",
]
VISA, MASTERCARD, AMEX = with_luhn("453201511283036"), with_luhn("550000000000567"), with_luhn("37828224631067")
UNIONPAY = with_luhn("622848040256489001")
GERMAN, BRITISH = with_mod_97("DE", "370400440532013000"), with_mod_97("GB", "WEST12345698765432")
IDENTITY = with_id_check("11010519491231002")

TRUE = {
    "email": [
        ("write to jane.doe+news@mail.example.co.uk.", "jane.doe+news@mail.example.co.uk"),
        ("邮箱zhang_san@163.com,谢谢", "zhang_san@163.com"),
        ("<a@b.io>", "a@b.io"),
        ("-x_1@example.com-", "x_1@example.com"),
    ],
    "cn_mobile": [
        ("电话13912345678，谢谢", "13912345678"),
        ("+86 139-1234-5678", "+86 139-1234-5678"),
        ("tel:8613912345678", "8613912345678"),
        ("name,13912345678,3", "13912345678"),
        ("13912345678/010", "13912345678"),
    ],
    "cn_id": [(f"身份证号{IDENTITY}。", IDENTITY), (f"id {IDENTITY.lower()} ok", IDENTITY.lower())],
    "card": [
        (f"card {VISA}.", VISA),
        (f"card {in_fours(VISA)} 12/27", in_fours(VISA)),
        (f"{MASTERCARD[:4]}-{MASTERCARD[4:8]}-{MASTERCARD[8:12]}-{MASTERCARD[12:]}", None),
        (f"{AMEX[:4]} {AMEX[4:10]} {AMEX[10:]}", None),
        (f"卡号{UNIONPAY}", UNIONPAY),
        (in_fours(UNIONPAY), None),
        (f"a,{VISA},123", VISA),
    ],
    "ipv4": [
        ("ping 8.8.4.4, please", "8.8.4.4"),
        ("地址10.12.0.7。", "10.12.0.7"),
        ("http://203.0.113.9:8080/", "203.0.113.9"),
        ("the server 203.0.113.9 is down", "203.0.113.9"),
        ("22,203.0.113.9,up", "203.0.113.9"),
    ],
    "ipv6": [
        ("see 2001:db8::8a2e:370:7334.", "2001:db8::8a2e:370:7334"),
        ("host 2001:4860:4860::8888: up", "2001:4860:4860::8888"),
        ("[fd12:3456:789a:1::1]:80", "fd12:3456:789a:1::1"),
        ("2001:0db8:85a3:0000:0000:8a2e:0370:7334", None),
    ],
    "iban": [
        (f"IBAN {GERMAN}.", GERMAN),
        (f"IBAN: {in_fours(GERMAN)} ABC", in_fours(GERMAN)),
        (f"({BRITISH})", BRITISH),
    ],
    "api_key": [(f'key = "{secret}"', secret) for secret in SECRETS],
    "phone": [
        ("call +1 (415) 555-2671 now", "+1 (415) 555-2671"),
        ("+442071838750", None),
        ("+49 30 901820", None),
    ],
}

FALSE = [
    # prices, quantities, years, dates, scores
    "It costs $13,912,345,678 or 13912345678 元, that is 13.9 billion.",
    "1,234,567.89 + 2.50 = 1,234,570.39",
    "1999-2004, 2010 2011 2012 2013 and 20240131 at 12:34:56.789",
    "pi is 3.14159265358979 and e is 2.718281828459045235",
    "0.13912345678 0.4532015112830366 -4.5",
    "13800000000 people, 17179869184 bytes, 2^34 = 17179869184",
    "4503599627370496 9007199254740992 4611686018427387904 6364136223846793005",
    # tables of numbers
    "4100 4200 4300 4400 4500\n5100 5200 5300 5400 5500\n",
    "| 4 5 3 2 0 1 5 1 1 2 8 3 0 3 6 6 |",
    "4532,0151,1283,0366",
    # versions, sections, packages, networks
    "v1.2.3.4 and version 1.2.3.4, Version: 10.1.2.3 to 10.1.2.4, ver. 2.3.4.5",
    "版本号为1.2.3.4，第1.2.3.4节，§ 4.1.2.3",
    "pip install thing==1.2.3.4; Chrome/12.0.41.7; thing-1.2.3.4.tar.gz; 1.3.6.1.4.1.311",
    "127.0.0.1 0.0.0.0 255.255.255.0 10.0.0.0/8 224.0.0.1 999.1.1.1 1.2.3",
    # program text
    "std::vector<int> a::b; x[1::2]; A::B::C; dead::beef; 00:1A:2B:3C:4D:5E; 12:30:45",
    "git@github.com:org/repo.git npm i lodash@4.17.21-beta.rc react@18.2.0 icon@2x.png",
    "@pytest.mark.skip user@host y = A@B",
    "id_13912345678 x13912345678y 0x13912345678 139123456789 1612345678901",
    "commit 3f786850e387550fdab836ed7e6dc881de23001b uuid 4532a151-1283-4036-8283-4532015112830",
    "import sk-learn; sk-this-is-a-long-page-name-about-tea; sk-xxxxxxxxxxxxxxxxxxxxxxxx; hf_hub_download",
    "AK" + "IA" + "XXXXXXXXXXXXXXXX",
    # the checksum is wrong
    VISA[:-1] + str((int(VISA[-1]) + 1) % 10),
    GERMAN[:-1] + str((int(GERMAN[-1]) + 1) % 10),
    IDENTITY[:-1] + ("1" if IDENTITY[-1] != "1" else "2"),
    # no such day, no such province
    with_id_check("11010519490231002"),
    with_id_check("99010519491231002"),
    # no such issuer, length or country
    with_luhn("753201511283036"),
    with_luhn("45320151128303"),
    with_mod_97("ZZ", "370400440532013000"),
    "+1 23 +1234567 a+12345678 5+12345678",
]


@pytest.mark.parametrize(("kind", "text", "found"), [(k, t, f) for k, cases in TRUE.items() for t, f in cases])
def test_found_and_nothing_around_it(kind: str, text: str, found: str | None) -> None:
    findings = find_pii(text, KINDS)
    assert [(f.kind, text[f.start : f.stop]) for f in findings] == [(kind, found or text)]


@pytest.mark.parametrize("text", FALSE)
def test_numbers_and_code_stay(text: str) -> None:
    assert replace_pii(text, KINDS, "salt") == (text, Counter())


def test_equal_values_get_equal_placeholders_under_one_salt() -> None:
    text = f"{GERMAN} {in_fours(GERMAN)}, A@b.io a@B.io c@d.io"
    replaced, counts = replace_pii(text, KINDS, "salt")
    bank, same_bank, mail, same_mail, other_mail = replaced.replace(",", "").split()
    assert bank == same_bank
    assert mail == same_mail != other_mail
    assert mail.startswith("[EMAIL_")
    assert len(mail) == len("[EMAIL_1a2b3c]")
    assert counts == {"iban": 2, "email": 3}
    assert replace_pii(text, KINDS, "pepper")[0] != replaced
    assert replace_pii("a@b.io", KINDS)[0] == "[EMAIL]"


def test_only_the_kinds_that_were_asked_for() -> None:
    text = "a@b.io 8.8.4.4 +442071838750"
    assert replace_pii(text, ["ipv4"])[0] == "a@b.io [IPV4] +442071838750"
    assert replace_pii(text)[0] == "[EMAIL] [IPV4] +442071838750"
    with pytest.raises(UsageError, match="passport"):
        replace_pii(text, ["passport"])


PIECES = [text for cases in TRUE.values() for text, _ in cases] + FALSE


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=20), max_size=6), st.sampled_from(["", " ", "\n", "，"]))
@settings(max_examples=150, deadline=None)
def test_findings_never_overlap_and_the_rest_is_kept(pieces: list[str], between: str) -> None:
    text = between.join(pieces)
    findings = find_pii(text, KINDS)
    assert all(a.stop <= b.start for a, b in pairwise(findings))
    replaced, counts = replace_pii(text, KINDS, "salt")
    assert counts.total() == len(findings)
    kept = [text[a:b] for a, b in zip([0, *(f.stop for f in findings)], [*(f.start for f in findings), None])]  # noqa: B905
    for piece in kept:
        assert piece in replaced


@pytest.mark.parametrize(
    "text",
    [
        "a" * 200_000,
        "a@" * 50_000,
        "1 " * 50_000,
        "1.1." * 50_000,
        "a:" * 50_000,
        "+1" * 50_000,
        "-----BEGIN PRIVATE KEY-----" * 8000,
    ],
)
def test_hostile_text_takes_no_time(text: str) -> None:
    from time import process_time

    before = process_time()
    find_pii(text, KINDS)
    assert process_time() - before < 3


def test_every_text_of_a_record() -> None:
    call = [{"type": "function", "function": {"name": "mail", "arguments": {"to": ["a@b.io"]}}}]
    messages = ({"role": "user", "content": "mail a@b.io"}, {"role": "assistant", "content": "", "tool_calls": call})
    replaced, counts = replace_pii_in(Conversation(messages, None, "a:1"), salt="s")
    assert isinstance(replaced, Conversation)
    (address,) = replaced.messages[1]["tool_calls"][0]["function"]["arguments"]["to"]
    assert replaced.messages[0]["content"] == f"mail {address}"
    assert counts == {"email": 2}
