"""The plain-number reader: exact, strict, linear in time."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.environments.answers import MAX_CHARACTERS, last_number, plain_number

decimals = st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9)
numbers = st.one_of(
    st.integers().map(lambda n: (str(n), Fraction(n))),
    st.integers().map(lambda n: (f"{n:,}", Fraction(n))),
    decimals.map(lambda d: (f"{d:f}", Fraction(d))),
    decimals.map(lambda d: (f"{d:,f}", Fraction(d))),
    st.tuples(st.integers(), st.integers(min_value=1)).map(lambda f: (f"{f[0]}/{f[1]}", Fraction(*f))),
    st.tuples(st.integers(min_value=0), st.integers(min_value=1)).map(
        lambda f: (rf"\frac{{{f[0]}}}{{{f[1]}}}", Fraction(*f))
    ),
)
frames = st.sampled_from(["{}", "3 + 4 = {}.", r"so \boxed{{{}}}", "1, 2, {}!", "**{}**", "({})", "it costs ${} today"])


@given(numbers, frames)
def test_last_number_reads_the_exact_value_in_any_sentence(number: tuple[str, Fraction], frame: str) -> None:
    written, value = number
    assert last_number(frame.format(written)) == value


@given(numbers, numbers)
def test_two_numbers_are_read_equal_exactly_when_they_are(a: tuple[str, Fraction], b: tuple[str, Fraction]) -> None:
    assert (plain_number(a[0]) == plain_number(b[0])) == (a[1] == b[1])


@given(st.integers(1, 10**6), st.sampled_from(["", ".", ",", ":", "^", "x", "_"]), st.integers(1, 10**6))
def test_a_number_inside_a_longer_one_never_matches(head: int, joint: str, tail: int) -> None:
    assert last_number(f"so {head}{joint}{tail}.") not in (head, tail)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12.", 12), ("-3", -3), ("− 3", 3), ("−3", -3), ("5-3", 3), ("-$3", -3), ("...12", 12), (".5", Fraction(1, 2)),
        ("12%", 12), ("0012", 12), ("12, 13", 13), ("1,234,567.5", Fraction(2469135, 2)), ("12 then x13", 12),
        ("", None), ("none", None), ("12cm", None), ("x12", None), ("1,23", None), ("1,2345", None), ("1.2.3", None),
        ("10:12", None), ("2^12", None), ("1e5", None), ("1/0", None), ("12_000", None), ("é12", None), ("١٢", None),
    ],
)  # fmt: skip
def test_known_texts(text: str, expected: Fraction | int | None) -> None:
    assert last_number(text) == expected


def test_a_number_of_absurd_length_is_no_number() -> None:
    assert last_number("9" * MAX_CHARACTERS) is not None
    assert last_number("9" * (MAX_CHARACTERS + 1)) is None


def test_a_plain_number_is_the_whole_text() -> None:
    assert plain_number(" -3/4. ") == Fraction(-3, 4)
    assert plain_number("x = 3") is None
    assert plain_number("3 4") is None


def test_hostile_texts_take_linear_time() -> None:
    start = time.process_time()
    for piece in ("1", "1,234", "-", "1.", r"\frac{", "1/", ",123", "$"):
        last_number(piece * (200_000 // len(piece)) + "x")
    assert time.process_time() - start < 5.0
