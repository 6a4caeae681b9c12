"""Show where the wall time of a run went: `uv run benchmarks/run_table.py results/RUN`.

Reads `seconds_by_phase` of the run's `summary.json`. At least 85% of the time should be the work itself: generation
(answering, in training and in evaluation) and training (with the log-probabilities that it needs).
"""

import argparse
import json
from pathlib import Path

from nemo_rl.observe.summary import phase_table

WORK = frozenset({"generate", "logprobs", "train", "validate", "evaluate"})
TARGET = 0.85


def main() -> None:
    """Print the table of one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, e.g. results/grpo_arithmetic_smollm2")
    summary = json.loads((parser.parse_args().run / "summary.json").read_text())

    rows = phase_table(summary["seconds_by_phase"], summary["seconds_total"])
    print(f"{'phase':<14}{'seconds':>9}{'share':>8}")
    for name, seconds, share in rows:
        print(f"{name:<14}{seconds:>9.1f}{share:>8.1%}")
    work = sum(share for name, _, share in rows if name in WORK)
    print(f"{'all':<14}{summary['seconds_total']:>9.1f}{1:>8.1%}")
    verdict = "ok" if work >= TARGET else "MISSED"
    print(f"generation, evaluation and training: {work:.1%}, target {TARGET:.0%}: {verdict}")


if __name__ == "__main__":
    main()
