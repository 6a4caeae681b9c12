"""The math environment: right is right, and nothing a policy can write hangs or breaks it."""

import asyncio
import time
from collections.abc import Iterator

import pytest

from child_processes import forget_other_processes, spawned
from nemo_rl.data.types import Message, Outcome
from nemo_rl.environments.math import MathEnvironment
from nemo_rl.errors import EnvironmentFailure

HOSTILE = [
    "\\frac" * 5000,
    "\\boxed{" + "\\frac{1}{" * 300 + "1" + "}" * 300 + "}",
    "\\boxed{9^{9^{9^{9}}}}",
    "9^9^9^9",
    "\\boxed{" + "{" * 100_000 + "}" * 100_000 + "}",
    "\\boxed{" * 20_000,
    "\0\0\\boxed{12\0}\0",
    "\\boxed{" + "9" * 100_000 + "}",
    "9" * 100_000,
    "\\boxed{(10^9)!}",
    "\\boxed{\\sum_{n=1}^{10^{12}} \\frac{1}{n^2}}",
    "$" * 20_000,
    "(1+" * 5000 + "1" + ")" * 5000,
    "\\boxed{(x+1)^{100000}}",
    "\\boxed{\\begin{pmatrix}" + "1&" * 5000,
    "\ud800 \\boxed{\ud800}",
    "\\boxed{\\text{" + "\\" * 10_000 + "}}",
    "",
]


@pytest.fixture(autouse=True, scope="module")
def only_own_processes() -> None:
    forget_other_processes()


@pytest.fixture(scope="module")
def environment() -> Iterator[MathEnvironment]:
    made = MathEnvironment(
        num_workers=2, timeout_seconds=2.0, extraction="math", reward_correct=2.0, reward_incorrect=-1.0
    )
    yield made
    asyncio.run(made.close())


def conversation(reply: str) -> list[Message]:
    return [Message(role="user", content="?"), Message(role="assistant", content=reply)]


async def score(environment: MathEnvironment, reply: str, gold: object = "12") -> Outcome:
    return await environment.step(conversation(reply), {"ground_truth": gold, "kind": "sum"})


@pytest.mark.parametrize(
    ("reply", "gold", "correct"),
    [
        ("12", "12", True),
        ("The answer is 12.", "12", True),
        ("first 7, so \\boxed{12}", 12, True),
        ("\\boxed{\\frac{24}{2}}", "12", True),
        ("\\boxed{0.5}", "\\frac{1}{2}", True),
        ("\\boxed{0.333333}", "0.3333331", True),
        ("$x = 3\\sqrt{2}$", "3\\sqrt{2}", True),
        ("\\boxed{\\{2, 1\\}}", "\\{1, 2\\}", True),
        ("the answer is \\boxed{(x+1)^2}", "$x^2 + 2x + 1$", True),
        ("112", "12", False),
        ("\\boxed{13}", "12", False),
        ("12 or so, \\boxed{13}", "12", False),
        ("\\boxed{3\\sqrt{3}}", "3\\sqrt{2}", False),
    ],
)
def test_answers_are_judged_by_value(environment: MathEnvironment, reply: str, gold: object, correct: bool) -> None:
    outcome = asyncio.run(score(environment, reply, gold))
    assert outcome.rewards == {"reward": 2.0 if correct else -1.0}
    assert outcome.metrics["accuracy"] == correct
    assert outcome.details["extracted"]
    assert outcome.details["ground_truth"] == str(gold)
    assert outcome.done


def test_hostile_replies_cost_their_own_reward_and_a_counted_reason(environment: MathEnvironment) -> None:
    async def all_at_once() -> list[Outcome]:
        replies = [reply for hostile in HOSTILE for reply in (hostile, "\\boxed{\\frac{24}{2}}")]
        return await asyncio.gather(*(score(environment, reply) for reply in replies))

    outcomes = asyncio.run(all_at_once())
    assert all(outcome.rewards == {"reward": -1.0} for outcome in outcomes[::2])
    assert all(outcome.rewards == {"reward": 2.0} for outcome in outcomes[1::2])
    reasons = [{"timed_out", "unparsable", "crashed"} & {k for k, v in o.metrics.items() if v} for o in outcomes[::2]]
    assert all(len(reason) <= 1 for reason in reasons)
    assert {"timed_out"} in reasons
    assert reasons[-1] == {"unparsable"}
    assert reasons[2] == reasons[9] == {"timed_out"}


def test_a_crash_is_counted(environment: MathEnvironment) -> None:
    async def killed_at_work() -> Outcome:
        busy = asyncio.create_task(score(environment, "\\boxed{9^{9^{9^{9}}}}"))
        await asyncio.sleep(0.5)
        for nursery in spawned():
            for worker in nursery.children():
                worker.kill()
        outcome = await busy
        await asyncio.sleep(0.5)
        return outcome

    asyncio.run(score(environment, "\\boxed{\\frac{24}{2}}"))
    assert asyncio.run(killed_at_work()).metrics == {"accuracy": 0, "timed_out": 0, "unparsable": 0, "crashed": 1}
    assert asyncio.run(score(environment, "\\boxed{\\frac{24}{2}}")).metrics["accuracy"] == 1


def test_plain_numbers_never_reach_a_worker(environment: MathEnvironment) -> None:
    async def step_of_64() -> list[Outcome]:
        return await asyncio.gather(*(score(environment, f"so \\boxed{{{n}}}", "12") for n in range(64)))

    asyncio.run(environment.close())
    closed_but_exact = asyncio.run(step_of_64())
    assert [n for n, outcome in enumerate(closed_but_exact) if outcome.metrics["accuracy"]] == [12]
    with pytest.raises(EnvironmentFailure, match="closed"):
        asyncio.run(score(environment, "\\boxed{\\frac{24}{2}}"))


def test_last_number_needs_no_process_and_is_exact() -> None:
    environment = MathEnvironment(num_workers=2, timeout_seconds=1.0, extraction="last_number")
    replies = {"5 + 7 = 12.": 1.0, "12, no, 13": 0.0, "112": 0.0, "12.000000001": 0.0, "no idea": 0.0}
    start = time.process_time()
    outcomes = [asyncio.run(score(environment, reply)) for reply in replies]
    assert time.process_time() - start < 1.0
    assert [outcome.rewards["reward"] for outcome in outcomes] == list(replies.values())
    assert [outcome.metrics["unparsable"] for outcome in outcomes] == [0, 0, 0, 0, 1]
    assert outcomes[1].details == {"extracted": "13", "ground_truth": "12"}
    assert spawned() == []


@pytest.mark.parametrize("extra", [{}, {"ground_truth": None}, {"ground_truth": " "}, {"ground_truth": "twelve"}])
def test_a_task_without_a_usable_ground_truth_is_a_failure_and_not_a_zero(extra: dict[str, object]) -> None:
    environment = MathEnvironment(num_workers=1, timeout_seconds=1.0, extraction="last_number")
    with pytest.raises(EnvironmentFailure, match=r"ground.truth"):
        asyncio.run(environment.step(conversation("12"), extra))


def test_a_conversation_without_a_reply_is_a_failure() -> None:
    environment = MathEnvironment(num_workers=1, timeout_seconds=1.0, extraction="last_number")
    with pytest.raises(EnvironmentFailure, match="assistant"):
        asyncio.run(environment.step(conversation("12")[:1], {"ground_truth": "12"}))
