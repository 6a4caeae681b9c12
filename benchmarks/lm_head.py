"""Compare the chunked language-model head with the plain one: peak memory and CPU time, forward and backward.

Plain is `F.linear` + `log_softmax` + `gather` on float32 logits, as training code usually has it, without entropies.
Ours is `token_logprobs` as training calls it, entropies included. Both run on the same tensors and return gradients of
the hidden states and of the weight.

Memory: each side runs once in a fresh process; the figure is the growth of its peak resident set (`ru_maxrss`) over
what the inputs take, gradients included. Time: process CPU time (wall time lies on a busy machine), the two sides
alternating, medians; the ratio is the median of the ratios of neighbours.

    python benchmarks/lm_head.py [--precision float32 bfloat16 autocast] [--repeats 5] [--out lm_head.json]
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_rl.objectives.logprobs import token_logprobs

MEMORY_TARGET = 12.0
TIME_TARGET = 1.35
MEBIBYTE = 2**20

type Shape = tuple[int, int, int]
"""Tokens, vocabulary, hidden size."""


def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Score with whole logits."""
    return torch.log_softmax(F.linear(hidden, weight).float(), -1).gather(-1, target[:, None]).squeeze(-1)


def chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Score with the library's head."""
    return token_logprobs(hidden, weight, target)[0]


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"plain": plain, "chunked": chunked}


def make_inputs(shape: Shape, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states, a weight that gives logits of a trained model's size, and targets."""
    num_tokens, vocabulary, hidden_size = shape
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator, dtype=dtype)
    weight = torch.randn(vocabulary, hidden_size, generator=generator, dtype=dtype).mul_(0.1)
    return (
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.randint(vocabulary, (num_tokens,), generator=generator),
    )


def forward_backward(side: str, inputs: tuple[Tensor, Tensor, Tensor], precision: str) -> None:
    """Run one side once; the gradients are dropped."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        logprobs = SIDES[side](*inputs)
    torch.autograd.grad(logprobs.sum(), inputs[:2])


def peak_bytes(side: str, shape: Shape, precision: str) -> int:
    """Measure the growth of this process's peak memory in one run; call it in a fresh process."""
    torch.set_num_threads(1)
    inputs = make_inputs(shape, precision)
    forward_backward(side, (inputs[0][:8], inputs[1][:64], inputs[2][:8] % 64), precision)  # start-up costs
    before = peak_resident_bytes()
    forward_backward(side, inputs, precision)
    return peak_resident_bytes() - before


def peak_resident_bytes() -> int:
    """Highest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cpu_seconds(shape: Shape, precision: str, repeats: int) -> dict[str, list[float]]:
    """Time both sides in turns, one warm-up each."""
    inputs = make_inputs(shape, precision)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(repeats + 1):
        for side, measured in seconds.items():
            start = time.process_time()
            forward_backward(side, inputs, precision)
            measured.append(time.process_time() - start)
    return {side: measured[1:] for side, measured in seconds.items()}


def peaks(shape: Shape, precision: str) -> dict[str, int]:
    """Measure both sides' memory, each in its own process.

    A process starts with the peak of the one it was made from, so this comes before anything large happens here.
    """
    context = multiprocessing.get_context("spawn")
    measured: dict[str, int] = {}
    for side in SIDES:
        with context.Pool(1) as pool:
            measured[side] = pool.apply(peak_bytes, (side, shape, precision))
    return measured


def summarise(memory: dict[str, int], seconds: dict[str, list[float]]) -> dict[str, float]:
    """Turn the measurements of one precision into a row of the table."""
    ratios = [ours / theirs for ours, theirs in zip(seconds["chunked"], seconds["plain"], strict=True)]
    return {
        "plain_peak_mib": memory["plain"] / MEBIBYTE,
        "chunked_peak_mib": memory["chunked"] / MEBIBYTE,
        "memory_ratio": memory["plain"] / memory["chunked"],
        "plain_cpu_seconds": statistics.median(seconds["plain"]),
        "chunked_cpu_seconds": statistics.median(seconds["chunked"]),
        "time_ratio": statistics.median(ratios),
    }


def main() -> None:
    """Measure, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16", "autocast"])
    parser.add_argument("--shape", nargs=3, type=int, default=[4096, 49152, 576], metavar=("TOKENS", "VOCAB", "HIDDEN"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    num_tokens, vocabulary, hidden_size = arguments.shape
    shape = (num_tokens, vocabulary, hidden_size)
    memory = {precision: peaks(shape, precision) for precision in arguments.precision}

    print(f"{num_tokens} tokens x {vocabulary} vocabulary x {hidden_size} hidden, forward + backward, one thread")
    print(f"{'':10}  {'peak memory, MiB':>26}  {'CPU seconds':>24}")
    print(f"{'precision':10}  {'plain':>8} {'chunked':>8} {'less':>8}  {'plain':>8} {'chunked':>8} {'ratio':>6}")
    torch.set_num_threads(1)
    results: dict[str, dict[str, float]] = {}
    for precision in arguments.precision:
        row = summarise(memory[precision], cpu_seconds(shape, precision, arguments.repeats))
        results[precision] = row
        print(
            f"{precision:10}  {row['plain_peak_mib']:8.0f} {row['chunked_peak_mib']:8.0f} {row['memory_ratio']:7.1f}x"
            f"  {row['plain_cpu_seconds']:8.2f} {row['chunked_cpu_seconds']:8.2f} {row['time_ratio']:5.2f}x",
            flush=True,
        )
    met = all(row["memory_ratio"] >= MEMORY_TARGET and row["time_ratio"] <= TIME_TARGET for row in results.values())
    verdict = "met" if met else "MISSED"
    print(f"targets: at least {MEMORY_TARGET:.0f}x less memory, at most {TIME_TARGET}x the time: {verdict}")
    if arguments.out:
        arguments.out.write_text(json.dumps({"shape": arguments.shape, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
