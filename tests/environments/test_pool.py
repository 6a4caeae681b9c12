"""The worker pool: deadlines, deaths and leftovers, with real processes."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

import psutil
import pytest

from child_processes import forget_other_processes, spawned
from nemo_rl.environments.pool import ProcessPool
from nemo_rl.errors import WorkerError


@pytest.fixture(autouse=True)
def only_own_processes() -> None:
    forget_other_processes()


def workers() -> set[psutil.Process]:
    """The living worker processes: what the nursery, this process's only child, has forked."""
    forked = [worker for nursery in spawned() for worker in nursery.children()]
    return {worker for worker in forked if worker.status() != psutil.STATUS_ZOMBIE}


# `operator.call(f, *arguments)` lets each test choose what the worker does.
CALL = "operator:call"


def with_pool[T](body: Callable[[ProcessPool[object]], Awaitable[T]], deadline_seconds: float = 30.0) -> T:
    async def main() -> T:
        pool = ProcessPool[object](CALL, num_workers=2, deadline_seconds=deadline_seconds)
        try:
            return await body(pool)
        finally:
            await pool.close()

    return asyncio.run(main())


def test_results_come_back_and_workers_are_other_processes() -> None:
    async def body(pool: ProcessPool[object]) -> None:
        assert await asyncio.gather(*(pool.run(pow, n, 2) for n in range(20))) == [n * n for n in range(20)]
        assert await pool.run(os.getpid) in {worker.pid for worker in workers()}

    with_pool(body)


def test_workers_import_neither_torch_nor_the_callers_main() -> None:
    async def body(pool: ProcessPool[object]) -> None:
        modules = await pool.run(
            eval, "(__import__('nemo_rl.environments.verification'), list(__import__('sys').modules))[1]"
        )
        assert isinstance(modules, list)
        assert "math_verify" in modules
        assert not {"torch", "numpy", "ray", "pytest"} & set(modules)

    with_pool(body)


def test_both_workers_are_busy_at_once() -> None:
    async def body(pool: ProcessPool[object]) -> float:
        await asyncio.gather(pool.run(time.sleep, 0.2), pool.run(time.sleep, 0.2))
        start = time.perf_counter()
        await asyncio.gather(*(pool.run(time.sleep, 0.5) for _ in range(4)))
        return time.perf_counter() - start

    assert 1.0 <= with_pool(body) < 1.8


def test_a_hang_costs_its_deadline_and_nobody_else() -> None:
    async def body(pool: ProcessPool[object]) -> None:
        await asyncio.gather(pool.run(pow, 2, 2), pool.run(pow, 2, 2))
        start = time.perf_counter()
        hang = asyncio.create_task(pool.run(time.sleep, 3600))
        assert await asyncio.gather(*(pool.run(pow, n, 1) for n in range(20))) == list(range(20))
        with pytest.raises(TimeoutError):
            await hang
        assert 1.0 <= time.perf_counter() - start < 5.0
        await asyncio.gather(pool.run(time.sleep, 0.2), pool.run(time.sleep, 0.2))
        assert len(workers()) == 2
        assert await asyncio.gather(*(pool.run(pow, n, 1) for n in range(20))) == list(range(20))

    with_pool(body, deadline_seconds=1.0)


def test_code_that_ignores_signals_still_meets_its_deadline() -> None:
    async def body(pool: ProcessPool[object]) -> None:
        endless = "__import__('signal').pthread_sigmask(0, range(1, 65)) and None or 9**9**9**9"
        with pytest.raises(TimeoutError):
            await pool.run(eval, endless)

    with_pool(body, deadline_seconds=0.5)


def test_a_worker_that_dies_under_an_item_is_replaced() -> None:
    async def body(pool: ProcessPool[object]) -> None:
        await asyncio.gather(pool.run(time.sleep, 0.2), pool.run(time.sleep, 0.2))
        before = workers()
        with pytest.raises(ChildProcessError, match="died"):
            await pool.run(os._exit, 7)
        await asyncio.gather(pool.run(time.sleep, 0.2), pool.run(time.sleep, 0.2))
        assert len(workers()) == 2
        assert len(workers() & before) == 1

    with_pool(body)


@pytest.mark.parametrize("num_used", [1, 2])
def test_a_worker_killed_while_idle_costs_no_item(num_used: int) -> None:
    async def body(pool: ProcessPool[object]) -> None:
        await asyncio.gather(*(pool.run(time.sleep, 0.2) for _ in range(num_used)))
        for worker in workers():
            worker.kill()
        await asyncio.sleep(0.2)
        assert await asyncio.gather(*(pool.run(pow, n, 1) for n in range(4))) == [0, 1, 2, 3]

    with_pool(body)


def test_a_killed_nursery_is_replaced() -> None:
    async def body(pool: ProcessPool[object]) -> None:
        await asyncio.gather(pool.run(time.sleep, 0.2), pool.run(time.sleep, 0.2))
        for process in spawned(recursive=True):
            process.kill()
        await asyncio.sleep(0.2)
        assert await asyncio.gather(*(pool.run(pow, n, 1) for n in range(4))) == [0, 1, 2, 3]

    with_pool(body)


def test_an_exception_is_one_line_and_the_worker_lives_on() -> None:
    async def body(pool: ProcessPool[object]) -> None:
        await asyncio.gather(pool.run(time.sleep, 0.2), pool.run(time.sleep, 0.2))
        before = workers()
        with pytest.raises(ChildProcessError, match="ZeroDivisionError: integer"):
            await pool.run(divmod, 1, 0)
        assert workers() == before

    with_pool(body)


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited on Linux only")
def test_memory_is_bounded_and_a_worker_that_grew_is_replaced() -> None:
    async def body(pool: ProcessPool[object]) -> None:
        with pytest.raises(ChildProcessError, match="MemoryError"):
            await pool.run(bytes, 4 << 30)
        before = {await pool.run(os.getpid), await pool.run(os.getpid)}
        await pool.run(eval, "len(b'x' * (700 << 20))")
        assert not {await pool.run(os.getpid), await pool.run(os.getpid)} <= before

    with_pool(body)


def test_no_process_is_left_after_close_even_when_one_hangs() -> None:
    async def body(pool: ProcessPool[object]) -> None:
        hang = asyncio.create_task(pool.run(time.sleep, 3600))
        await pool.run(time.sleep, 0.2)
        processes = spawned(recursive=True)
        assert len(processes) == 3
        await pool.close()
        assert not any(process.is_running() for process in processes)
        with pytest.raises(WorkerError, match="closed"):
            await hang
        with pytest.raises(WorkerError, match="closed"):
            await pool.run(pow, 1, 1)

    with_pool(body)


def test_closing_at_once_leaves_nothing() -> None:
    asyncio.run(ProcessPool[object](CALL, num_workers=2, deadline_seconds=1.0).close())
    assert spawned() == []


def test_workers_end_when_their_parent_is_killed() -> None:
    program = """
import asyncio, time
from nemo_rl.environments.pool import ProcessPool
async def main():
    pool = ProcessPool("operator:call", num_workers=2, deadline_seconds=600.0)
    await asyncio.gather(pool.run(time.sleep, 0.2), pool.run(time.sleep, 0.2))
    print("ready", flush=True)
    await pool.run(eval, "9**9**9**9")
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        processes = psutil.Process(parent.pid).children(recursive=True)
        time.sleep(0.3)
        parent.kill()
    assert len(processes) == 3
    assert psutil.wait_procs(processes, timeout=5.0)[1] == []


def test_a_function_that_cannot_be_imported_is_a_clear_error() -> None:
    async def main() -> None:
        pool = ProcessPool[object]("nemo_rl.no_such_module:judge", num_workers=1, deadline_seconds=1.0)
        try:
            with pytest.raises(WorkerError, match=r"could not start: ModuleNotFoundError: .*no_such_module"):
                await pool.run()
        finally:
            await pool.close()

    asyncio.run(main())


def test_one_pool_serves_several_event_loops() -> None:
    pool = ProcessPool[object](CALL, num_workers=1, deadline_seconds=30.0)
    assert [asyncio.run(pool.run(pow, n, 2)) for n in (2, 3)] == [4, 9]
    asyncio.run(pool.close())
