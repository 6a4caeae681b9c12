"""Train with PPO on math problems: `uv run examples/run_ppo.py [--config FILE] [--dry-run] [KEY=VALUE ...]`."""

import sys

from nemo_rl.cli import main

if __name__ == "__main__":
    sys.exit(main(["ppo", *sys.argv[1:]]))
