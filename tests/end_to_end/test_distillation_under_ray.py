"""A distillation run is the same wherever its models live and however often it is interrupted."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from nemo_rl.algorithms.launch_distillation import launch_distillation
from nemo_rl.algorithms.outcome import Outcome
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.distillation import DistillationConfig
from tiny_run import (  # pyright: ignore[reportImplicitRelativeImport]
    assert_same_run,
    make_tiny_llama,
    records,
    reward_file,
    rollouts,
)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models with firm opinions, the second one wider than the first."""
    folders = (tmp_path_factory.mktemp("narrow"), tmp_path_factory.mktemp("wide"))
    for seed, (folder, hidden_size) in enumerate(zip(folders, (16, 24), strict=True)):
        make_tiny_llama(folder, hidden_size=hidden_size)
        firm(folder, seed)
    return folders


def firm(folder: Path, seed: int) -> None:
    """Make the weights large."""
    model = LlamaForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    model.save_pretrained(folder)


def distil(student: Path, folder: Path, *settings: str) -> Outcome:
    """Two steps of 4 prompts of two environments, taught by whoever `settings` name, validated before and after."""
    reward = reward_file(folder.parent)
    environments = ", ".join(f"{name}: {{type: function, path: '{reward}'}}" for name in ("sums", "others"))
    data = ", ".join(
        f"{{data: {{name: arithmetic, num_samples: 8, environment: {name}}}}}" for name in ("sums", "others")
    )
    common = [
        f"policy.model_name={student}",
        f"checkpointing.checkpoint_dir={folder}",
        "distillation.max_num_steps=2",
        "distillation.num_prompts_per_step=4",
        "policy.train_global_batch_size=2",
        "policy.generation.max_new_tokens=5",
        "policy.precision=float32",
        "policy.num_threads=1",
        "policy.optimizer={name: torch.optim.AdamW, kwargs: {lr: 0.01, weight_decay: 0.0}}",
        "policy.scheduler=[]",
        "~env.math",
        f"+env={{{environments}}}",
        f"data.train={{name: mixture, datasets: [{data}]}}",
        "data.validation={name: arithmetic, num_samples: 4, environment: sums}",
        "checkpointing.export_hf=false",
        "logger.tensorboard_enabled=false",
        "logger.print_sample_period=0",
    ]
    return launch_distillation(load_config(None, [*common, *settings], DistillationConfig))


@pytest.fixture(scope="module")
def settings(teachers: tuple[Path, Path]) -> list[str]:
    """Whole vocabularies, and a teacher for each of the two environments."""
    sections = (f"{{model_name: {teacher}, precision: float32, num_threads: 1}}" for teacher in teachers)
    return ["~teacher", "+teachers={{sums: {}, others: {}}}".format(*sections), "distillation.topk_logits_k=null"]


@pytest.fixture(scope="module")
def whole(settings: list[str], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    distil(tiny_llama, folder, *settings)
    return folder


def test_a_run_of_two_teachers_resumes_to_the_same_bits(
    whole: Path, settings: list[str], tiny_llama: Path, tmp_path: Path
) -> None:
    parts = tmp_path / "parts"
    distil(tiny_llama, parts, *settings, "distillation.max_num_steps=1", "distillation.val_at_end=false")
    outcome = distil(tiny_llama, parts, *settings)
    assert outcome.finished and outcome.step == 2
    assert_same_run(whole, parts, 2)


def test_a_run_records_its_answers_and_how_far_they_are_from_the_teachers(whole: Path) -> None:
    before, *_, after = records(whole)
    assert (before["step"], after["step"]) == (0, 2)
    assert {"val/loss", "val/forward_kl", "val/reverse_kl", "val/reward"} <= before.keys() & after.keys()
    written = [json.loads(line) for text in rollouts(whole).values() for line in text.splitlines()]
    assert len(written) == 2 * 4 and {record["advantage"] for record in written} == {None}


def test_under_ray_it_is_the_local_run(whole: Path, settings: list[str], tiny_llama: Path, tmp_path: Path) -> None:
    ray = ("cluster.executor=ray", "cluster.startup_timeout_seconds=250")
    distil(tiny_llama, tmp_path / "ray", *settings, *ray)
    assert_same_run(whole, tmp_path / "ray", 2)
