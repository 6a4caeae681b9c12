"""Train with GRPO on math problems: `uv run examples/run_grpo_math.py [--config FILE] [--dry-run] [KEY=VALUE ...]`."""

import sys
from pathlib import Path

from nemo_rl.cli import main

CONFIG = Path(__file__).parent / "configs" / "grpo_arithmetic_smollm2.yaml"

if __name__ == "__main__":
    sys.exit(main(["grpo", "--config", str(CONFIG), *sys.argv[1:]]))
