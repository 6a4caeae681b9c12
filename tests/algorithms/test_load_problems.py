"""The data of a run, made ready for the sampler."""

from pathlib import Path

from transformers import AutoTokenizer

from nemo_rl.algorithms.problems import load_problems
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.algorithms import GRPOConfig
from tiny_run import overrides, reward_file  # pyright: ignore[reportImplicitRelativeImport]


def test_problems_beyond_the_size_of_a_validation_are_not_looked_at(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(f'{{"problem": "{"1 + " * length}1", "answer": 0}}\n' for length in (2, 3, 9999)))
    keys = "prompt_key: problem, answer_key: answer, environment: function"
    settings = (f"data.validation={{name: local, path: '{file}', {keys}}}", "grpo.max_val_samples=2")
    config = load_config(None, overrides(tiny_llama, reward_file(tmp_path), tmp_path / "run", *settings), GRPOConfig)
    problems = load_problems(config.config, AutoTokenizer.from_pretrained(tiny_llama))
    assert [task.index for task in problems.validation] == [0, 1]
