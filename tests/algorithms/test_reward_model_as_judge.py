"""A reward model is trained, then judges the answers of a GRPO run, whose policy learns to please it."""

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import nemo_rl.algorithms.judges as judges
from nemo_rl.algorithms.evaluate import launch_eval
from nemo_rl.algorithms.judges import reward_model_starter
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.cluster import ClusterConfig
from nemo_rl.config.schema.environments import RewardModelEnvironmentConfig
from nemo_rl.config.schema.evaluation import EvalConfig
from nemo_rl.data.types import Message
from nemo_rl.distributed.local import LocalExecutor
from nemo_rl.environments.registry import build_environments
from nemo_rl.errors import ConfigError, ModelError
from nemo_rl.interfaces import Resources
from nemo_rl.workers.reward_model import RewardModelWorker
from tiny_reward_model import train_reward_model  # pyright: ignore[reportImplicitRelativeImport]

CONVERSATION = [Message(role="user", content="7?"), Message(role="assistant", content="yes 7")]


@pytest.fixture(scope="module")
def judge(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that has learnt to prefer "yes" to "no"."""
    folder = tmp_path_factory.mktemp("judge") / "run"
    train_reward_model(tiny_llama, folder, 8, "checkpointing.export_hf=true")
    return folder / "hf"


def spec(judge: Path | str, *more: str) -> str:
    return f"{{{', '.join(['type: reward_model', f'model_name: {judge}', 'precision: float32', *more])}}}"


def test_an_evaluation_takes_the_same_judge(tiny_llama: Path, judge: Path, tmp_path: Path) -> None:
    settings = [
        f"generation.model_name={tiny_llama}",
        "generation.max_new_tokens=4",
        "data.num_samples=6",
        "data.environment=judge",
        f"+env.judge={spec(judge)}",
        "eval.metric=avg@n",
        f"eval.save_path={tmp_path / 'eval'}",
    ]
    evaluation = launch_eval(load_config(None, settings, EvalConfig))
    scores = [sample.score for sample in evaluation.samples]
    assert len(scores) == 6 and evaluation.num_dropped == 0
    assert evaluation.estimate.value == pytest.approx(sum(scores) / 6)


def test_under_ray_the_score_is_the_same(judge: Path) -> None:
    config = RewardModelEnvironmentConfig(type="reward_model", model_name=str(judge), precision="float32")
    cluster = ClusterConfig(executor="ray", startup_timeout_seconds=250)
    with ExitStack() as stack:
        environment = build_environments({"judge": config}, reward_model_starter(cluster, stack))["judge"]
        outcome = asyncio.run(environment.step(CONVERSATION, {}))
        asyncio.run(environment.close())
    here = RewardModelWorker(str(judge), tokenizer=str(judge), precision="float32").score([CONVERSATION])
    assert [outcome.rewards["reward"]] == pytest.approx(here, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "cluster", "error", "message"),
    [
        ({"device": "cuda"}, {}, ConfigError, r"env\.judge\.device is cuda and torch finds no GPU here"),
        ({"device": "cuda"}, {"executor": "ray"}, ConfigError, r"env\.judge\.num_gpus = 0 asks Ray for none"),
        ({"model_name": "./nowhere"}, {}, ModelError, "the model folder nowhere does not exist"),
    ],
)
def test_a_judge_that_cannot_stand_is_refused(
    settings: dict[str, str], cluster: dict[str, str], error: type[Exception], message: str
) -> None:
    config = RewardModelEnvironmentConfig.model_validate({"type": "reward_model", "model_name": "m", **settings})
    with ExitStack() as stack, pytest.raises(error, match=message):
        build_environments({"judge": config}, reward_model_starter(ClusterConfig.model_validate(cluster), stack))


def test_a_reward_model_needs_someone_to_start_it() -> None:
    config = RewardModelEnvironmentConfig(type="reward_model", model_name="m")
    with pytest.raises(ConfigError, match=r"env\.judge is a reward model, and there is no executor here"):
        build_environments({"judge": config})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("reward_min: 1.0, reward_max: 1.0", "reward_min = 1 is not below reward_max = 1"),
        ("reward_scale: 0.0", "reward_scale = 0 makes every reward the same"),
        ("max_batchsize: 3", r"did you mean env\.judge\.max_batch_size"),
    ],
)
def test_settings_of_a_judge_that_cannot_work_are_refused(settings: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"+env.judge={spec('m', settings)}"], EvalConfig)


def test_every_setting_of_a_judge_arrives_in_its_worker(
    judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    executor = LocalExecutor()
    monkeypatch.setattr(executor, "start", lambda *args, **kwargs: started.append((args, kwargs)))
    monkeypatch.setattr(judges, "make_executor", lambda kind, **options: executor)
    settings = {
        "tokenizer": {"name": str(judge), "chat_template": "{{ messages }}"},
        "max_model_len": 99,
        "max_batch_tokens": 77,
        "precision": "float32",
        "device": "cpu",
        "num_gpus": 0.5,
        "num_threads": 3,
    }
    config = RewardModelEnvironmentConfig.model_validate({"type": "reward_model", "model_name": str(judge), **settings})
    with ExitStack() as stack:
        reward_model_starter(ClusterConfig(), stack)("judge", config)
    del settings["num_gpus"]
    ((args, kwargs),) = started
    assert args == (RewardModelWorker, str(judge))
    assert kwargs == {
        **settings,
        "tokenizer": str(judge),
        "chat_template": "{{ messages }}",
        "resources": Resources(num_cpus=3.0, num_gpus=0.5),
    }
