"""How long the command line takes to answer: `uv run benchmarks/cli_startup.py [--repeats 7] [--out FILE]`.

Each command runs in a fresh interpreter, the commands take turns, and the median counts. The first round fills the
bytecode cache and is shown apart. `python -c pass` is the floor that no program gets below; the target is one second
of wall time for `--help` and for a configuration error. Process CPU time is shown beside it, because wall time on a
busy machine measures the neighbours.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGET_SECONDS = 1.0
CLI = ["-m", "nemo_rl.cli"]
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import nemo_rl": ["-c", "import nemo_rl"],
    "--help": [*CLI, "--help"],
    "unknown key in the file": [*CLI, "grpo", "--config", "FILE"],
    "unknown key in an override": [*CLI, "grpo", "grpo.sed=1"],
    "explain": [*CLI, "explain", "policy.generation.temperature"],
    "--dry-run": [*CLI, "grpo", "--dry-run"],
}


def measure(arguments: list[str]) -> tuple[float, float]:
    """Run one command in a fresh interpreter; its wall and CPU seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure all commands in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()

    bad = Path(tempfile.mkdtemp()) / "bad.yaml"
    bad.write_text("defaults: grpo_arithmetic_smollm2\ngrpo: {sed: 1}\n")
    commands = {name: [str(bad) if part == "FILE" else part for part in command] for name, command in COMMANDS.items()}
    first = {name: measure(command) for name, command in commands.items()}
    rounds = [{name: measure(command) for name, command in commands.items()} for _ in range(options.repeats)]

    figures = {}
    print(f"{'command':<28}{'wall s':>8}{'CPU s':>8}{'first s':>9}  target {TARGET_SECONDS:.0f} s")
    for name in commands:
        wall, cpu = (statistics.median(one[name][side] for one in rounds) for side in (0, 1))
        figures[name] = {"wall": wall, "cpu": cpu, "first_wall": first[name][0]}
        print(
            f"{name:<28}{wall:>8.2f}{cpu:>8.2f}{first[name][0]:>9.2f}  {'met' if wall < TARGET_SECONDS else 'missed'}"
        )
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
