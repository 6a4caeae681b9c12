"""The configuration of an evaluation: NeMo RL's names, and what cannot be measured is refused before anything loads."""

from pathlib import Path

import pytest

from nemo_rl.config.eval_plan import render_eval_plan
from nemo_rl.config.load import dump_config, load_config
from nemo_rl.config.migrate import migrate
from nemo_rl.config.schema.evaluation import BENCHMARK_NAMES, EvalConfig
from nemo_rl.errors import ConfigError

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "configs" / "evals" / "eval.yaml"
NEMO = Path(__file__).parent / "nemo" / "eval.yaml"


def load(*overrides: str, path: Path = EXAMPLE) -> EvalConfig:
    return load_config(path, overrides, EvalConfig).config


def error_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(EXAMPLE.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_loads_and_plans(path: Path, tmp_path: Path) -> None:
    config = load(path=path)
    assert (config.generation.backend, config.eval.metric) == ("hf", "pass@k")
    assert f"{config.data.dataset_name}, judged by {config.judge}" in render_eval_plan(config)
    dump = tmp_path / "dump.yaml"
    dump.write_text(dump_config(config))
    assert load(path=dump) == config


def test_a_command_of_nemo_rl_is_understood_word_for_word() -> None:
    config = load(
        "generation.model_name=some/folder",
        "generation.temperature=0.6",
        "generation.top_p=0.95",
        "generation.vllm_cfg.max_model_len=32768",
        "data.dataset_name=math500",
        "eval.num_tests_per_prompt=16",
        "cluster.gpus_per_node=8",
    )
    assert (config.generation.backend, config.generation.vllm_cfg.max_model_len) == ("hf", 32768)
    assert (config.eval.num_tests_per_prompt, config.cluster.gpus_per_node) == (16, 8)
    assert "1 x 8 GPU(s), of which hf uses one" in render_eval_plan(config)


def test_a_file_of_nemo_rl_is_translated() -> None:
    config = load(path=NEMO)
    assert (config.generation.backend, config.generation.top_k, config.eval.save_path) == ("vllm", None, None)
    assert config.tokenizer.name == config.generation.model_name
    text, _ = migrate(NEMO)
    assert "dataset_name: aime2024" in text


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("eval.k_value=3", "eval.k_value = 3 is more than eval.num_tests_per_prompt = 1"),
        ("eval.num_tests_per_prompt=4", "sampling is greedy, so all of eval.num_tests_per_prompt = 4 answers"),
        ("data.dataset_name=aim2024", "did you mean aime2024?"),
        ("data.dataset_name=nonsense", "known are arithmetic, aime2024"),
        ("data.environment=code", "is not in env: use one of math, multiple_choice"),
        ("+data.path=x.jsonl data.dataset_name=arithmetic", "arithmetic problems are generated"),
        (
            "+env.f={type:function,path:'a.py:f'} data.environment=f eval.metric=cons@k",
            "eval.metric = cons@k counts the answers that env.f reads",
        ),
        (
            "+env.r={type:reward_model,model_name:r} data.environment=r",
            "eval.metric = pass@k counts right answers, and env.r is a reward model",
        ),
        ("eval.metric=pass", "must be 'pass@k', 'avg@n' or 'cons@k'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(override: str, says: str) -> None:
    assert says in error_of(*override.split(" "))


def test_a_reward_model_that_may_say_right_or_wrong_is_heard() -> None:
    judge = "+env.r={type:reward_model,model_name:r,reward_min:0,reward_max:1}"
    assert load(judge, "data.environment=r").judge == "r"
    assert load("+env.r={type:reward_model,model_name:r}", "data.environment=r", "eval.metric=avg@n").judge == "r"


def test_avg_at_n_has_no_k() -> None:
    assert load("eval.metric=avg@n", "eval.k_value=5").eval.k_value == 5


@pytest.mark.parametrize("name", BENCHMARK_NAMES)
def test_a_benchmark_knows_its_judge_in_any_case_of_letters(name: str) -> None:
    config = load(f"data.dataset_name={name.upper()}")
    assert config.data.benchmark == name
    letters = name.startswith(("mmlu", "gpqa"))
    assert config.judge == ("multiple_choice" if letters else "math")
    assert config.environments[config.judge].extraction == ("multiple_choice" if letters else "math")


def test_the_plan_tells_sampling_and_memory_of_both_engines() -> None:
    config = load("generation.model_name=embedded:SmolLM2-135M-Instruct")
    assert "134,515,008 parameters" in render_eval_plan(config)
    assert "KV cache" in render_eval_plan(config)
    other = load("generation.model_name=embedded:SmolLM2-135M-Instruct", "generation.backend=vllm")
    assert "60% of each of 1 GPU(s), with CUDA graphs, sequences of up to 2,048 tokens" in render_eval_plan(other)
