"""A run whose policy is spread over two processes is the run of one process, which goes on where the two stopped."""

import json
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from tiny_run import launch, overrides, records, reward_file, saved_tensors  # pyright: ignore[reportImplicitRelativeImport]

SETTINGS = (
    "policy.train_global_batch_size=4",
    "policy.optimizer={name: torch.optim.SGD, kwargs: {lr: 0.5}}",
    "loss_fn.reference_policy_kl_penalty=0.1",
    "checkpointing.save_period=2",
)
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
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert all("multiprocessing" in " ".join(child.cmdline()) for child in left), left
    assert launch(overrides(tiny_llama, reward, two, *SETTINGS)).step == 3
    for step, (left_record, right_record) in enumerate(zip(records(one), records(two), strict=True)):
        for name in SAME:
            assert right_record[name] == pytest.approx(left_record[name], rel=1e-4, abs=1e-7), (step, name)
    assert_close(saved_tensors(one, 3), saved_tensors(two, 3))


def test_ranks_under_ray_do_what_one_process_does(tiny_llama: Path, tmp_path: Path) -> None:
    reward, short = reward_file(tmp_path), (*SETTINGS, "grpo.max_num_steps=1", "checkpointing.enabled=false")
    launch(overrides(tiny_llama, reward, tmp_path / "one", *short))
    ray = ("cluster.executor=ray", "cluster.startup_timeout_seconds=250", TWO)
    launch(overrides(tiny_llama, reward, tmp_path / "two", *short, *ray))
    (one,), (two,) = records(tmp_path / "one"), records(tmp_path / "two")
    assert [two[name] for name in SAME] == pytest.approx([one[name] for name in SAME], rel=1e-4, abs=1e-7)
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    peaks = summary["peak_memory_bytes_by_phase"]
    assert peaks.keys() == summary["seconds_by_phase"].keys() >= {"load", "generate", "logprobs", "train"}
    assert all(64 << 20 < peak <= summary["peak_memory_bytes"] for peak in peaks.values())


def test_one_rank_may_keep_its_weights_on_the_cpu(tiny_llama: Path, tmp_path: Path) -> None:
    reward, one, offloaded = reward_file(tmp_path), tmp_path / "one", tmp_path / "offloaded"
    saving = ("policy.dtensor_cfg={cpu_offload: true, activation_checkpointing: selective}",)
    saving += ("policy.offload_optimizer_for_logprob=true",)
    launch(overrides(tiny_llama, reward, one, *SETTINGS))
    launch(overrides(tiny_llama, reward, offloaded, *SETTINGS, *saving, "grpo.max_num_steps=2"))
    launch(overrides(tiny_llama, reward, offloaded, *SETTINGS, *saving))
    for left, right in zip(records(one), records(offloaded), strict=True):
        assert [right[name] for name in SAME] == pytest.approx([left[name] for name in SAME], rel=1e-4, abs=1e-7)
    assert_close(saved_tensors(one, 3), saved_tensors(offloaded, 3))
