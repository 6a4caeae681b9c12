"""Run a function in several real processes that form one gloo group, each with data of its own."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["ranks", "tiny_models", "nemo_rl.training.pytorch.backend", "torch.distributed.fsdp"])


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(rank, *args)`, defined at the top of a module, in every rank; return the results in rank order.

    The first rank that fails in time fails the test with its traceback, and none is left behind. A rank has one thread;
    what it returns must pickle, so tensors are best returned as they are and compared here.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder, 'meeting')}"
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            _CONTEXT.Process(target=_rank, args=(sender, meeting, function, rank, world_size, args))
            for rank, (_, sender) in enumerate(pipes)
        ]
        try:
            for process, (_, sender) in zip(processes, pipes, strict=True):
                process.start()
                sender.close()
            return _collect([receiver for receiver, _ in pipes], timeout)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _collect(receivers: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while waiting := [receiver for rank, receiver in enumerate(receivers) if rank not in results]:
        ready = wait(waiting, timeout)
        if not ready:
            raise TimeoutError(
                f"ranks {sorted(set(range(len(receivers))) - set(results))} said nothing for {timeout} s"
            )
        for receiver in ready:
            rank = receivers.index(receiver)
            try:
                failure, results[rank] = receiver.recv()
            except EOFError:
                failure = "it died"
            if failure is not None:
                raise AssertionError(f"rank {rank} failed:\n{failure}")
    return [results[rank] for rank in range(len(receivers))]


def _rank(
    sender: Connection, meeting: str, function: Callable[..., Any], rank: int, world_size: int, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
        result = function(rank, *args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        sender.send((traceback.format_exc(), None))
    else:
        sender.send((None, result))
    sender.close()
