"""Facts about the whole house that no single module can prove."""

import importlib.util
import pickle
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nemo_rl import errors, interfaces, metrics
from nemo_rl.data import batch, types
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.types import (
    Chat,
    ChatPair,
    Completion,
    Example,
    GenerationRequest,
    Message,
    Outcome,
    Preference,
    Rollout,
    RolloutGroup,
    SamplingParams,
    Task,
)
from nemo_rl.objectives.logprobs import TokenOutputs

ROOT = Path(__file__).resolve().parent.parent


def dataclasses_of(module: ModuleType) -> set[type]:
    return {
        thing
        for thing in vars(module).values()
        if isinstance(thing, type) and is_dataclass(thing) and thing.__module__ == module.__name__
    }


def examples() -> list[object]:
    task = Task((Message(role="user", content="2 + 3?"),), "math", {"ground_truth": "5"}, 3, torch.arange(4))
    sampling = SamplingParams(max_new_tokens=8, stop_strings=("\n",))
    completion = Completion(torch.tensor([5, 2]), torch.tensor([-0.5, -0.25]), "stop", 7)
    rollout = Rollout(
        torch.arange(6),
        torch.arange(6) > 3,
        torch.zeros(6),
        {"correct": 1.0},
        "stop",
        7,
        task.messages,
        {"timed_out": 0.0},
    )
    example = Example(torch.arange(6), torch.arange(6) > 3, 3, desirable=True)
    return [
        task,
        Chat(task.messages, ({"type": "function"},), 3),
        ChatPair(task.messages, task.messages, (), margin=2.0, index=3),
        example,
        Preference(example, example, 2.0, 3),
        sampling,
        GenerationRequest(torch.arange(4), sampling, 11),
        completion,
        rollout,
        RolloutGroup(task, (rollout, rollout)),
        Outcome({"correct": 1.0}, False, task.messages, {"turn": 2}, {"timed_out": 0.0}),
        TokenBatch(
            torch.arange(6),
            torch.tensor([0, 2, 6]),
            torch.tensor([0, 0]),
            {"loss_mask": torch.ones(6, dtype=torch.bool)},
        ),
        TokenOutputs(torch.zeros(3), torch.ones(3)),
        interfaces.Resources(2.0, 1.0, {"NAME": "value"}),
        metrics.Mean(1.0, 2),
        metrics.Sum(1.0),
        metrics.Max(1.0),
        metrics.Min(1.0),
        metrics.Histogram((1.0, 2.0)),
        metrics.EffectiveShare(1.0, 2.0, 3),
    ]


def assert_same(one: object, other: object) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif is_dataclass(one):
        for field in fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, dict) and isinstance(other, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, tuple) and isinstance(other, tuple):
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


@pytest.mark.parametrize("example", examples(), ids=lambda example: type(example).__name__)
def test_travelling_types_pickle_whole(example: object) -> None:
    assert_same(pickle.loads(pickle.dumps(example)), example)


def test_every_travelling_type_has_an_example_above() -> None:
    travelling = set().union(*map(dataclasses_of, (types, batch, interfaces, metrics)))
    assert travelling <= {type(example) for example in examples()}


def test_errors_cross_process_borders_with_type_and_message() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.NemoRLError)]
    assert len(kinds) > 5
    for kind in kinds:
        copy = pickle.loads(pickle.dumps(kind("what, where, what to do")))
        assert type(copy) is kind and str(copy) == "what, where, what to do"


def load_house_rules() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house_rules", ROOT / "scripts" / "house_rules.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "text", "offence"),
    [
        ("nemo_rl/long.py", "x = 1\n" * 401, "401 lines"),
        ("nemo_rl/long.py", "def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
        ("nemo_rl/utils.py", "", "named for what it does"),
        ("nemo_rl/rollouts/collect.py", "import os\nx = os.environ['HOME']\n", "only distributed/"),
        ("nemo_rl/algorithms/grpo.py", "loss.backward()\n", "only training/passes.py"),
        ("nemo_rl/data/batch.py", "def f():\n    print('here')\n", "only the command line prints"),
        ("README.md", "cd /ro" + "ot/project/x\n", "a path of one machine"),
        ("nemo_rl/one.py", "# TO" + "DO later\n", "unfinished work"),
        ("pyproject.toml", 'url = "https://pypi.company.example/sim' + 'ple"\n', "the host of a package registry"),
    ],
)
def test_house_rules_name_the_offence(
    name: str, text: str, offence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house_rules = load_house_rules()
    monkeypatch.setattr(house_rules, "ROOT", tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)

    found = list(house_rules.check(path))
    assert len(found) == 1 and found[0].startswith(f"{name}:") and offence in found[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nemo_rl/distributed/cache.py", "import os\nx = os.environ.get('NEMO_RL_CACHE')\n"),
        ("nemo_rl/training/passes.py", "def f():\n" + "    x = 1\n" * 59 + "loss.backward()\n"),
        ("tests/test_long.py", "def test_f():\n" + "    x = 1\n" * 90),
        ("README.md", "see https://pypi.org/simple and https://packaging.python.org, cd ~/work/project\n"),
    ],
)
def test_house_rules_let_the_owner_be(name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house_rules = load_house_rules()
    monkeypatch.setattr(house_rules, "ROOT", tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)

    assert list(house_rules.check(path)) == []
