"""Train on preferences: `uv run examples/run_dpo.py [--config FILE] [--dry-run] [KEY=VALUE ...]`."""

import sys

from nemo_rl.cli import main

if __name__ == "__main__":
    sys.exit(main(["dpo", *sys.argv[1:]]))
