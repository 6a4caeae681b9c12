"""The same plain worker class under every executor, on a real Ray cluster of two CPUs."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator

import psutil
import pytest
import torch
from plain_worker import Counter  # pyright: ignore[reportImplicitRelativeImport]

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.types import Rollout
from nemo_rl.distributed.calls import joined
from nemo_rl.distributed.executor import make_executor
from nemo_rl.distributed.ray_executor import RayExecutor
from nemo_rl.errors import ConfigError, DataError, WorkerError
from nemo_rl.interfaces import Executor, Resources

SMALL = Resources(num_cpus=0.5)


def children() -> set[int]:
    """Without multiprocessing's own helpers, which stay as long as this process."""
    found = psutil.Process().children(recursive=True)
    return {child.pid for child in found if not any("multiprocessing." in word for word in child.cmdline())}


@pytest.fixture(scope="module")
def ray_executor() -> Generator[Executor]:
    """One cluster for the module; when it has gone, so have its processes, the children of its workers included."""
    before = children()
    executor = RayExecutor(num_cpus=2, num_gpus=0, startup_timeout_seconds=90)
    try:
        worker = executor.start(Counter, resources=SMALL)
        worker.call("spawn").result(60)
        during = children() - before
        assert len(during) >= 4  # gcs, raylet, worker, the worker's child
        assert not worker.call("imported", "torch").result(120)
        worker.stop()
        yield executor
    finally:
        executor.shutdown()
    deadline = time.monotonic() + 10
    while left := [pid for pid in during | (children() - before) if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, [psutil.Process(pid).cmdline()[:3] for pid in left]
        time.sleep(0.1)


@pytest.fixture(params=["local", "ray"])
def executor(request: pytest.FixtureRequest) -> Generator[Executor]:
    if request.param == "ray":
        yield request.getfixturevalue("ray_executor")
        return
    with make_executor("local") as local:
        yield local


def test_worker_gives_the_same_results_everywhere(executor: Executor) -> None:
    worker = executor.start(Counter, 7, resources=SMALL)
    slow_first = [worker.call("add", value, 0.2 if value == 0 else 0.0) for value in range(5)]
    assert slow_first[-1].result(120) == [7, 0, 1, 2, 3, 4]
    assert slow_first[0].result(120) == [7, 0]
    assert [worker.call("add_async", 5).result(120), worker.call("add_async", 6).result(120)] == [True, True]
    assert worker.call("add", 8).result(120)[-3:] == [5, 6, 8]

    tokens = torch.arange(2_000_000)
    back = worker.call("echo", tokens).result(120)
    assert torch.equal(back, tokens)
    back += 1  # writable

    rollout = Rollout(tokens[:3], tokens[:3] > 0, torch.zeros(3), {"reward": 1.0}, "stop", 4, metrics={"x": 2.0})
    batch = TokenBatch(tokens[:3], torch.tensor([0, 3]), torch.tensor([0]), {"loss_mask": tokens[:3] > 0})
    same_rollout, same_batch = worker.call("echo", (rollout, batch)).result(120)
    assert (same_rollout.reward, same_rollout.stop_reason, same_rollout.metrics) == (1.0, "stop", {"x": 2.0})
    assert same_batch.token_columns["loss_mask"].tolist() == rollout.loss_mask.tolist()

    with torch.no_grad():
        assert worker.call("grad_enabled").result(120)
    with pytest.raises(DataError, match="no answer") as caught:
        worker.call("bad_data").result(120)
    assert caught.type is DataError
    worker.stop()
    with pytest.raises(WorkerError, match="Counter was stopped and cannot run `pid`"):
        worker.call("pid")


def test_event_loop_goes_on_while_a_call_is_awaited(executor: Executor) -> None:
    worker = executor.start(Counter, resources=SMALL)

    async def drive() -> int:
        ticks = 0
        slow, failing = worker.call("add", 1, 0.5), worker.call("bad_data")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(worker.call("pid"), 0.05)
        waiting = asyncio.gather(slow, failing, return_exceptions=True)
        while not waiting.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert waiting.result()[0] == [0, 1]
        assert isinstance(waiting.result()[1], DataError)
        return ticks

    assert asyncio.run(drive()) > 10
    assert worker.call("add", 2).result(120) == [0, 1, 2]
    worker.stop()


def test_answers_of_a_group_join_in_rank_order_and_the_first_failure_in_time_names_its_rank(
    executor: Executor,
) -> None:
    group = executor.start_group(Counter, [{"start": 10}, {"start": 20}], SMALL)
    assert len({os.getpid(), *(worker.call("pid").result(120) for worker in group)}) == 3
    assert joined([w.call("add", 1) for w in group], list, "group.add").result(120) == [[10, 1], [20, 1]]
    running = group[0].call("add", 5, 2.0)
    with pytest.raises(DataError) as caught:
        joined([running, *(worker.call("bad_data") for worker in reversed(group))], list, "group").result(120)
    with pytest.raises(TimeoutError):
        running.result(0)  # the failure of the second call did not wait for the first
    assert "rank 1 of 3" in caught.value.__notes__
    assert "in bad_data" in caught.value.__notes__[0]  # with the traceback of the other process
    assert running.result(120) == [10, 1, 5]
    for worker in group:
        worker.stop()
    with pytest.raises(DataError, match="no such data set"):
        executor.start_group(Counter, [{}, {"fail": True}], SMALL)


def test_a_joined_future_can_be_awaited_and_fails_where_its_parts_cannot_be_combined() -> None:
    assert joined([], list, "nobody").result(0) == []
    with make_executor("local") as local:
        worker = local.start(Counter, 3)

        async def drive() -> int:
            return await joined([worker.call("add", 4, 0.1), worker.call("echo", 5)], len, "both")

        assert asyncio.run(drive()) == 2
        with pytest.raises(TypeError):
            joined([worker.call("echo", "not a number")], sum, "one").result(10)


def test_stopped_worker_fails_the_calls_that_wait_for_it(executor: Executor) -> None:
    worker = executor.start(Counter, resources=SMALL)
    worker.call("add", 1, 0.5)
    waiting = worker.call("add", 2)
    worker.stop()
    with pytest.raises(WorkerError, match=r"Counter\.add was stopped before it could answer"):
        waiting.result(120)


def test_env_vars_reach_the_worker(executor: Executor) -> None:
    worker = executor.start(Counter, resources=Resources(0.5, env_vars={"NRL_PROBE": "here"}))
    assert worker.call("getenv", "NRL_PROBE").result(120) == "here"
    worker.stop()


def test_local_env_vars_cannot_differ_between_workers_and_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NRL_PROBE", "before")
    with make_executor("local") as local:
        local.start(Counter, resources=Resources(env_vars={"NRL_PROBE": "a", "NRL_NEW": "x"}))
        with pytest.raises(ConfigError, match="NRL_PROBE=b"):
            local.start(Counter, resources=Resources(env_vars={"NRL_PROBE": "b"}))
    assert os.environ["NRL_PROBE"] == "before"
    assert "NRL_NEW" not in os.environ


def test_local_worker_lives_here_and_its_exceptions_keep_type_and_traceback() -> None:
    with make_executor("local") as local:
        worker = local.start(Counter)
        assert worker.call("pid").result() == os.getpid()
        with pytest.raises(ZeroDivisionError) as caught:
            worker.call("bug").result()
        assert caught.traceback[-1].name == "bug"


def test_remote_exceptions_bring_their_traceback(ray_executor: Executor) -> None:
    worker = ray_executor.start(Counter, resources=SMALL)
    with pytest.raises(WorkerError, match=r"(?s)worker Counter failed in `bug`.*in bug.*ZeroDivisionError: of my own"):
        worker.call("bug").result(120)
    with pytest.raises(DataError) as caught:
        worker.call("bad_data").result(120)
    assert str(caught.value) == "record 3 has no answer"
    assert "in bad_data" in caught.value.__notes__[0]
    with pytest.raises(TimeoutError, match=r"Counter.add did not answer within 0.1 s"):
        worker.call("add", 1, 0.5).result(0.1)
    worker.stop()


def test_killed_actor_is_noticed_within_seconds(ray_executor: Executor) -> None:
    worker = ray_executor.start(Counter, resources=SMALL)
    pid = worker.call("pid").result(120)
    assert pid != os.getpid()
    waiting = worker.call("add", 1, 60.0)
    begun = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="worker Counter died during `add`"):
        waiting.result(120)
    assert time.monotonic() - begun < 10
    worker.stop()


def test_impossible_resources_fail_at_once_with_both_sides_of_the_sum(ray_executor: Executor) -> None:
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=r"4 x Counter asks for 4 CPU and 0 GPU .* has 2 CPU and 0 GPU on 1 node"):
        ray_executor.start_group(Counter, [{}] * 4)
    with pytest.raises(ConfigError, match="asks for 1 CPU and 1 GPU"):
        ray_executor.start(Counter, resources=Resources(num_gpus=1))
    assert time.monotonic() - begun < 2


def test_resources_that_stay_taken_fail_at_the_deadline_and_come_back_after_stop(ray_executor: Executor) -> None:
    taken = ray_executor.start(Counter, resources=Resources(num_cpus=1.5))
    with RayExecutor(startup_timeout_seconds=1) as second:  # joins the running cluster and leaves it running
        with pytest.raises(ConfigError, match=r"0.5 CPU and 0 GPU free.*\(waited 1 s\)"):
            second.start(Counter, resources=Resources(num_cpus=1.5))
        taken.stop()
    ray_executor.start(Counter, resources=Resources(num_cpus=1.5)).stop()


def test_worker_that_does_not_stand_in_time_is_a_sentence(ray_executor: Executor) -> None:
    with (
        RayExecutor(startup_timeout_seconds=1) as hasty,
        pytest.raises(WorkerError, match=r"did not start.*cluster.startup_timeout_seconds=1"),
    ):
        hasty.start(time.sleep, 60, resources=SMALL)


def test_local_executor_does_not_import_ray() -> None:
    code = (
        "import sys; from nemo_rl.distributed.executor import make_executor\n"
        "with make_executor('local') as e: e.start(dict)\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
