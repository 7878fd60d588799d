"""Rewards that check an answer: function(response, record) -> float.

For train_grpo.py's --reward=tasks.answers:number. `record` is the prompt's,
{"prompt": messages, "answer": str}. Write your own in any module; the name is all it needs.
"""

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction
from typing import Any

from runtime.errors import UserError

MINUSES = "\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d"
"""Hyphens, dashes and signs that people write for a minus, beside the keyboard's."""
MOST_DIGITS = 10_000
"""A number with more digits is no answer that anyone means, and takes long to compute."""
NUMBER = re.compile(
    r"""
    (?P<sign>[-+]?) (?:[$€£¥₹]\ ?)?
    # Not inside another number, and no exponent or index, as of m^2 and x_{1}.
    (?<![\d^_]) (?<!\d\.) (?<!\^\{) (?<!_\{)
    (?P<base> (?: \d{1,3}(?:,\d{3})+(?!\d) | \d+ ) (?:\.\d+)? | (?<!\w)\.\d+ )
    (?: [eE] (?P<exponent>[-+]?\d+) (?!\w) )?
    (?: (?:\^|\*\*) \{? (?P<power>[-+]?\d+) \}? )?
    (?: \s* (?:x|\*|×|·|\\times|\\cdot) \s* 10 (?:\^|\*\*) \{? (?P<tens>[-+]?\d+) \}? )?
    (?: (?:\ (?P<over>\d+))? / (?P<below>\d+(?:\.\d+)?) )?
    """,
    re.VERBOSE | re.ASCII,
)
"""A decimal number, with thousands, a power, or over another: -$1,234.5, 1e3, 2 x 10^3, 1/2,
2 1/2. `over` is the numerator where a whole number stands before the fraction."""


def answer(record: dict[str, Any]) -> str:
    """Return the record's answer; raise UserError where it has none."""
    if "answer" not in record:
        raise UserError(
            "--data: its prompts have no answer to check; give rows with prompt and answer"
        )
    return record["answer"]


def last_number(text: str) -> Fraction | None:
    """Return the number that `text` gives as its answer, exactly; None without one.

    That is the one that follows GSM8K's ####, else the last one in the last \\boxed{...}, else the
    last one. A percent sign and units are left out. A minus between two numbers, as in 10-5, is
    no sign.
    """
    plain = plain_text(text)
    marked = _marked(plain)
    found = list(NUMBER.finditer(plain if marked is None else marked))
    return _value(found[-1]) if found else None


def plain_text(text: str) -> str:
    """Rewrite what stands for a number otherwise: Unicode's digits and signs, LaTeX."""
    if not text.isascii():
        text = "".join(map(_plain_character, text))
        text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f’](?=\d{3}(?!\d))", "", text)
    if "\\" in text:
        text = re.sub(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}", r" \1", text)
        text = re.sub(r"(?<=\d)(?:\{,\}|\\[,!])(?=\d{3})", "", text)
        text = re.sub(r"\\[dtc]?frac\s*\{\s*(-?[\d.]+)\s*\}\s*\{\s*([\d.]+)\s*\}", r" \1/\2", text)
        text = re.sub(r"\\[dtc]?frac\s*(\d)\s*(\d)", r" \1/\2", text)
        text = re.sub(r"\\([$%])", r"\1", text)
    # A sign that stands apart, or whose fraction has just become one; a date is no fraction.
    text = re.sub(r"([=:({$] *|\A *(?=- +\S+\s*\Z))- +(?=[\d.$])", r"\1-", text)
    text = re.sub(r"(?<!\d)\d+/\d+/\d+", _apart, text)
    return re.sub(r"(?<=\d)[_'](?=\d{3}(?!\d))", "", text)


def _plain_character(character: str) -> str:
    """Return a character of a number in ASCII; any other as it is."""
    if character in MINUSES:
        return "-"
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    # Arabic marks of decimals and thousands.
    if character in "\u066b\u066c":
        return "." if character == "\u066b" else ","
    # One character for a fraction, such as a half.
    parts = unicodedata.normalize("NFKC", character).split("\u2044")
    return f" {parts[0]}/{parts[1]}" if len(parts) == 2 else character


def _apart(match: re.Match) -> str:
    return match[0].replace("/", " ")


def _marked(text: str) -> str | None:
    """Return the part of `text` that it marks as its answer, by the last mark; None without."""
    # A heading, #### 3. Next, marks no answer.
    marks = list(re.finditer(r"####\s*(?!\d+\.\s)(?=[-+$€£¥₹.]*\d)|\\f?boxed\s*\{", text))
    if not marks:
        return None
    rest = text[marks[-1].end() :]
    if marks[-1][0].startswith("#"):
        first = NUMBER.search(rest)
        return None if first is None else first[0]
    # Up to the brace that closes the box.
    depth = 1
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if not depth:
            return rest[:i]
    return rest


def _is_minus(match: re.Match) -> bool:
    """Return whether a number's sign is a minus, and no dash or difference."""
    before = match.string[: match.start("sign")]
    if match["sign"] != "-" or before[-1:].isalpha():
        return False
    return not re.search(r"[\d)\]}%][ \t]*$", before)


def _value(match: re.Match) -> Fraction | None:
    """Return the number of a match of NUMBER; None over 0, and for more than MOST_DIGITS."""
    power = int(match["power"] or 1)
    tens = int(match["exponent"] or 0) + int(match["tens"] or 0)
    below = Fraction(match["below"] or 1)
    if not below or abs(tens) + len(match["base"]) * abs(power) > MOST_DIGITS:
        return None
    # By way of a decimal, which may have any number of digits.
    value = Fraction(Decimal(match["base"].replace(",", "")))
    if power < 0 and not value:
        return None
    value = value**power * Fraction(10) ** tens
    # A whole number before a fraction is added to it.
    value = value + Fraction(match["over"]) / below if match["over"] else value / below
    return -value if _is_minus(match) else value


def number(response: str, record: dict[str, Any]) -> float:
    """Return 1 where the response's number is the answer's, exactly, else 0; see `last_number`."""
    wanted = last_number(answer(record))
    if wanted is None:
        return 0.0
    return float(last_number(response) == wanted)


def exact(response: str, record: dict[str, Any]) -> float:
    """Return 1 where the response is the answer, but for case and space, else 0."""
    given = response.lower().split()
    wanted = answer(record).lower().split()
    return float(given == wanted)
