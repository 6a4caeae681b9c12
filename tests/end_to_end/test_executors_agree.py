"""Where the policy runs makes no difference to what it does."""

import time
from pathlib import Path

import psutil
import pytest

from tiny_run import (  # pyright: ignore[reportImplicitRelativeImport]
    assert_same_run,
    launch,
    overrides,
    records,
    reward_file,
)


def test_a_run_under_ray_equals_the_local_one_and_leaves_no_process(
    tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reward = reward_file(tmp_path)
    settings = ("policy.train_global_batch_size=4", "loss_fn.reference_policy_kl_penalty=0.1")
    launch(overrides(tiny_llama, reward, tmp_path / "local", *settings))
    before = set(psutil.Process().children(recursive=True))
    launch(
        overrides(
            tiny_llama,
            reward,
            tmp_path / "ray",
            *settings,
            "cluster.executor=ray",
            "cluster.startup_timeout_seconds=250",
        )
    )
    printed = "".join(capfd.readouterr())
    assert "step 3/3" in printed and "it/s" not in printed  # no progress bar of a library, from whichever process
    assert_same_run(tmp_path / "local", tmp_path / "ray", 3)
    steps = records(tmp_path / "local")
    assert [step["train/reward/mean"] for step in steps] == pytest.approx([0.324430, 0.319033, 0.302661], rel=1e-4)
    assert [step["train/loss"] for step in steps] == pytest.approx([-0.124782, 0.163356, 0.286369], rel=1e-3)
    assert steps[-1]["train/reference_kl"] == pytest.approx(0.00662767, rel=1e-3)

    deadline = time.monotonic() + 20
    while left := set(psutil.Process().children(recursive=True)) - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
