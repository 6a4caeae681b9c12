"""A run whose policy is spread over two processes is the run of one process, which goes on where the two stopped."""

from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

import tiny_ppo  # pyright: ignore[reportImplicitRelativeImport]
from tiny_letters import make_letters_model  # pyright: ignore[reportImplicitRelativeImport]
from tiny_run import launch, overrides, records, reward_file, saved_tensors  # pyright: ignore[reportImplicitRelativeImport]

SETTINGS = (
    "policy.train_global_batch_size=4",
    "policy.optimizer={name: torch.optim.SGD, kwargs: {lr: 0.5}}",
    "loss_fn.reference_policy_kl_penalty=0.1",
    "checkpointing.save_period=2",
)
SHORT = (*SETTINGS, "grpo.max_num_steps=2", "checkpointing.enabled=false")
TWO = "cluster.ranks_per_node=2"
SAME = ("train/loss", "train/reward/mean", "train/grad_norm", "train/reference_kl", "train/tokens", "train/loss_tokens")


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and len(one) > 10
    for name, tensor in one.items():
        torch.testing.assert_close(
            other[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}"
        )


def test_two_ranks_do_what_one_process_does_and_it_goes_on_where_they_stopped(tiny_llama: Path, tmp_path: Path) -> None:
    reward = reward_file(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    launch(overrides(tiny_llama, reward, one, *SETTINGS))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    launch(overrides(tiny_llama, reward, two, *SETTINGS, TWO, "grpo.max_num_steps=2"))
    assert len(records(two)) == 2
    shards = sorted(path.name for path in (two / "step_2" / "policy" / "weights").glob("*.distcp"))
    assert [name.split("_")[2] for name in shards] == ["0", "1"]  # each rank wrote its own
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert all("multiprocessing" in " ".join(child.cmdline()) for child in left), left
    assert launch(overrides(tiny_llama, reward, two, *SETTINGS)).step == 3
    for step, (left_record, right_record) in enumerate(zip(records(one), records(two), strict=True)):
        for name in SAME:
            assert right_record[name] == pytest.approx(left_record[name], rel=1e-4, abs=1e-7), (step, name)
    assert_close(saved_tensors(one, 3), saved_tensors(two, 3))


@pytest.fixture(scope="module")
def alone(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float | None]]:
    """The records of two steps in one process."""
    folder = tmp_path_factory.mktemp("alone")
    launch(overrides(tiny_llama, reward_file(folder), folder / "run", *SHORT))
    return records(folder / "run")


@pytest.mark.parametrize("axis", ["tensor", "context", "pipeline"])
def test_the_second_step_is_sampled_with_what_two_ranks_have_learnt(
    axis: str, alone: list[dict[str, float | None]], tiny_llama: Path, tmp_path: Path
) -> None:
    spread = f"policy.dtensor_cfg.{axis}_parallel_size=2"
    launch(overrides(tiny_llama, reward_file(tmp_path), tmp_path / "run", *SHORT, TWO, spread))
    for found, known in zip(records(tmp_path / "run"), alone, strict=True):
        assert [found[name] for name in SAME] == pytest.approx([known[name] for name in SAME], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_a_critic_is_spread_like_the_policy(kind: str, tmp_path: Path) -> None:
    model, reward = make_letters_model(tmp_path / "letters"), reward_file(tmp_path)
    settings = (f"value.kind={kind}", "ppo.max_num_steps=2", "checkpointing.enabled=false")
    for name, more in (("one", ()), ("two", (TWO,))):
        tiny_ppo.launch(tiny_ppo.ppo_overrides(model, reward, tmp_path / name, *settings, *more))
    for found, known in zip(records(tmp_path / "two"), records(tmp_path / "one"), strict=True):
        for figure in ("train/loss", "train/value_loss", "train/reward/mean", "train/grad_norm", "train/returns/mean"):
            assert found[figure] == pytest.approx(known[figure], rel=1e-4, abs=1e-6), figure


def test_ranks_under_ray_do_what_one_process_does(
    alone: list[dict[str, float | None]], tiny_llama: Path, tmp_path: Path
) -> None:
    ray = ("cluster.executor=ray", "cluster.startup_timeout_seconds=250", TWO, "grpo.max_num_steps=1")
    launch(overrides(tiny_llama, reward_file(tmp_path), tmp_path / "run", *SHORT, *ray))
    (found,) = records(tmp_path / "run")
    assert [found[name] for name in SAME] == pytest.approx([alone[0][name] for name in SAME], rel=1e-4, abs=1e-7)
