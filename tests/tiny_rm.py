"""Reward models that take a second to train: answers with more vowels are better."""

import json
import random
from pathlib import Path

from nemo_rl.algorithms.launch_examples import launch_rm
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.reward_model import RMConfig
from tiny_run import records  # pyright: ignore[reportImplicitRelativeImport]

VOWELS, OTHERS = "aeiou", "bcdfghklmnprst"


def write_pairs(file: Path, *, seed: int, count: int) -> Path:
    """Pairs of which the answer with more vowels is the better one."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        good = "".join(draw.choices(VOWELS, k=3)) + draw.choice(OTHERS)
        bad = "".join(draw.choices(OTHERS, k=3)) + draw.choice(VOWELS)
        lines.append(json.dumps({"prompt": f"{draw.randrange(10)} + 1?", "chosen": good, "rejected": bad}))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
    return file


def train_rm(model: Path, folder: Path, steps: int, *more: str) -> list[dict[str, float | None]]:
    data = write_pairs(folder.with_name("train.jsonl"), seed=0, count=64)
    held_out = write_pairs(folder.with_name("held_out.jsonl"), seed=1, count=40)
    settings = [
        f"policy.model_name={model}",
        f"checkpointing.checkpoint_dir={folder}",
        f"rm.max_num_steps={steps}",
        f"data.train={{name: local, path: '{data}'}}",
        f"data.validation={{name: local, path: '{held_out}'}}",
        "policy.precision=float32",
        "policy.num_threads=1",
        "policy.train_global_batch_size=16",
        "policy.optimizer={name: torch.optim.AdamW, kwargs: {lr: 0.02, weight_decay: 0.0}}",
        "policy.scheduler=[]",
        "logger.tensorboard_enabled=false",
        *more,
    ]
    assert launch_rm(load_config(None, settings, RMConfig)).step == steps
    return records(folder)
