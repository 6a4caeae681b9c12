"""A worker in a process of its own: what it takes along, how it dies, and that nothing of it stays."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator

import psutil
import pytest
import torch
from plain_worker import Counter  # pyright: ignore[reportImplicitRelativeImport]

from nemo_rl.distributed.local import LocalExecutor
from nemo_rl.errors import DataError, WorkerError
from nemo_rl.interfaces import Resources, WorkerHandle


@pytest.fixture
def executor() -> Generator[LocalExecutor]:
    with LocalExecutor() as executor:
        yield executor


def start(executor: LocalExecutor, **env_vars: str) -> tuple[WorkerHandle, int]:
    (worker,) = executor.start_group(Counter, [{"start": 7}], Resources(env_vars=env_vars))
    return worker, worker.call("pid").result(60)


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_arguments_results_and_errors_travel(executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NRL_OF_THE_DRIVER", "now")
    worker, pid = start(executor, NRL_OF_THE_WORKER="own")
    assert pid != os.getpid()
    assert worker.call("getenv", "NRL_OF_THE_DRIVER").result(60) == "now"  # not as the fork server found it
    assert worker.call("getenv", "NRL_OF_THE_WORKER").result(60) == "own"
    assert worker.call("getenv", "OMP_NUM_THREADS").result(60) == str(torch.get_num_threads())
    tokens = torch.arange(300_000)
    calls = [worker.call("add", 1, 0.3), *(worker.call("echo", tokens) for _ in range(20)), worker.call("add_async", 2)]
    assert calls[0].result(60) == [7, 1]
    assert all(torch.equal(call.result(60), tokens) for call in calls[1:-1])  # more than a pipe holds
    assert calls[-1].result(60) is True
    with pytest.raises(DataError, match="record 3 has no answer") as caught:
        worker.call("bad_data").result(60)
    assert caught.type is DataError
    assert "raised in worker Counter[0]" in caught.value.__notes__[0]
    with pytest.raises(WorkerError, match=r"(?s)worker Counter\[0\] failed in `bug`.*ZeroDivisionError: of my own"):
        worker.call("bug").result(60)
    with pytest.raises(WorkerError, match=r"(?s)Counter\[0\] cannot .* send its result.*cannot pickle"):
        worker.call("lock").result(60)
    assert worker.call("add", 3).result(60) == [7, 1, 2, 3]  # it has lived through all that


def test_a_killed_process_fails_its_calls_at_once_and_takes_along_what_it_started(executor: LocalExecutor) -> None:
    worker, pid = start(executor)
    child = worker.call("spawn").result(60)
    running, waiting = worker.call("add", 1, 60.0), worker.call("pid")
    begun = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"worker Counter\[0\] died during `add`: its process was ended by SIGKILL"):
        running.result(30)
    with pytest.raises(WorkerError, match="died during `pid`"):
        waiting.result(30)
    with pytest.raises(WorkerError, match=r"has died \(its process was ended by SIGKILL.*\) and runs no `pid`"):
        worker.call("pid").result(0)
    assert time.monotonic() - begun < 10
    wait_until(lambda: not psutil.pid_exists(child))


def test_a_process_that_ends_by_itself_says_how(executor: LocalExecutor) -> None:
    worker, _ = start(executor)
    with pytest.raises(WorkerError, match="died during `leave`: its process ended with exit code 5"):
        worker.call("leave", 5).result(60)


def test_a_stopped_worker_leaves_nothing_behind(executor: LocalExecutor) -> None:
    worker, pid = start(executor)
    child = worker.call("spawn").result(60)
    running = worker.call("add", 1, 60.0)
    worker.stop()
    with pytest.raises(WorkerError, match=r"Counter\[0\]\.add was stopped before it could answer"):
        running.result(0)
    with pytest.raises(WorkerError, match=r"Counter\[0\] was stopped and cannot run `pid`"):
        worker.call("pid")
    wait_until(lambda: not psutil.pid_exists(pid) and not psutil.pid_exists(child))


_DRIVER = """
import signal
import sys
from plain_worker import Counter
from nemo_rl.distributed.local import LocalExecutor

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests themselves were started with
    with LocalExecutor() as executor:
        group = executor.start_group(Counter, [{}, {}])
        print(*(worker.call("pid").result() for worker in group), flush=True)
        group[0].call("add", 1, 600.0).result()
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_its_driver(end: signal.Signals, tmp_path_factory: pytest.TempPathFactory) -> None:
    script = tmp_path_factory.mktemp("driver") / "drive.py"
    script.write_text(_DRIVER)
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ,
                          text=True, start_new_session=True) as driver:  # fmt: skip
        assert driver.stdout is not None and driver.stderr is not None
        ranks = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(ranks) == 2
        os.killpg(driver.pid, end)  # as a terminal does it
        said = driver.stderr.read()
    assert "KeyboardInterrupt" in said if end == signal.SIGINT else said == ""
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in ranks))
