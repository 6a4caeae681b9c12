"""What the benchmarks share: how time and memory are taken, two sides compared and the figures printed and written.

CPU seconds of the process and its children count, because wall time on a busy machine measures the neighbours. The
sides take turns (A B A B), so that what else the machine does meets both; the ratio is the median of the ratios of
neighbours, after a warm-up.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch

OMP_VARIABLE = "OMP_NUM_THREADS"


def parse_arguments(parser: argparse.ArgumentParser, repetitions: int = 5) -> argparse.Namespace:
    """Add the options of every benchmark, parse the command line and set the number of threads.

    OpenMP reads its environment when torch is imported, and threads started later follow it and not
    `torch.set_num_threads`; so the process starts over once if the environment says something else.
    """
    parser.add_argument("--threads", type=int, default=1, help="threads of all arithmetic (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, help=f"timed runs of each side (default: {repetitions})")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one repetition: shows that it runs")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    options.repetitions = options.repetitions or (1 if options.quick else repetitions)
    if os.environ.get(OMP_VARIABLE) != str(options.threads):
        environment = os.environ | {OMP_VARIABLE: str(options.threads)}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    torch.set_num_threads(options.threads)
    return options


def machine() -> dict[str, str | int]:
    """Describe the machine and the settings that figures depend on."""
    card = {"card": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return card | {
        "cores": os.cpu_count() or 0,
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def print_machine() -> None:
    """Print the machine on one line."""
    print(", ".join(f"{name} {value}" for name, value in machine().items()), flush=True)


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children, ended or still running."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def peak_memory_of(command: Sequence[str]) -> int:
    """Run a command to its end and return the most resident bytes that it, or a child of it, has held.

    Raises:
        RuntimeError: it failed; the message ends with what it wrote to standard error.
    """
    # a process begins with the peak of the one it was started from; the one in between holds nothing
    between = (
        "import resource, subprocess, sys\n"
        "code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", between, *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)


def seconds_of(run: Callable[[], object], device: str = "cpu") -> float:
    """CPU seconds of a call, or on a GPU the seconds from its first kernel to its last."""
    if device == "cpu":
        start = cpu_seconds()
        run()
        return cpu_seconds() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def take_turns(
    sides: Mapping[str, Callable[[], object]], repetitions: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Run all sides in turns, `repetitions` times; the seconds (`seconds_of`) of each run. Warm up before."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, run in sides.items():
            seconds[name].append(seconds_of(run, device))
    return seconds


def median_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times cheaper ours is: the median over neighbouring runs."""
    return statistics.median(them / us for them, us in zip(theirs, ours, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Both sides of one case.

    Attributes:
        name: of the case.
        theirs: cost of each run of the other side.
        ours: cost of each run of ours, neighbours of theirs.
        target: the least ratio theirs / ours, or None.
        extra: further figures of the case, printed after the verdict.
    """

    name: str
    theirs: Sequence[float]
    ours: Sequence[float]
    target: float | None = None
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """How many times cheaper ours is."""
        return median_ratio(self.theirs, self.ours)

    @property
    def verdict(self) -> str:
        """Whether the target is met."""
        if self.target is None:
            return ""
        return f"target {self.target:g} {'ok' if self.ratio >= self.target else 'MISSED'}"

    def print(self) -> None:
        """Print the case as a row of the table that `print_header` opened."""
        theirs, ours = statistics.median(self.theirs), statistics.median(self.ours)
        extra = "  ".join(f"{name} {value:.3g}" for name, value in self.extra.items())
        row = f"{self.name:<36} {theirs:>10.4g} {ours:>10.4g} {self.ratio:>6.2f}x  {self.verdict:<18} {extra}"
        print(row.rstrip(), flush=True)


def print_header(case: str, theirs: str, ours: str) -> None:
    """Open a table of comparisons."""
    print(f"{case:<36} {theirs:>10} {ours:>10} {'ratio':>7}")


def write_results(path: Path | None, comparisons: Sequence[Comparison]) -> None:
    """Write the machine and every run of every comparison as JSON, if there is a path."""
    if path is None:
        return
    rows = [asdict(comparison) | {"ratio": comparison.ratio} for comparison in comparisons]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "results": rows}, indent=2) + "\n")
