"""Fine-tune on given answers: `uv run examples/run_sft.py [--config FILE] [--dry-run] [KEY=VALUE ...]`."""

import sys

from nemo_rl.cli import main

if __name__ == "__main__":
    sys.exit(main(["sft", *sys.argv[1:]]))
