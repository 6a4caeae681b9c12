"""Reward models that take a second: the random Llama of `tiny_run`, on pairs in which one word is better."""

import json
from pathlib import Path

from nemo_rl.algorithms.launch_examples import launch_rm
from nemo_rl.algorithms.outcome import Outcome
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.reward_model import RMConfig


def write_pairs(file: Path, numbers: range, *, margin: float = 1.0) -> str:
    """Pairs in which an answer with "yes" is always better than one with "no"; returns the spec of the data."""
    lines = [
        {"prompt": f"{number}?", "chosen": f"yes {number}", "rejected": f"no {number}", "margin": margin}
        for number in numbers
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"{{name: local, path: '{file}', format: {{type: pair, margin_key: margin}}}}"


def rm_settings(model: Path, folder: Path, steps: int, *more: str) -> list[str]:
    """Train on 12 pairs and validate on 8 others, in one thread."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    train = write_pairs(folder.parent / "pairs.jsonl", range(12))
    held_out = write_pairs(folder.parent / "held_out.jsonl", range(20, 28))
    return [
        f"policy.model_name={model}",
        f"checkpointing.checkpoint_dir={folder}",
        f"rm.max_num_steps={steps}",
        f"data.train={train}",
        f"data.validation={held_out}",
        "policy.precision=float32",
        "policy.num_threads=1",
        "policy.train_global_batch_size=4",
        "policy.optimizer={name: torch.optim.AdamW, kwargs: {lr: 0.01, weight_decay: 0.0}}",
        "policy.scheduler=[]",
        "checkpointing.export_hf=false",
        "logger.tensorboard_enabled=false",
        *more,
    ]


def train_reward_model(model: Path, folder: Path, steps: int, *more: str) -> Outcome:
    """Run in this process."""
    return launch_rm(load_config(None, rm_settings(model, folder, steps, *more), RMConfig))
