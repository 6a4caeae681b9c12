"""The letter a reply chooses, as models of many languages write it."""

import asyncio

import pytest

from nemo_rl.data.types import Message, Outcome
from nemo_rl.environments.choices import chosen_letter
from nemo_rl.environments.math import MathEnvironment
from nemo_rl.errors import EnvironmentFailure


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("It could be A, or B.\nAnswer: C", "C"),
        ("Answer: A. No, wait.\n**Answer:** (B)", "B"),
        ("answer: $D$", "D"),
        ("Answer: \\boxed{\\text{J}}", "J"),
        ("Antwort: A", "A"),
        ("Respuesta: B", "B"),
        ("Réponse : C", "C"),
        ("Re\u0301ponse : C", "C"),
        ("Risposta: D", "D"),
        ("Resposta: A", "A"),
        ("Jawaban: B", "B"),
        ("Jibu: C", "C"),
        ("Ìdáhùn: D", "D"),
        ("الإجابة: ب", "B"),
        ("উত্তর: অ", "A"),
        ("उत्तर: C", "C"),
        ("정답: D", "D"),
        ("答え：Ａ", "A"),
        ("答案：B", "B"),
        ("So the answer is (E).", "E"),
        ("Hence \\boxed{B}, not A.", "B"),
        ("B", "B"),
        ("(C)", "C"),
        ("D) Rome", "D"),
        ("A bit of both", None),
        ("Answer: Certainly", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_the_last_letter_named_as_the_answer_is_read(reply: str, letter: str | None) -> None:
    assert chosen_letter(reply) == letter


def test_a_long_reply_of_openings_is_read_in_no_time() -> None:
    assert chosen_letter("answer" + " " * 50_000 + "answer:" + "{" * 50_000) is None


def judged(reply: str, gold: str) -> Outcome:
    environment = MathEnvironment(num_workers=1, timeout_seconds=1.0, extraction="multiple_choice")
    return asyncio.run(environment.step([Message(role="assistant", content=reply)], {"ground_truth": gold}))


def test_a_choice_is_right_wrong_or_unparsable() -> None:
    assert judged("Answer: B", "B").rewards == {"reward": 1.0}
    assert judged("Answer: B", "B").details == {"extracted": "B", "ground_truth": "B"}
    assert judged("Answer: A", "B").metrics["accuracy"] == 0
    assert judged("No idea", "B").metrics["unparsable"] == 1


def test_a_known_answer_that_is_no_letter_is_no_zero() -> None:
    with pytest.raises(EnvironmentFailure, match="is no letter from A to J"):
        judged("Answer: B", "12")
