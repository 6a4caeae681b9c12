# ruff: noqa: RUF001 (colons, brackets and letters of many scripts)
"""The letter that a reply to a multiple-choice question chooses, in the languages of MMLU."""

import re
from unicodedata import normalize

_ANSWER = "|".join(
    (
        *("answer", "antwort", "respuesta", "réponse", "risposta", "resposta", "jawaban", "jibu"),
        *("idahun", "ìdáhùn", "idáhùn", "àdáhùn", "الإجابة", "إجابة", "الجواب", "উত্তর", "उत्तर"),
        *("답변", "정답", "답", "答え", "回答", "解答", "正解", "答案", "答"),
    )
)
_LATIN = {
    "أ": "A",
    "ا": "A",
    "ب": "B",
    "ج": "C",
    "د": "D",
    "অ": "A",
    "ব": "B",
    "ড": "C",
    "ঢ": "D",
    **dict(zip("ＡＢＣＤＥＦＧＨＩＪ", "ABCDEFGHIJ", strict=True)),
}
_LETTER = rf"(?P<letter>[A-J{''.join(_LATIN)}])"
_OPENING = r"(?:\\boxed\{|\\text\{|\\mathrm\{|[\s*_`$(\[{:（「])*"
_END = r"(?![\w'’])"
_SAID = re.compile(rf"(?i:{_ANSWER})(?:\s+(?i:is|est|es|ist|é|è))?[\s*_`]*[:：ঃ]{_OPENING}{_LETTER}{_END}")
_SAID_IN_WORDS = re.compile(rf"(?i:answer\s+is|correct\s+(?:option|choice)\s+is){_OPENING}{_LETTER}{_END}")
_BOXED = re.compile(rf"\\boxed\{{{_OPENING}{_LETTER}{_END}")
_ALONE = re.compile(rf"{_OPENING}{_LETTER}[\s*_`$)\].}}）」]*(?:$|(?<=[).])\s)")


def chosen_letter(reply: str) -> str | None:
    r"""Read the last letter that a reply names as its answer, A to J; None if it names none.

    `Answer: B` (in any of the languages, in Markdown or LaTeX) goes before `the answer is B`, then `\boxed{B}`, then a
    reply that is, or begins with, an option's letter alone: `B`, `(B)`, `B) Rome`.

    >>> chosen_letter("It could be A.\n**Answer:** (C)"), chosen_letter("\\boxed{\\text{D}}"), chosen_letter("A bit")
    ('C', 'D', None)
    """
    reply = normalize("NFC", reply)  # accents are a character of their own in some replies
    for pattern in (_SAID, _SAID_IN_WORDS, _BOXED):
        if found := list(pattern.finditer(reply)):
            return _latin(found[-1]["letter"])
    alone = _ALONE.match(reply.strip())
    return None if alone is None else _latin(alone["letter"])


def _latin(letter: str) -> str:
    return _LATIN.get(letter, letter)
