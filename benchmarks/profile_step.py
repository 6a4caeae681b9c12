"""Show where a training step spends a GPU's time: in which kernels, and waiting for the host.

The steps are those of `mfu.py` (by hand, ours, compiled) and of one case of `prefix_sharing.py` (plain, ours). Of each:

- three runs without a profiler: milliseconds until the device was done, and until the host had launched everything
  (a host that returns only then is what the device waits for);
- one run under `torch.profiler`: how long kernels ran, their number, the share of each group of kernels, the longest
  ones, and the longest gaps between two kernels. The profiler slows the host down, so gaps are longer than they are.

    uv run --group bench benchmarks/profile_step.py [--sides mfu prefix] [--out FILE]
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mfu
import prefix_sharing
import torch
from bare_loop import equal_sequences
from measure import machine, parse_arguments, print_machine
from model_folder import write_model
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers.utils.logging import disable_progress_bar

from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.models.load import load_causal_lm
from nemo_rl.training.step import Scorer

GROUPS: Mapping[str, tuple[str, ...]] = {
    "head": ("_statistics_kernel", "_gradient_kernel", "softmax", "nll"),
    "compiled": ("triton_",),
    "attention": ("flash", "fmha", "attention"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk"),
    "optimizer": ("multi_tensor_apply", "adam"),
    "gather": ("index", "gather", "scatter"),
    "reductions": ("reduce", "cumsum", "scan", "sort"),
    "copies": ("memcpy", "memset", "copy", "cat"),
    "pointwise": ("elementwise",),
}
"""What the name of a kernel holds, in small letters; the first that fits counts."""

TOP = 25


@dataclass(frozen=True, slots=True)
class Kernel:
    """One run of a kernel, from and to in microseconds."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Report:
    """One side.

    Attributes:
        step: milliseconds until the device was done, without the profiler.
        host: of these until the host had launched everything.
        busy: milliseconds in which some kernel ran, under the profiler.
        kernels: how many ran.
        groups: milliseconds of each group of kernels.
        top: milliseconds and number of the longest kernels, all runs of a name together.
        gaps: the longest times without a kernel, in milliseconds, and what ran before and after.
    """

    step: float
    host: float
    busy: float
    kernels: int
    groups: Mapping[str, float]
    top: Sequence[tuple[str, float, int]]
    gaps: Sequence[tuple[float, str, str]]

    def print(self, name: str) -> None:
        """Print it under a heading."""
        print(f"\n== {name}: step {self.step:.1f} ms, host {self.host:.1f} ms, kernels busy {self.busy:.1f} ms")
        print(f"{self.kernels} kernels; " + ", ".join(f"{group} {ms:.1f}" for group, ms in self.groups.items()))
        for kernel, ms, count in self.top:
            print(f"  {ms:>8.2f} ms {count:>6} x {kernel[:110]}")
        for ms, before, after in self.gaps:
            print(f"  gap of {ms:.2f} ms between {before[:50]} and {after[:50]}", flush=True)


def group_of(name: str) -> str:
    """The group that a kernel belongs to."""
    lowered = name.lower()
    return next((group for group, parts in GROUPS.items() if any(part in lowered for part in parts)), "other")


def busy_and_gaps(kernels: Sequence[Kernel]) -> tuple[float, list[tuple[float, str, str]]]:
    """Microseconds in which at least one kernel ran, and every time between two without one."""
    busy, gaps = 0.0, list[tuple[float, str, str]]()
    last: Kernel | None = None
    for kernel in sorted(kernels, key=lambda kernel: kernel.begin):
        if last is None or kernel.begin >= last.end:
            if last is not None:
                gaps.append((kernel.begin - last.end, last.name, kernel.name))
            busy += kernel.end - kernel.begin
            last = kernel
        elif kernel.end > last.end:
            busy += kernel.end - last.end
            last = kernel
    return busy, gaps


def wait(device: str) -> None:
    """Until the device has nothing left to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def watch(run: Callable[[], object], device: str) -> Report:
    """Warm up, time, then profile one step."""
    for _ in range(2):
        run()
    times: list[tuple[float, float]] = []
    for _ in range(3):
        wait(device)
        begin = time.perf_counter()
        run()
        launched = time.perf_counter()
        wait(device)
        times.append((time.perf_counter() - begin, launched - begin))
    activities = [ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        run()
        wait(device)
    wanted = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    kernels = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == wanted and not event.is_user_annotation
    ]
    busy, gaps = busy_and_gaps(kernels)
    by_group, by_name, counts = Counter[str](), Counter[str](), Counter(kernel.name for kernel in kernels)
    for kernel in kernels:
        by_group[group_of(kernel.name)] += kernel.end - kernel.begin  # pyright: ignore[reportArgumentType]
        by_name[kernel.name] += kernel.end - kernel.begin  # pyright: ignore[reportArgumentType]
    step, host = (1e3 * statistics.median(part) for part in zip(*times, strict=True))
    return Report(
        step=step,
        host=host,
        busy=busy / 1e3,
        kernels=len(kernels),
        groups={name: us / 1e3 for name, us in by_group.most_common()},
        top=[(name, us / 1e3, counts[name]) for name, us in by_name.most_common(TOP)],
        gaps=[(us / 1e3, before, after) for us, before, after in sorted(gaps, reverse=True)[:8]],
    )


def watch_all(sides: Mapping[str, Callable[[], object]], label: str, device: str) -> dict[str, Report]:
    """Watch and print one side after the other."""
    found: dict[str, Report] = {}
    for name, run in sides.items():
        found[f"{label} {name}"] = report = watch(run, device)
        report.print(f"{label} {name}")
    return found


def watch_mfu(options: argparse.Namespace) -> dict[str, Report]:
    """The sides of `mfu.py`."""
    work = mfu.Work(length=1025, per_micro_batch=max(1, options.tokens // 1024), micro_batches=2)
    with tempfile.TemporaryDirectory() as name:
        config = mfu.shape(options.model_scale)
        write_model(Path(name), config, torch.bfloat16, options.device)
        backend = mfu.make_backend(Path(name), work, options.device)
    batch = equal_sequences(work.per_micro_batch * work.micro_batches, work.length, config.vocab_size)
    return watch_all(mfu.make_sides(backend, batch, work, options), "mfu", options.device)


def watch_prefix(options: argparse.Namespace) -> dict[str, Report]:
    """The sides of one case of `prefix_sharing.py`."""
    shape = prefix_sharing.Shape(*(int(part) for part in options.shape.split("/")), prompts=2)
    with tempfile.TemporaryDirectory() as name:
        config = prefix_sharing.random_model() if options.model_scale == 1 else mfu.shape(options.model_scale)
        write_model(Path(name), config, torch.bfloat16, options.device)
        plain, _ = load_causal_lm(name, dtype=torch.bfloat16, device=options.device, attn_implementation="sdpa")
        ours, _ = load_causal_lm(name, dtype=torch.bfloat16, device=options.device)
    scorer = Scorer(CausalLM.wrap(ours.eval()), chunk_size=2**31 // (4 * config.vocab_size))
    batch = prefix_sharing.make_batch(shape, config.vocab_size, varied=False)
    sides = prefix_sharing.make_sides(shape, batch, plain, scorer, options.max_tokens)
    return watch_all(sides, f"prefix {shape}", options.device)


def main() -> None:
    """Watch all sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--sides", nargs="+", default=["mfu", "prefix"], choices=["mfu", "prefix"])
    parser.add_argument("--compile", action="store_true", help="also with compiled layers")
    parser.add_argument("--model-scale", type=float, default=1.0, help="1 is the whole model (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch of `mfu` (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=16384, help="the same of `prefix` (default: %(default)s)")
    parser.add_argument("--shape", default="256/1024/8", help="prompt/response/group (default: %(default)s)")
    options = parse_arguments(parser)
    disable_progress_bar()
    print_machine()
    found: dict[str, Report] = {}
    for side in options.sides:
        found |= (watch_mfu if side == "mfu" else watch_prefix)(options)
        gc.collect()
        torch.cuda.empty_cache()
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        written = {"machine": machine(), "sides": {name: asdict(report) for name, report in found.items()}}
        options.out.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
