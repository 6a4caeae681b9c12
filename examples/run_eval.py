"""Measure a model on a benchmark: `uv run examples/run_eval.py [--config FILE] [--dry-run] [KEY=VALUE ...]`."""

import sys
from pathlib import Path

from nemo_rl.cli import main

CONFIG = Path(__file__).parent / "configs" / "evals" / "eval.yaml"

if __name__ == "__main__":
    sys.exit(main(["eval", "--config", str(CONFIG), *sys.argv[1:]]))
