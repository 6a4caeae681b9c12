"""Train a reward model: `uv run examples/run_rm.py [--config FILE] [--dry-run] [KEY=VALUE ...]`."""

import sys

from nemo_rl.cli import main

if __name__ == "__main__":
    sys.exit(main(["rm", *sys.argv[1:]]))
