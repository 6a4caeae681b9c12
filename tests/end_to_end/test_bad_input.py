"""What a user gets wrong is one sentence on standard error and exit code 2, before anything is trained."""

import re
from pathlib import Path

import pytest
import torch

from nemo_rl.cli import main
from tiny_run import overrides, reward_file  # pyright: ignore[reportImplicitRelativeImport]


def complaint(settings: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error."""
    assert main(["grpo", *settings]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert "step 1" not in captured.out
    return captured.err


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["grpo.num_promts_per_step=2"], "unknown key grpo.num_promts_per_step .* grpo.num_prompts_per_step"),
        (["grpo.seed=often"], "grpo.seed = 'often' .* must be a valid integer"),
        (["policy.train_global_batch_size=6"], "12 rollouts, which policy.train_global_batch_size = 6 does not divide"),
        (["grpo.num_generations_per_prompt=1"], "leaves no other answer to compare with"),
        (["data.max_input_seq_length=20"], r"prompt of task \d+ has \d+ tokens and data.max_input_seq_length is 20"),
        (["policy.model_name=./no/such/model"], "model folder no/such/model does not exist"),
        (["env.function.path=no_such_file.py:reward"], "'no_such_file.py:reward' cannot be imported"),
        (["env.function.path=math:reward"], "math defines no function 'reward'"),
        (["data.train={{name: local, path: none.jsonl, environment: function}}"], "none.jsonl does not exist"),
        (["checkpointing.checkpoint_dir={file}/run"], "cannot write to the run folder .*/file/run .*checkpoint_dir"),
        (["logger.log_dir={file}/logs"], "cannot write the logs in .*/file/logs .*logger.log_dir"),
        (["data.train={{name: local, path: '{empty}', environment: function}}"], "empty.jsonl is empty"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    settings: list[str], expected: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"file": tmp_path / "file", "empty": tmp_path / "empty.jsonl"}
    for file in files.values():
        file.touch()
    filled = [text.format_map(files) for text in settings]
    message = complaint(overrides(tiny_llama, reward_file(tmp_path), tmp_path / "run", *filled), capsys)
    assert re.search(expected, message), message


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("setting", ["policy.device=cuda", "cluster.gpus_per_node=1"])
def test_a_gpu_that_is_not_there_is_said_before_anything_is_loaded(
    setting: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing_model = f"policy.model_name={tmp_path / 'none'}"
    settings = overrides(tiny_llama, reward_file(tmp_path), tmp_path / "run", setting, missing_model)
    assert "torch finds no GPU here" in complaint(settings, capsys)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["policy.generation.backend=vllm"], "set it to hf"),
        (
            ["policy.generation.colocated={enabled: false, resources: {gpus_per_node: 1}}"],
            "set policy.generation.colocated.enabled=true",
        ),
        (["cluster.gpus_per_node=64"], "torch finds"),
        (["cluster.num_nodes=2"], "set cluster.executor=ray"),
        (
            ["cluster.ranks_per_node=3", "policy.dtensor_cfg.tensor_parallel_size=2"],
            "cluster.ranks_per_node do not fit",
        ),
        (["policy.dtensor_cfg.sequence_parallel=true"], "raise tensor_parallel_size or set it to false"),
        (["~policy.optimizer.kwargs.lr"], "policy.optimizer.kwargs has no lr"),
        (["+policy.optimizer.kwargs.weight_decya=0.1"], "AdamW refuses the arguments"),
        (["policy.optimizer.name=torch.optim.Adamw"], "'torch.optim.Adamw'"),
        (["policy.scheduler=[{name: torch.optim.lr_scheduler.ReduceLROnPlateau}]"], "decides by a metric"),
    ],
)
def test_what_no_backend_can_run_is_refused_before_anything_is_loaded(
    settings: list[str], expected: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing_model = f"policy.model_name={tmp_path / 'none'}"
    asked = overrides(tiny_llama, reward_file(tmp_path), tmp_path / "run", *settings, missing_model)
    assert expected in complaint(asked, capsys)
    assert not (tmp_path / "run").exists()
