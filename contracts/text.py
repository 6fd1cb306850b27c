"""Rules of text, once for both sides: what a voter id may be, and when two texts look the same. Pure functions."""

import re
import unicodedata

MAX_VOTER_ID = 256
"""Characters (code points) of a voter id."""

# Invisible characters: format characters (category Cf) but those with a shape of their own, what Unicode calls
# default-ignorable, blank letters, line and paragraph separators. Ranges instead of a look at each category: an id is
# checked in one pass in C.
_JOINERS = "\u200c\u200d"
_VARIATIONS = "\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0020-\U000e007f\U000e0100-\U000e01ef"
_UNSEEN = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164\ufeff"
    "\uffa0\ufff0-\ufffb\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e001f"
    "\U000e0080-\U000e00ff\U000e01f0-\U000e0fff"
)
_CONTROLS = "\x00-\x1f\x7f-\x9f"
_NONCHARACTERS = "\ufdd0-\ufdef\ufffe\uffff"

_REFUSED = re.compile(f"[{_CONTROLS}{_UNSEEN}{_JOINERS}{_VARIATIONS}{_NONCHARACTERS}]")
_CONTROL = re.compile(f"[{_CONTROLS}{_NONCHARACTERS}]")
_INVISIBLE = re.compile(f"[{_UNSEEN}{_JOINERS}{_VARIATIONS}]")
# Behind a letter of these scripts a joiner, and behind any character a variation, changes what is seen.
_INVISIBLE_IN_LABEL = re.compile(f"[{_UNSEEN}]|(?<![\u0590-\U0010ffff])[{_JOINERS}]")
_END_OF_LABEL = re.compile(f"[\\s{_UNSEEN}{_JOINERS}]*")
# Digits that are set high, low, as a fraction or in a circle do not look like the plain ones that NFKC makes of them.
_SET_APART = re.compile("([\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209f\u2150-\u215f\u2189\u2460-\u24ff]+)")
# What keyboards and programs write in the place of one another: letters of Cyrillic that are Latin ones to the eye in
# one case or the other, dashes, and quotation marks. No two letters of Cyrillic become the same one.
_CYRILLIC = dict(zip("авекмнорстухіјѕԁԛԝ", "abekmhopctyxijsdqw", strict=True))
_SUBSTITUTES = str.maketrans(
    _CYRILLIC
    | {letter.upper(): latin.upper() for letter, latin in _CYRILLIC.items()}
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2043\u2212", "-")
    | dict.fromkeys("`\u00b4\u02b9\u02bc\u2018\u2019\u201a\u201b\u2032", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u2033", '"')
)


def voter_id_problem(voter_id: str) -> str:
    """Why this is no voter id, naming the character; empty where it is one.

    A voter id has 1 to 256 characters in Unicode normal form C, no white space at its ends, and no control characters
    or invisible ones anywhere: one person must not be two voters that look the same.
    """
    if is_plain_voter_id(voter_id):
        return ""
    if not 1 <= len(voter_id) <= MAX_VOTER_ID:
        return f"must have 1 to {MAX_VOTER_ID} characters, has {len(voter_id)}"
    for end, character in (("begins", voter_id[0]), ("ends", voter_id[-1])):
        if character.isspace():
            return f"{end} with {character_name(character)}; white space at the ends is not allowed"
    if found := _REFUSED.search(voter_id):
        kind = "a control" if _CONTROL.match(found[0]) else "an invisible"
        place = f"character {found.start() + 1} is {character_name(found[0])}"
        return f"{place}, {kind} character, which is not allowed"
    if not unicodedata.is_normalized("NFC", voter_id):
        return f"is not in Unicode normal form C (NFC): {_first_difference(voter_id)}"
    return ""


def is_plain_voter_id(voter_id: str) -> bool:
    """Whether this is a voter id of printable ASCII alone, as most are. command_server/_ballots.c has the same rule."""
    return (
        0 < len(voter_id) <= MAX_VOTER_ID
        and voter_id.isascii()
        and voter_id.isprintable()
        and voter_id[0] != " "
        and voter_id[-1] != " "
    )


def clean_voter_id(text: str) -> str:
    """A voter id as it was meant: in NFC, without invisible characters, without white space at the ends, and with one
    space for white space within. What `voter_id_problem` then still finds are control characters and the length."""
    if is_plain_voter_id(text) and "  " not in text:
        return text
    return " ".join(unicodedata.normalize("NFC", _INVISIBLE.sub("", text)).split())


def clean_label(text: str) -> str:
    """A label as it was meant: in NFC, without invisible characters and white space at the ends, and with one space for
    white space within. Joiners and variations within stay: emoji and several scripts need them."""
    if is_plain_voter_id(text) and "  " not in text:
        return text
    first, last = (_length(_END_OF_LABEL, end) for end in (text, text[::-1]))
    return " ".join(unicodedata.normalize("NFC", text[first : len(text) - last]).split())


def control_character(text: str) -> str:
    """The first control character in a text, as `character 3 is U+0007, …`; empty where there is none."""
    found = _CONTROL.search(text)
    return f"character {found.start() + 1} is {character_name(found[0])}, a control character" if found else ""


def look(text: str) -> str:
    """The same for texts that look the same: those that differ in letter case, white space, invisible characters or
    Unicode forms (é as one character or two, full width, ligatures). A text that shows nothing is only like itself."""
    if text.isascii():
        seen = text.lower()
    else:
        parts = _SET_APART.split(_INVISIBLE_IN_LABEL.sub("", text))
        parts[::2] = [unicodedata.normalize("NFKD", part) for part in parts[::2]]
        seen = unicodedata.normalize("NFC", "".join(parts).casefold())
    return " ".join(seen.split()) or text


def shape(text: str) -> str:
    """The same for texts that may be meant to be the same: those with one `look`, and those that have Latin letters
    where the other has Cyrillic ones of their shape, or another kind of dash or quotation mark."""
    return look(text.translate(_SUBSTITUTES) if not text.isascii() or "`" in text else text)


def substitute(one: str, other: str) -> str:
    """The character in which two texts of one shape differ, as `: U+0410 CYRILLIC CAPITAL LETTER A`; empty where they
    have one look."""
    if look(one) == look(other):
        return ""
    return next((f": {character_name(c)}" for c in one + other if ord(c) in _SUBSTITUTES), "")


def character_name(character: str) -> str:
    """`U+00A0 NO-BREAK SPACE`; the number alone where Unicode has no name."""
    return f"U+{ord(character):04X} {unicodedata.name(character, '')}".rstrip()


def _length(pattern: re.Pattern[str], text: str) -> int:
    found = pattern.match(text)
    return found.end() if found else 0


def _first_difference(text: str) -> str:
    composed = unicodedata.normalize("NFC", text)
    place, (ours, theirs) = next(
        (place, pair) for place, pair in enumerate(zip(text, composed, strict=False), 1) if pair[0] != pair[1]
    )
    return f"character {place} is {character_name(ours)} where NFC has {character_name(theirs)}"
