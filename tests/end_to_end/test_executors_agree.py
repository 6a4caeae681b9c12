"""Where the policy runs makes no difference to what it does."""

import time
from pathlib import Path

import psutil

from tiny_run import (  # pyright: ignore[reportImplicitRelativeImport]
    assert_same_run,
    launch,
    overrides,
    reward_file,
)


def test_a_run_under_ray_equals_the_local_one_and_leaves_no_process(tiny_llama: Path, tmp_path: Path) -> None:
    reward = reward_file(tmp_path)
    settings = ("policy.train_global_batch_size=6", "loss_fn.reference_policy_kl_penalty=0.1")
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
    assert_same_run(tmp_path / "local", tmp_path / "ray", 3)

    deadline = time.monotonic() + 20
    while left := set(psutil.Process().children(recursive=True)) - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
