"""The math environment: one reply, one final answer, right or wrong."""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

from nemo_rl.data.types import Message, Outcome
from nemo_rl.environments.answers import Verdict, last_number, plain_number
from nemo_rl.environments.base import last_reply
from nemo_rl.environments.choices import chosen_letter
from nemo_rl.environments.pool import ProcessPool
from nemo_rl.errors import EnvironmentFailure, WorkerError

type Extraction = Literal["math", "last_number", "multiple_choice"]
"""`math`: the boxed, LaTeX or plain expression math-verify finds; `last_number`: the last number, compared exactly;
`multiple_choice`: the letter that the reply chooses."""

type Reason = Literal["timed_out", "unparsable", "crashed"]
"""Why a reply got no verdict on its merits: too slow to check, no answer in it, or it broke the process checking it."""

# By name: the driver never imports math-verify, which takes two seconds.
_JUDGE = "nemo_rl.environments.verification:judge"
# Parsing and simplifying for the first time loads half of SymPy.
_WARM_UP = ("\\boxed{(x+1)^2}", "x^2 + 2x + 1")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


class MathEnvironment:
    """Scores the final answer of a reply against `extra["ground_truth"]`.

    Plain numbers are compared here, exactly; everything else goes to math-verify in worker processes, where a reply
    that hangs or breaks the checker costs `reward_incorrect` and a counted reason, and nothing else.
    """

    def __init__(
        self,
        *,
        num_workers: int,
        timeout_seconds: float,
        extraction: Extraction,
        reward_correct: float = 1.0,
        reward_incorrect: float = 0.0,
    ) -> None:
        """Start the worker processes in the background (only `math` needs them).

        Args:
            num_workers: replies checked at the same time.
            timeout_seconds: wall time to check one reply.
            extraction: where the answer is looked for.
            reward_correct: reward of a right answer.
            reward_incorrect: reward of everything else.
        """
        self._extraction: Extraction = extraction
        self._rewards = {True: reward_correct, False: reward_incorrect}
        self._pool: ProcessPool[Verdict] | None = (
            ProcessPool(_JUDGE, num_workers=num_workers, deadline_seconds=timeout_seconds, warm_up=_WARM_UP)
            if extraction == "math"
            else None
        )

    async def step(self, messages: Sequence[Message], extra: Mapping[str, Any], state: Any = None) -> Outcome:
        """Judge the last message; the conversation ends.

        Returns:
            reward `reward`; metrics `accuracy`, `timed_out`, `unparsable`, `crashed` (0 or 1); details `extracted` and
            `ground_truth`.

        Raises:
            EnvironmentFailure: the task has no ground truth that can be read, or no worker process starts.
        """
        reply, gold = last_reply(messages), _ground_truth(extra)
        if self._extraction == "multiple_choice":
            return self._by_letter(reply, gold)
        if self._pool is None:
            return self._by_last_number(reply, gold)
        number, target = _boxed_or_bare_number(reply), plain_number(gold)
        if number is not None and target is not None and _decided(number, target):
            return self._outcome(number == target, str(number), gold)
        return await self._by_math_verify(self._pool, reply, gold)

    async def close(self) -> None:
        """End the worker processes."""
        if self._pool is not None:
            await self._pool.close()

    def _by_last_number(self, reply: str, gold: str) -> Outcome:
        target = plain_number(gold)
        if target is None:
            raise EnvironmentFailure(f"ground truth {gold[:80]!r} is not a number; set `extraction: math`")
        number = last_number(reply)
        if number is None:
            return self._outcome(False, "", gold, "unparsable")
        return self._outcome(number == target, str(number), gold)

    def _by_letter(self, reply: str, gold: str) -> Outcome:
        target = gold.strip()
        if not re.fullmatch("[A-J]", target):
            raise EnvironmentFailure(f"ground truth {gold[:80]!r} is no letter from A to J; set `extraction: math`")
        letter = chosen_letter(reply)
        return self._outcome(letter == target, letter or "", gold, "unparsable" if letter is None else None)

    async def _by_math_verify(self, pool: ProcessPool[Verdict], reply: str, gold: str) -> Outcome:
        try:
            verdict = await pool.run(reply, gold)
        except TimeoutError:
            return self._outcome(False, "", gold, "timed_out")
        except ChildProcessError:
            return self._outcome(False, "", gold, "crashed")
        except WorkerError as error:
            raise EnvironmentFailure(f"the math environment cannot check replies: {error}") from error
        if not verdict.gold_readable:
            raise EnvironmentFailure(f"math-verify cannot read the ground truth {gold[:80]!r}; correct the task")
        reason = "unparsable" if verdict.extracted is None else None
        return self._outcome(verdict.correct, verdict.extracted or "", gold, reason)

    def _outcome(self, correct: bool, extracted: str, gold: str, reason: Reason | None = None) -> Outcome:
        return Outcome(
            rewards={"reward": self._rewards[correct]},
            metrics={
                "accuracy": float(correct),
                "timed_out": float(reason == "timed_out"),
                "unparsable": float(reason == "unparsable"),
                "crashed": float(reason == "crashed"),
            },
            details={"extracted": extracted, "ground_truth": gold},
        )


def _ground_truth(extra: Mapping[str, Any]) -> str:
    gold = extra.get("ground_truth")
    if gold is None or not str(gold).strip():
        raise EnvironmentFailure("the task has no `ground_truth`; the math environment needs one in `extra`")
    return str(gold)


def _boxed_or_bare_number(reply: str) -> Fraction | None:
    """The number that is the whole reply or the content of its only box; None where math-verify has to look closer."""
    if "\\boxed" not in reply:
        return plain_number(reply)
    boxes = _BOXED.findall(reply)
    return plain_number(boxes[0]) if len(boxes) == 1 == reply.count("\\boxed") else None


def _decided(number: Fraction, target: Fraction) -> bool:
    """Whether exact comparison settles it: unequal decimals are left to math-verify, which allows for rounding."""
    return number == target or number.denominator == target.denominator == 1
