"""The command line: a configuration is checked before anything heavy is imported."""

import argparse
import sys
from collections.abc import Sequence

from nemo_rl import __version__
from nemo_rl.errors import NemoRLError

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (a run failed), 2 (correctable input) or 130 (interrupted).

    Args:
        argv: the arguments after the program's name; None takes those of the process.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if unknown := [text for text in rest if text.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}")
    try:
        if arguments.command == "explain":
            _explain(arguments.key)
        else:
            return _grpo(arguments.config, [*arguments.overrides, *rest], dry_run=arguments.dry_run)
    except NemoRLError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nemo-rl", description="Post-training of language models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    grpo = commands.add_parser("grpo", help="train with group relative policy optimisation")
    grpo.add_argument("--config", metavar="FILE", help="YAML file or packaged recipe (default: the CPU recipe)")
    grpo.add_argument("--dry-run", action="store_true", help="show configuration, batch and memory plan, run nothing")
    grpo.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings on top, e.g. grpo.seed=7, ~grpo.seed")

    explain = commands.add_parser("explain", help="type, default and documentation of a setting or section")
    explain.add_argument("key", nargs="?", default="", metavar="KEY", help="e.g. policy.generation.temperature")
    return parser


def _grpo(config_file: str | None, overrides: Sequence[str], *, dry_run: bool) -> int:
    from nemo_rl.config.load import dump_config, load_config
    from nemo_rl.config.schema.algorithms import GRPOConfig

    loaded = load_config(config_file, overrides, GRPOConfig)
    if dry_run:
        from nemo_rl.config.plan import render_plan

        sys.stdout.write(f"{dump_config(loaded.config)}\n{render_plan(loaded.config)}\n")
        return 0
    from nemo_rl.algorithms.launch import launch_grpo

    return _INTERRUPTED if launch_grpo(loaded).interrupted else 0


def _explain(key: str) -> None:
    from nemo_rl.config.explain import explain
    from nemo_rl.config.schema.algorithms import GRPOConfig

    sys.stdout.write(f"{explain(key, GRPOConfig)}\n")


if __name__ == "__main__":
    sys.exit(main())
