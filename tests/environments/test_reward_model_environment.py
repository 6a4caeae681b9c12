"""The reward-model environment: batches, bounds, failures; the worker stands on a real executor."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from nemo_rl.data.types import Message, Outcome
from nemo_rl.distributed.local import LocalExecutor
from nemo_rl.environments.reward_model import RewardModelEnvironment
from nemo_rl.errors import EnvironmentFailure


class CountingJudge:
    """Scores an answer by its length; `bad` cannot be scored, `nan` is no number, and `crash` breaks the call."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def score(self, conversations: Sequence[Sequence[Message]]) -> list[float | str]:
        self.calls.append(len(conversations))
        answers = [conversation[-1]["content"] for conversation in conversations]
        if "crash" in answers:
            raise ZeroDivisionError("no memory")
        return [
            "it is bad" if answer == "bad" else float("nan") if answer == "nan" else float(len(answer))
            for answer in answers
        ]

    def seen(self) -> list[int]:
        return self.calls


def judged(answers: Sequence[str], **settings: Any) -> tuple[list[Outcome | BaseException], list[int]]:
    """The outcomes of answers that arrive together, and the sizes of the calls they were scored in."""
    with LocalExecutor() as executor:
        worker = executor.start(CountingJudge)
        environment = RewardModelEnvironment(worker, **{"max_batch_size": 64, "max_wait_seconds": 0.05, **settings})

        async def run() -> list[Outcome | BaseException]:
            steps = (environment.step([Message(role="assistant", content=answer)], {}) for answer in answers)
            return await asyncio.gather(*steps, return_exceptions=True)

        outcomes = asyncio.run(run())
        calls = worker.call("seen").result()
        asyncio.run(environment.close())
        return outcomes, calls


def rewards(outcomes: Sequence[Outcome | BaseException]) -> list[float]:
    return [outcome.rewards["reward"] for outcome in outcomes if isinstance(outcome, Outcome)]


@pytest.mark.parametrize(("size", "calls"), [(64, [5]), (5, [5]), (2, [2, 2, 1]), (1, [1] * 5)])
def test_what_arrives_together_is_scored_together(size: int, calls: list[int]) -> None:
    outcomes, seen = judged(["a", "bb", "ccc", "dddd", "eeeee"], max_batch_size=size)
    assert rewards(outcomes) == [1, 2, 3, 4, 5]
    assert seen == calls


def test_a_reward_is_scaled_shifted_and_bounded_and_the_score_is_kept() -> None:
    outcomes, _ = judged(["a", "bb", "ccc", "dddd"], scale=-2.0, shift=5.0, bounds=(-1.0, 2.5))
    assert rewards(outcomes) == [2.5, 1.0, -1.0, -1.0]
    assert [outcome.metrics["score"] for outcome in outcomes if isinstance(outcome, Outcome)] == [1, 2, 3, 4]
    assert rewards(judged(["a", "bb"], bounds=(1.5, None))[0]) == [1.5, 2]


def test_one_answer_that_cannot_be_scored_fails_alone() -> None:
    outcomes, seen = judged(["a", "bad", "nan", "bb"])
    assert rewards(outcomes) == [1, 2] and seen == [4]
    assert all(isinstance(outcome, EnvironmentFailure) for outcome in outcomes[1:3])
    assert [str(outcome) for outcome in outcomes[1:3]] == [
        "it is bad",
        "the reward model returned nan as 'reward'; return a finite number or a mapping of them",
    ]


def test_a_call_that_breaks_fails_everyone_in_it_and_the_next_one_goes_on() -> None:
    outcomes, seen = judged(["a", "crash", "bb"], max_batch_size=2)
    assert [type(outcome) for outcome in outcomes] == [EnvironmentFailure, EnvironmentFailure, Outcome]
    assert str(outcomes[0]) == "the reward model failed: ZeroDivisionError: no memory"
    assert seen == [2, 1]


def test_the_environment_serves_several_event_loops_and_is_over_once_closed() -> None:
    with LocalExecutor() as executor:
        environment = RewardModelEnvironment(executor.start(CountingJudge), max_batch_size=8, max_wait_seconds=0.0)
        messages = [Message(role="assistant", content="abc")]
        for _ in range(2):
            assert asyncio.run(environment.step(messages, {})).rewards == {"reward": 3}
        asyncio.run(environment.close())
        asyncio.run(environment.close())
        with pytest.raises(EnvironmentFailure, match=r"the reward model failed: .* was stopped"):
            asyncio.run(environment.step(messages, {}))


def test_a_wait_that_is_given_up_costs_nobody_else() -> None:
    with LocalExecutor() as executor:
        worker = executor.start(CountingJudge)
        environment = RewardModelEnvironment(worker, max_batch_size=8, max_wait_seconds=0.2)

        async def run() -> Outcome:
            late = asyncio.create_task(environment.step([Message(role="assistant", content="gone")], {}))
            other = asyncio.create_task(environment.step([Message(role="assistant", content="ab")], {}))
            await asyncio.sleep(0.01)
            late.cancel()
            return await other

        assert asyncio.run(run()).rewards == {"reward": 2}
        assert worker.call("seen").result() == [1]


def test_there_must_be_a_reply() -> None:
    with LocalExecutor() as executor:
        environment = RewardModelEnvironment(executor.start(CountingJudge), max_batch_size=8, max_wait_seconds=0.0)
        with pytest.raises(EnvironmentFailure, match="there is no reply to judge"):
            asyncio.run(environment.step([Message(role="user", content="?")], {}))
