"""Rules on a text by itself: heuristics of quality, words of a lexicon, personal data.

A rule returns why it objects, or None. The numbers of `GOPHER` and `C4` are those of their papers,
for English web pages; conversations are shorter, so name single rules for them.
"""

import collections
import ipaddress
import re
from collections.abc import Callable, Iterable, Sequence

Rule = Callable[[str], str | None]
"""rule(text): why it objects to a text; None where it does not."""

# --- Gopher (Rae et al. 2021, section A.1.1)

STOP_WORDS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])


def words(text: str) -> str | None:
    """Object to fewer than 50 words or more than 100,000."""
    count = len(text.split())
    if 50 <= count <= 100_000:
        return None
    return f"{count} words"


def word_length(text: str) -> str | None:
    """Object to words of a mean length outside 3 to 10 letters."""
    found = text.split()
    size = sum(map(len, found))
    mean = size / max(len(found), 1)
    if 3 <= mean <= 10:
        return None
    return f"words of {mean:.1f} letters"


def symbols(text: str) -> str | None:
    """Object to more than one hash sign to ten words, or more than one ellipsis."""
    hashes = text.count("#")
    ellipses = text.count("...") + text.count("…")
    # Each of the two has a bound of its own; the one that there is more of decides.
    more = max(hashes, ellipses)
    count = len(text.split())
    return _too_many("symbols to words", more, count, 0.1)


def bullets(text: str) -> str | None:
    """Object to more than 90 % of lines that begin with a bullet."""
    lines = _lines(text)
    count = sum(line.startswith(("-", "*", "•", "‣", "●")) for line in lines)
    return _too_many("lines are bullets", count, len(lines), 0.9)


def ellipses(text: str) -> str | None:
    """Object to more than 30 % of lines that end in an ellipsis."""
    lines = _lines(text)
    count = sum(line.endswith(("...", "…")) for line in lines)
    return _too_many("lines end in an ellipsis", count, len(lines), 0.3)


def letters(text: str) -> str | None:
    """Object to more than 20 % of words without a letter."""
    found = text.split()
    count = 0
    for word in found:
        has_letter = any(map(str.isalpha, word))
        count += not has_letter
    return _too_many("words have no letter", count, len(found), 0.2)


def stop_words(text: str) -> str | None:
    """Object to fewer than two of eight common English words."""
    found = set()
    for word in text.split():
        # A word may have punctuation around it.
        bare = word.strip(".,;:!?\"'()").casefold()
        if bare in STOP_WORDS:
            found.add(bare)
    if len(found) >= 2:
        return None
    return f"{len(found)} of {len(STOP_WORDS)} stop words"


def repeated_lines(text: str) -> str | None:
    """Object to more than 30 % of lines that repeat an earlier one (table A1)."""
    lines = _lines(text)
    repeats = len(lines) - len(set(lines))
    return _too_many("lines are repeated", repeats, len(lines), 0.3)


def repeated_words(text: str) -> str | None:
    """Object to a 4-gram that has more than 16 % of the text's letters (table A1)."""
    found = text.split()
    grams = collections.Counter(zip(found, found[1:], found[2:], found[3:], strict=False))
    if not grams:
        return None
    gram, count = grams.most_common(1)[0]
    # A 4-gram that occurs once repeats nothing.
    if count == 1:
        return None
    repeated = count * sum(map(len, gram))
    size = sum(map(len, found))
    return _too_many("letters are of one 4-gram", repeated, size, 0.16)


GOPHER: dict[str, Rule] = {
    "words": words,
    "word_length": word_length,
    "symbols": symbols,
    "bullets": bullets,
    "ellipses": ellipses,
    "letters": letters,
    "stop_words": stop_words,
    "repeated_lines": repeated_lines,
    "repeated_words": repeated_words,
}

# --- C4 (Raffel et al. 2020, section 2.2), its rules that leave out whole pages


def lorem_ipsum(text: str) -> str | None:
    """Object to the printers' filler text."""
    if "lorem ipsum" in text.casefold():
        return "lorem ipsum"
    return None


def braces(text: str) -> str | None:
    """Object to curly brackets, which mark program text."""
    if "{" in text or "}" in text:
        return "a curly bracket"
    return None


C4: dict[str, Rule] = {"lorem_ipsum": lorem_ipsum, "braces": braces}


def _lines(text: str) -> list[str]:
    """Return the lines that are not blank, without the space around them."""
    stripped = [line.strip() for line in text.splitlines()]
    return [line for line in stripped if line]


def _too_many(what: str, count: int, all_of_them: int, most: float) -> str | None:
    """Object, naming `what`, where `count` is more than the share `most` of `all_of_them`."""
    share = count / max(all_of_them, 1)
    if share > most:
        return f"{share:.0%} {what}"
    return None


# --- words that are not wanted


def lexicon_rule(unwanted: Iterable[str]) -> Rule:
    """Return a rule that objects to texts with one of these words or phrases, in any case."""
    # Each phrase once, its words parted by single spaces.
    phrases = set()
    for phrase in unwanted:
        words = phrase.casefold().split()
        phrases.add(" ".join(words))
    phrases.discard("")

    # One pattern for all: whole words, parted by any space.
    spaced = []
    for phrase in sorted(phrases):
        spaced.append(re.escape(phrase).replace(r"\ ", r"\s+"))
    choices = "|".join(spaced)
    pattern = re.compile(rf"(?<!\w)(?:{choices})(?!\w)")

    def rule(text: str) -> str | None:
        found = pattern.search(text.casefold())
        return f"has {found[0]!r}" if found else None

    return rule


# --- personal data

CANDIDATES = {
    "email": re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[^\W\d_]{2,}(?![\w-])"),
    "ip": re.compile(
        # A colon may stand before and behind an address of four numbers: `IP:...`, a port.
        r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)"
        r"|(?<![\w.:])(?:[0-9a-f]{0,4}:){2,7}[0-9a-f]{0,4}(?![\w:]|\.\d)",
        re.IGNORECASE,
    ),
    "card": re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-]|\.\d)"),
    "phone": re.compile(
        # A word and its dot may stand before it, as in `Tel.`, a number's may not.
        r"(?<![\w-])(?<!\d\.)"
        r"(?:\+\d{1,3}[ .-]?(?:\(0?\)[ ]?)?(?:\(?\d{1,4}\)?[ .-]?){2,4}\d{2,4}"
        r"|(?:1[ .-])?(?:\(\d{3}\)[ ]?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4})"
        r"|0[1-9]\d{0,3}[ -]\d{3,4}[ -]?\d{3,5})(?![\w-]|\.\d)"
    ),
}
"""What may be personal, in the order in which it is looked for."""


def is_card(text: str) -> bool:
    """Return whether the digits of a text have the check digit of payment cards (Luhn 1960)."""
    digits = [int(letter) for letter in text if letter.isdigit()]
    # From the right every second digit counts double, as the sum of the digits of that.
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = digit * 2 if place % 2 else digit
        total += value - 9 if value > 9 else value
    return total % 10 == 0 and any(digits)


def is_phone(text: str) -> bool:
    """Return whether a text has the 8 digits or more of a whole phone number."""
    digits = sum(map(str.isdigit, text))
    return digits >= 8


def is_ip(text: str) -> bool:
    """Return whether a text is the address of a machine other than this one."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    # Few groups, or none with a digit, are more likely a name in a program: `a::b`.
    if address.version == 6:
        has_few_groups = text.count(":") < 3
        if has_few_groups or not re.search(r"\d", text):
            return False
    return not address.is_loopback and not address.is_unspecified


CHECKS: dict[str, Callable[[str], bool]] = {"card": is_card, "ip": is_ip, "phone": is_phone}


def without_personal_data(text: str) -> tuple[str, list[str]]:
    """Replace e-mail addresses, IP addresses, card and phone numbers by <email>, <ip>, ...

    Returns the text, otherwise unchanged, and the kind of each replacement. A phone number is one
    with a country code, or written in the American way, or with a leading 0 and a space; plain
    digits are left.
    """
    kinds: list[str] = []
    # One kind after another: a later one finds `<email>` where an address stood.
    for kind, pattern in CANDIDATES.items():
        check = CHECKS.get(kind)
        # The text in pieces: what stands before each match, the kind in its place, the rest.
        parts = []
        end = 0
        for found in pattern.finditer(text):
            if check is not None and not check(found[0]):
                continue
            parts += [text[end : found.start()], f"<{kind}>"]
            kinds.append(kind)
            end = found.end()
        text = "".join([*parts, text[end:]])
    return text, kinds


def counted(kinds: Sequence[str]) -> str:
    """Say how many there are of each kind, as in `2 email, 1 card`."""
    counts = collections.Counter(kinds)
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())
