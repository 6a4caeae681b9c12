"""What stands in the way of a Ray cluster is said in one sentence, before any is started."""

import sys

import pytest

from nemo_rl.distributed.executor import make_executor
from nemo_rl.distributed.ray_executor import RayExecutor
from nemo_rl.errors import DependencyError, WorkerError


def test_missing_ray_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DependencyError, match="uv sync --extra ray"):
        make_executor("ray")


def test_address_without_a_cluster_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(WorkerError, match=r"cannot connect to the Ray cluster at RAY_ADDRESS=127\.0\.0\.1:1"):
        RayExecutor()
