"""The rules of text: what a voter id may be, and when two labels look the same."""

import random
import unicodedata

import pytest

from contracts.refusals import Refusal
from contracts.text import (
    MAX_VOTER_ID,
    clean_label,
    clean_voter_id,
    control_character,
    is_plain_voter_id,
    look,
    shape,
    substitute,
    voter_id_problem,
)
from contracts.voters import VoterKeys

ENGLAND = "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
SCOTLAND = "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f"
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"


@pytest.mark.parametrize(
    "voter_id",
    ["a", "x" * MAX_VOTER_ID, "ada@example.org", "Ada Lovelace", "josé", "東京 1", "1234", "\u0301" * 60, "Dvořák, A."],
)
def test_a_voter_id_is_the_callers_own_term(voter_id: str) -> None:
    assert voter_id_problem(voter_id) == ""
    assert clean_voter_id(voter_id) == voter_id


@pytest.mark.parametrize(
    ("voter_id", "problem"),
    [
        ("", "must have 1 to 256 characters, has 0"),
        ("x" * 257, "must have 1 to 256 characters, has 257"),
        (" ada", "begins with U+0020 SPACE"),
        ("ada\t", "ends with U+0009"),
        ("ada\u00a0", "ends with U+00A0 NO-BREAK SPACE"),
        ("\u3000ada", "begins with U+3000 IDEOGRAPHIC SPACE"),
        ("\u200bada", "character 1 is U+200B ZERO WIDTH SPACE, an invisible character"),
        ("\ufeffada", "character 1 is U+FEFF ZERO WIDTH NO-BREAK SPACE"),
        ("a\u00adda", "character 2 is U+00AD SOFT HYPHEN"),
        ("ada\u202e", "character 4 is U+202E RIGHT-TO-LEFT OVERRIDE"),
        ("ad\u3164a", "character 3 is U+3164 HANGUL FILLER"),
        ("❤\ufe0f", "character 2 is U+FE0F VARIATION SELECTOR-16"),
        ("ada\U000e0041", "character 4 is U+E0041 TAG LATIN CAPITAL LETTER A"),
        ("a\0b", "character 2 is U+0000, a control character"),
        ("a\x7fb", "character 2 is U+007F, a control character"),
        ("jose\u0301", "character 4 is U+0065 LATIN SMALL LETTER E where NFC has U+00E9"),
        ("5 \u212b", "character 3 is U+212B ANGSTROM SIGN where NFC has U+00C5"),
    ],
)
def test_what_is_wrong_with_a_voter_id_is_said_by_the_character(voter_id: str, problem: str) -> None:
    assert problem in voter_id_problem(voter_id)
    with pytest.raises(Refusal) as refused:
        VoterKeys("x" * 32).voter_key(voter_id, "voters[3].voter_id")
    assert list(refused.value.fields) == ["voters[3].voter_id"]


def test_no_control_or_format_character_of_unicode_is_in_a_voter_id() -> None:
    # Signs of Arabic, Syriac and Kaithi are format characters that are seen.
    seen = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}
    for number in range(0x110000):
        if number not in seen and unicodedata.category(chr(number)) in ("Cc", "Cf", "Zl", "Zp"):
            assert voter_id_problem(f"a{chr(number)}b"), hex(number)


def test_a_cleaned_id_is_a_voter_id_or_has_a_control_character() -> None:
    chance = random.Random(3)
    alphabet = "aé \t\u00a0\u0301\u200b\ufeff\u00ad\u200d\u2800e\u212bß東\ufe0f\u0344\u3000\x1c\U000e0041"
    for _ in range(20_000):
        text = "".join(chance.choices(alphabet, k=chance.randrange(1, 9)))
        cleaned = clean_voter_id(text)
        assert not cleaned or voter_id_problem(cleaned) == "", ascii(text)
        assert clean_voter_id(cleaned) == cleaned
        label = clean_label(text)
        assert clean_label(label) == label, ascii(text)
        assert look(label) == look(clean_label(label))
    assert control_character("a\x07b") == "character 2 is U+0007, a control character"
    assert clean_voter_id("a\0b") == "a\0b"


def test_the_fast_rule_is_the_slow_one_for_ascii() -> None:
    chance = random.Random(5)
    for _ in range(20_000):
        text = "".join(chance.choices(" !aZ~\x7f\x1f\0é", weights=[3, 5, 5, 5, 5, 1, 1, 1, 1], k=chance.randrange(6)))
        if is_plain_voter_id(text):
            assert text.isascii()
            assert text == text.strip()
            assert not any(c < " " or c > "~" for c in text)
        else:
            assert voter_id_problem(text) or not text.isascii()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Tea", "tea"),
        ("Tea", " Tea"),
        ("green tea", "green\u00a0 tea"),
        ("Jos\u00e9", "Jose\u0301"),
        ("Tea", "Te\u200ba"),
        ("Tea", "Te\u200da"),
        ("cooperate", "co\u00adoperate"),
        ("Room 12", "\uff32\uff4f\uff4f\uff4d \uff11\uff12"),
        ("office", "o\ufb03ce"),
        ("Straße", "STRASSE"),
        ("\u212b", "å"),
    ],
)
def test_labels_that_look_the_same(one: str, other: str) -> None:
    assert look(one) == look(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Jose", "José"),
        ("KISA", "k\u0131sa"),
        ("2²", "22"),
        ("1½", "11/2"),
        ("①", "1"),
        (ENGLAND, SCOTLAND),
        (FAMILY, FAMILY.replace("\u200d", "")),
        ("\u0646\u0627\u0645\u0647\u200c\u0627\u06cc", "\u0646\u0627\u0645\u0647\u0627\u06cc"),
        ("\u200b", " "),
        ("", " "),
        ("tea", "te a"),
    ],
)
def test_labels_that_look_different(one: str, other: str) -> None:
    assert look(one) != look(other)


@pytest.mark.parametrize(
    ("one", "other", "character"),
    [
        ("\u0410nn", "Ann", ": U+0410 CYRILLIC CAPITAL LETTER A"),
        ("10\u0412", "10b", ": U+0412 CYRILLIC CAPITAL LETTER VE"),
        ("\u0421\u0421\u0421\u0420", "cccp", ": U+0421 CYRILLIC CAPITAL LETTER ES"),
        ("O'Neil", "O\u2019Neil", ": U+2019 RIGHT SINGLE QUOTATION MARK"),
        ("Smith-Jones", "smith\u2011jones", ": U+2011 NON-BREAKING HYPHEN"),
        ("\u201ecafe\u0301\u201c", '"caf\u00e9"', ": U+201E DOUBLE LOW-9 QUOTATION MARK"),
        ("Tea", "tea", ""),
    ],
)
def test_texts_of_one_shape_differ_in_a_character_that_is_named(one: str, other: str, character: str) -> None:
    assert shape(one) == shape(other)
    assert substitute(one, other) == character


def test_letters_of_one_script_have_different_shapes() -> None:
    letters = [chr(number) for number in range(0x430, 0x460)]
    assert len({shape(letter) for letter in letters}) == len(letters)
    assert shape("5 \u03bcm") != shape("5 mm")
    assert shape("Tea, milk") != shape("Tea; milk")


@pytest.mark.parametrize(
    "label", [ENGLAND, FAMILY, "❤\ufe0f", "\u0646\u0627\u0645\u0647\u200c\u0627\u06cc", "a", "2²", "Smith, John"]
)
def test_a_label_keeps_what_changes_its_look(label: str) -> None:
    assert clean_label(f"\ufeff \t{label}\u200b\u00a0") == label


def test_a_long_cell_is_cleaned_in_linear_time() -> None:
    assert clean_label("a" + " " * 100_000 + "b") == "a b"
    assert clean_label("a" + "\u200b" * 100_000 + "b ").endswith("b")
