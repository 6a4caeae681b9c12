"""Distillation runs that take a second or two: a student and teachers of single characters."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from nemo_rl.algorithms.launchers import launch
from nemo_rl.algorithms.outcome import Outcome
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.distillation import DistillationConfig, OffPolicyDistillationConfig
from tiny_run import overrides, reward_file  # pyright: ignore[reportImplicitRelativeImport]


def make_teacher(student: Path, folder: Path, *, seed: int = 1) -> Path:
    """Write a model like the student whose weights are so large that it has firm opinions."""
    model = LlamaForCausalLM.from_pretrained(student)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(student).save_pretrained(folder)
    return folder


def _taught(algorithm: str, student: Path, teacher: Path, folder: Path, code: str) -> list[str]:
    common = overrides(student, reward_file(folder, code), folder / "run")
    return [
        *(text.replace("grpo.", f"{algorithm}.") for text in common if "normalize" not in text),
        f"teacher.model_name={teacher}",
        "teacher.precision=float32",
        f"{algorithm}.val_at_start=false",
        f"{algorithm}.val_at_end=false",
        "policy.optimizer.kwargs.lr=0.03",
        "policy.train_global_batch_size=16",
        "checkpointing.enabled=false",
    ]


def on_policy_run(student: Path, teacher: Path, folder: Path, *settings: str, code: str) -> Outcome:
    """Sixteen prompts a step, one answer of at most 4 characters each."""
    more = (
        "distillation.max_num_steps=40",
        "distillation.num_prompts_per_step=16",
        "distillation.num_generations_per_prompt=1",
        "policy.generation.max_new_tokens=4",
        *settings,
    )
    run = [*_taught("distillation", student, teacher, folder, code), *more]
    return launch(load_config(None, run, DistillationConfig))


def off_policy_run(student: Path, teacher: Path, folder: Path, *settings: str, code: str) -> Outcome:
    """Sixteen given answers a step."""
    unknown = ("num_prompts", "num_generations", "report_base", "generation.", "env.", "data.test", "data.train")
    kept = [
        text
        for text in _taught("off_policy_distillation", student, teacher, folder, code)
        if not any(part in text for part in unknown)
    ]
    template = folder / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.role }}. {{ message.content }}+{% endfor %}")
    kept.append(f"policy.tokenizer.chat_template={template}")
    more = ("off_policy_distillation.max_num_steps=40", "data.train={name: arithmetic, num_samples: 50}", *settings)
    return launch(load_config(None, [*kept, *more], OffPolicyDistillationConfig))
