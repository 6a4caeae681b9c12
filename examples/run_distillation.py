"""Distil a teacher into a student: `uv run examples/run_distillation.py [--config FILE] [--dry-run] [KEY=VALUE]`."""

import sys

from nemo_rl.cli import main

if __name__ == "__main__":
    sys.exit(main(["distillation", *sys.argv[1:]]))
