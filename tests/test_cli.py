"""The command line as a user runs it: exit codes, one-line errors, nothing heavy before the configuration is valid."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nemo_rl.cli import main
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.algorithms import GRPOConfig

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "ray", "transformers", "datasets", "vllm")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["explain", "policy.generation.temperature"], 0),
        (["explain", "dpo.early_stopping.patience"], 0),
        (["grpo", "--dry-run", "grpo.seed=${grpo.max_num_steps}"], 0),
        (["grpo", "grpo.sed=1"], 2),
    ],
)
def test_a_command_answers_without_importing_anything_heavy(arguments: list[str], exit_code: int) -> None:
    script = (
        "import sys; from nemo_rl.cli import main; code = main(sys.argv[1:]);"
        f"print('LOADED', [name for name in {HEAVY} if name in sys.modules]); sys.exit(code)"
    )
    done = run("-c", script, *arguments)
    assert done.returncode == exit_code, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_every_config_module_imports_without_torch_or_ray() -> None:
    script = (
        "import sys, pkgutil, importlib, nemo_rl.config as top\n"
        "for module in pkgutil.walk_packages(top.__path__, 'nemo_rl.config.'): importlib.import_module(module.name)\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert run("-c", script).stdout.strip() == "[]"


def test_an_error_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grpo", "policy.generation.temprature=1"]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        "error: unknown key policy.generation.temprature (command line): did you mean policy.generation.temperature?\n"
    )
    assert captured.out == ""


def test_a_dry_run_prints_the_resolved_configuration_and_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "examples" / "configs" / "grpo_math_1B.yaml")
    assert main(["grpo", "grpo.seed=5", "--dry-run", "--config", config, "grpo.val_period=3"]) == 0
    resolved, plan = capsys.readouterr().out.split("\nbatch plan")
    expected = load_config(config, ["grpo.seed=5", "grpo.val_period=3"], GRPOConfig).config
    assert GRPOConfig.model_validate(yaml.safe_load(resolved)) == expected
    assert "1,543,714,304 parameters" in plan


@pytest.mark.parametrize("script", sorted(ROOT.glob("examples/run_*.py")), ids=lambda script: script.stem)
def test_every_example_script_describes_its_run(script: Path) -> None:
    done = run(str(script), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "memory estimate" in done.stdout


def test_the_example_script_is_the_command_line() -> None:
    done = run("examples/run_grpo_math.py", "--dry-run", "grpo.seed=11")
    assert done.returncode == 0, done.stderr
    assert "  seed: 11\n" in done.stdout
    assert "embedded:SmolLM2-135M-Instruct: 134,515,008 parameters" in done.stdout


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["grpo", "--dryrun"])
    assert stopped.value.code == 2
    assert "--dryrun" in capsys.readouterr().err
