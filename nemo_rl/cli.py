"""The command line: a configuration is checked before anything heavy is imported."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_rl import __version__
from nemo_rl.errors import NemoRLError

_TRAINING = {
    "grpo": "group relative policy optimisation",
    "ppo": "proximal policy optimisation, with a critic",
    "sft": "supervised fine-tuning",
    "dpo": "preferences: DPO, IPO, SimPO, ORPO, KTO",
    "rm": "pairs: a reward model",
    "distillation": "the next-token distributions of teachers, on answers of the student's own",
    "off_policy_distillation": "the next-token distributions of a teacher, on given answers",
}
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (a run failed), 2 (correctable input) or 130 (interrupted).

    Ctrl-C that the command does not take as a wish to save ends the process at once, with 130 too.

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
        elif arguments.command == "migrate":
            _migrate(arguments.file)
        elif arguments.command == "convert":
            _convert(arguments)
        elif arguments.command == "eval":
            return _eval(arguments, [*arguments.overrides, *rest])
        else:
            command = [*_program(), *(sys.argv[1:] if argv is None else argv)]
            overrides = [*arguments.overrides, *rest]
            return _train(arguments.command, arguments.config, overrides, command, dry_run=arguments.dry_run)
    except NemoRLError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        os._exit(_INTERRUPTED)  # a worker's thread may be in the middle of a call, which Python would wait for
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nemo-rl", description="Post-training of language models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    for name, what in _TRAINING.items():
        train = commands.add_parser(name, help=f"train with {what}")
        train.add_argument("--config", metavar="FILE", help="YAML file or packaged recipe (default: the CPU recipe)")
        train.add_argument("--dry-run", action="store_true", help="show configuration and plan, run nothing")
        example = f"settings on top, e.g. {name}.seed=7, ~{name}.seed"
        train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=example)

    evaluate = commands.add_parser("eval", help="measure a model on a benchmark, or compare two such measurements")
    evaluate.add_argument("--config", metavar="FILE", help="YAML file or packaged recipe (default: the CPU recipe)")
    evaluate.add_argument("--dry-run", action="store_true", help="show configuration and plan, run nothing")
    evaluate.add_argument("--compare", nargs=2, metavar="FOLDER", help="compare the results in two folders")
    evaluate.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings on top, e.g. eval.seed=7")

    convert = commands.add_parser("convert", help="write the weights of a checkpoint as a Hugging Face model folder")
    convert.add_argument("--config", metavar="FILE", help="config.yaml of the run (default: the checkpoint's own)")
    convert.add_argument("--dcp-ckpt-path", metavar="FOLDER", required=True, help=".../step_N/policy/weights or step_N")
    convert.add_argument("--hf-ckpt-path", metavar="FOLDER", required=True, help="where to write; must not be there")
    convert.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="in the files")
    convert.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="of a file (default: 5GB)")

    explain = commands.add_parser("explain", help="type, default and documentation of a setting or section")
    explain.add_argument("key", nargs="?", default="", metavar="KEY", help="e.g. policy.generation.temperature")

    migrate = commands.add_parser("migrate", help="write a NeMo RL configuration in the keys of this version")
    migrate.add_argument("file", metavar="FILE", help="YAML file of NeMo RL v0.3 to v0.5")
    return parser


def _program() -> list[str]:
    """What starts this command line from the current folder, whether or not the shell's path has it."""
    script = Path(sys.executable).with_name("nemo-rl")
    return [str(script)] if script.is_file() else [sys.executable, "-m", "nemo_rl.cli"]


def _train(
    algorithm: str, config_file: str | None, overrides: Sequence[str], command: Sequence[str], *, dry_run: bool
) -> int:
    from nemo_rl.config.load import dump_config, load_config
    from nemo_rl.config.schema.registry import RUNS

    loaded = load_config(config_file, overrides, RUNS[algorithm])
    _tell(loaded.notes)
    if dry_run:
        from nemo_rl.config.plan import render_plan
        from nemo_rl.config.templates import check_prompts

        check_prompts(loaded.config)
        sys.stdout.write(f"{dump_config(loaded.config)}\n{render_plan(loaded.config)}\n")
        return 0
    from nemo_rl.algorithms.launchers import launch

    return _INTERRUPTED if launch(loaded, command).interrupted else 0


def _eval(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    if arguments.compare:
        from nemo_rl.algorithms.samples import compare, render_comparison

        first, second = arguments.compare
        sys.stdout.write(f"{render_comparison(compare(Path(first), Path(second)), first, second)}\n")
        return 0
    from nemo_rl.config.load import dump_config, load_config
    from nemo_rl.config.schema.evaluation import EvalConfig

    loaded = load_config(arguments.config, overrides, EvalConfig)
    _tell(loaded.notes)
    if arguments.dry_run:
        from nemo_rl.config.eval_plan import render_eval_plan
        from nemo_rl.config.templates import check_prompts

        check_prompts(loaded.config)
        sys.stdout.write(f"{dump_config(loaded.config)}\n{render_eval_plan(loaded.config)}\n")
        return 0
    from nemo_rl.algorithms.evaluate import launch_eval

    sys.stdout.write(f"{launch_eval(loaded).block}\n")
    return 0


def _convert(arguments: argparse.Namespace) -> None:
    from nemo_rl.training.pytorch.convert import byte_count, convert_checkpoint

    config = None if arguments.config is None else Path(arguments.config)
    max_bytes, folder = byte_count(arguments.max_shard_size), Path(arguments.hf_ckpt_path)
    kind = convert_checkpoint(Path(arguments.dcp_ckpt_path), folder, config, dtype=arguments.dtype, max_bytes=max_bytes)
    sys.stdout.write(f"{folder} (loads with transformers.{kind})\n")


def _explain(key: str) -> None:
    from nemo_rl.config.explain import explain_any
    from nemo_rl.config.schema.registry import COMMANDS

    sys.stdout.write(f"{explain_any(key, COMMANDS)}\n")


def _migrate(file: str) -> None:
    from nemo_rl.config.migrate import migrate

    text, notes = migrate(file)
    _tell(notes)
    sys.stdout.write(text)


def _tell(notes: Sequence[str]) -> None:
    sys.stderr.write("".join(f"note: {note}\n" for note in notes))


if __name__ == "__main__":
    sys.exit(main())
