"""Plain numbers in text, read exactly: integers, decimals, thousands groups and fractions, never floating point."""

import re
from collections import deque
from fractions import Fraction
from typing import NamedTuple

MAX_CHARACTERS = 1000
"""A number written with more characters is no answer to anything, and Python converts it in quadratic time."""

_VALUE = r"""
    \\[dt]?frac \{ (?P<upper>[0-9]++) \} \{ (?P<lower>[0-9]++) \}
  | (?: [0-9]{1,3} (?: ,[0-9]{3} )++ (?: \.[0-9]++ )?+    # 1,234,567.89
      | [0-9]++ (?: \.[0-9]++ )?+                         # 12, 12.5
      | (?<![\w.]) \.[0-9]++ )                            # .5 but not ...12
    (?: / [0-9]++ )?+
"""
_SIGN = r"(?: (?<! [\w)\]}] ) (?P<sign>[-+\u2212]) )?+ (?: \\?\$ )?+"
_NUMBER = re.compile(
    rf"""
    {_SIGN}
    (?<! \w ) (?<! [0-9][.,:/^] )   # not the tail of x12, 1.2.12, 1,12, 10:12, 2^12
    (?P<value> {_VALUE} )
    (?! \w | [.,:/^][0-9] )         # nor the head of 12cm, 12.5.1, 12,5
    """,
    re.VERBOSE,
)


class Verdict(NamedTuple):
    """A checked answer: whether it is right, what was read (None: nothing), whether the ground truth is readable."""

    correct: bool
    extracted: str | None
    gold_readable: bool = True


def last_number(text: str) -> Fraction | None:
    r"""Read the last number in a text; None if there is none.

    Signs, decimals, thousands groups (`1,234`), fractions (`3/4`, `\frac{3}{4}`) and punctuation after the number are
    understood. Digits within something longer (`x12`, `12cm`, `1.2.3`, `1,23`, `10:12`, `2^12`) are no number.

    >>> last_number("12 - 5 = 7."), last_number("it costs $1,250.50, right?"), last_number("1.2.3")
    (Fraction(7, 1), Fraction(2501, 2), None)
    """
    matches = deque(_NUMBER.finditer(text), maxlen=1)
    return _exact(matches[0]) if matches else None


def plain_number(text: str) -> Fraction | None:
    """Read a text that is one number and nothing else but white space and a final full stop; None if it is not.

    >>> plain_number(" -3/4. "), plain_number("x = 3")
    (Fraction(-3, 4), None)
    """
    match = _NUMBER.fullmatch(text.strip().removesuffix("."))
    return None if match is None else _exact(match)


def _exact(match: re.Match[str]) -> Fraction | None:
    """The value of one match of the pattern; None for a division by zero or a number of absurd length."""
    if len(match["value"]) > MAX_CHARACTERS:
        return None
    if match["upper"] is not None:
        upper, lower = match["upper"], match["lower"]
    else:
        upper, _, lower = match["value"].replace(",", "").partition("/")
    denominator = int(lower or "1")
    if denominator == 0:
        return None
    value = Fraction(upper) / denominator
    return -value if match["sign"] in ("-", "\u2212") else value
