"""Reward functions by import path: every way they can go wrong is a sentence, never a zero."""

import asyncio
import pickle
import time
from pathlib import Path

import pytest

from nemo_rl.data.types import Message, Outcome
from nemo_rl.environments.function import FunctionEnvironment
from nemo_rl.errors import ConfigError, EnvironmentFailure

REWARDS = """
import asyncio, math, sys, time
import numpy, torch
from fractions import Fraction

def exact(completion, ground_truth): return completion == ground_truth
def named(completion, **extra): return {"length": len(completion), "extras": float(len(extra))}
async def later(completion, *, ground_truth):
    await asyncio.sleep(0.01)
    return 0.25
class Callable:
    async def __call__(self, completion): return Fraction(1, 2)
callable_object = Callable()
def sleeps(completion):
    time.sleep(float(completion))
    return 1.0
async def sleeps_async(completion): await asyncio.sleep(float(completion))

def positional(completion, /, **extra): return len(extra)
def numpy_bool(completion): return numpy.bool_(True)
def torch_scalars(completion): return {"zero": torch.tensor(0.5), "one": torch.ones(1, requires_grad=True)}

def raises(completion): return 1 / 0
def stops(completion): raise StopIteration(completion)
def cancels(completion): raise asyncio.CancelledError("mine")
def interrupts(completion): raise KeyboardInterrupt
async def leaves_async(completion): sys.exit(3)
async def stops_async(completion): raise StopIteration(completion)
async def cancels_async(completion): raise asyncio.CancelledError("mine")
def leaves(completion): sys.exit(3)
def nan(completion): return math.nan
def infinite(completion): return {"good": 1.0, "bad": math.inf}
def nothing(completion): return None
def array(completion): return numpy.zeros(2)
def torch_nan(completion): return torch.tensor(math.nan)
def text(completion): return "1.0"
def empty(completion): return {}
def misnamed(completion): return {1: 1.0}

def no_parameter(): return 1.0
def only_keywords(*, completion): return 1.0
def two_positional(completion, other, /): return 1.0
not_callable = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    file.write_text(REWARDS)
    return file


def step(environment: FunctionEnvironment, reply: str = "12") -> Outcome:
    return asyncio.run(score(environment, reply))


async def score(environment: FunctionEnvironment, reply: str, **others: str) -> Outcome:
    messages = [Message(role="user", content="What is 5 + 7?"), Message(role="assistant", content=reply)]
    extra = {"ground_truth": "12", "kind": "sum", **others}
    return await asyncio.wait_for(environment.step(messages, extra), 20)


@pytest.mark.parametrize(
    ("name", "rewards"),
    [
        ("exact", {"reward": 1.0}),
        ("named", {"length": 2.0, "extras": 2.0}),
        ("later", {"reward": 0.25}),
        ("callable_object", {"reward": 0.5}),
        ("numpy_bool", {"reward": 1.0}),
        ("torch_scalars", {"zero": 0.5, "one": 1.0}),
    ],
)
def test_a_function_gives_its_rewards(file: Path, name: str, rewards: dict[str, float]) -> None:
    outcome = step(FunctionEnvironment(f"{file}:{name}"))
    assert outcome.rewards == rewards
    assert all(type(reward) is float for reward in outcome.rewards.values())
    assert outcome.done


def test_an_extra_named_as_the_completion_parameter_is_left_out(file: Path) -> None:
    def reward(name: str) -> dict[str, float]:
        environment = FunctionEnvironment(f"{file}:{name}")
        return asyncio.run(score(environment, "12", completion="another")).rewards

    assert reward("named") == {"length": 2.0, "extras": 2.0}
    assert reward("exact") == {"reward": 1.0}
    assert reward("positional") == {"reward": 3.0}


def test_a_cancellation_from_outside_is_no_failure_of_the_function(file: Path) -> None:
    async def cancelled(name: str) -> bool:
        task = asyncio.create_task(score(FunctionEnvironment(f"{file}:{name}"), "5"))
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(cancelled("sleeps_async"))
    assert asyncio.run(cancelled("sleeps"))


def test_a_function_of_an_installed_module_is_found() -> None:
    assert step(FunctionEnvironment("operator:length_hint"), "abc").rewards == {"reward": 3.0}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raises", "raised ZeroDivisionError: division by zero"),
        ("stops", "raised StopIteration: 12"),
        ("cancels", "raised CancelledError: mine"),
        ("interrupts", "raised KeyboardInterrupt"),
        ("leaves", "raised SystemExit: 3"),
        ("stops_async", "raised RuntimeError: coroutine raised StopIteration"),
        ("cancels_async", "raised CancelledError: mine"),
        ("leaves_async", "raised SystemExit: 3"),
        ("nan", "returned nan as 'reward'"),
        ("infinite", "returned inf as 'bad'"),
        ("nothing", "returned a value of type NoneType as 'reward'"),
        ("text", "returned a value of type str as 'reward'"),
        ("array", "returned a value of type ndarray as 'reward'"),
        ("torch_nan", "returned nan as 'reward'"),
        ("empty", "returned an empty mapping"),
        ("misnamed", "named a reward 1"),
    ],
)
def test_a_failure_names_function_reason_and_task_and_pickles(file: Path, name: str, reason: str) -> None:
    with pytest.raises(EnvironmentFailure) as caught:
        step(FunctionEnvironment(f"{file}:{name}"))
    message = str(caught.value)
    assert f"my_rewards.py:{name}" in message
    assert reason in message
    assert "What is 5 + 7?" in message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "defines no function 'missing'"),
        ("not_callable", "defines no function 'not_callable'"),
        ("no_parameter", "no_parameter(); it must be callable as (completion, **extra)"),
        ("only_keywords", "only_keywords(*, completion); it must be callable"),
        ("two_positional", "two_positional(completion, other, /); it must be callable"),
    ],
)
def test_a_function_that_cannot_be_used_is_a_config_error(file: Path, name: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FunctionEnvironment(f"{file}:{name}")
    assert reason in str(caught.value)


def test_a_path_that_cannot_be_imported_is_a_config_error(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("def f(:")
    for path, reason in {
        "no_such_module:f": "ModuleNotFoundError",
        f"{tmp_path}/nowhere.py:f": "FileNotFoundError",
        f"{broken}:f": "SyntaxError",
        "no_colon": "must be `package.module:name`",
        ":f": "must be `package.module:name`",
        "module:": "must be `package.module:name`",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            FunctionEnvironment(path)


@pytest.mark.parametrize("name", ["sleeps", "sleeps_async"])
def test_a_hang_is_a_failure_at_its_deadline(file: Path, name: str) -> None:
    environment = FunctionEnvironment(f"{file}:{name}", timeout_seconds=0.3)
    start = time.perf_counter()
    with pytest.raises(EnvironmentFailure, match=r"did not return within 0\.3 s"):
        step(environment, "5")
    assert time.perf_counter() - start < 2.0


def test_a_slow_function_does_not_block_the_others(file: Path) -> None:
    async def all_at_once(environment: FunctionEnvironment) -> float:
        start = time.perf_counter()
        await asyncio.gather(*(score(environment, "0.3") for _ in range(32)))
        return time.perf_counter() - start

    environment = FunctionEnvironment(f"{file}:sleeps")
    assert asyncio.run(all_at_once(environment)) < 3.0
    assert asyncio.run(all_at_once(environment)) < 3.0
