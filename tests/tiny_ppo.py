"""PPO runs that take a second or two, on a model of single characters."""

from pathlib import Path

from nemo_rl.algorithms.launch_ppo import launch_ppo
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.ppo import PPOConfig
from tiny_run import overrides, records, reward_file  # pyright: ignore[reportImplicitRelativeImport]


def ppo_run(model: Path, folder: Path, *settings: str) -> list[dict[str, float | None]]:
    """Train on 24 prompts with one answer of at most 4 characters each a step, and return the records."""
    common = [text.replace("grpo.", "ppo.") for text in overrides(model, reward_file(folder), folder / "run")]
    more = (
        "ppo.max_num_steps=16",
        "ppo.num_prompts_per_step=24",
        "ppo.num_generations_per_prompt=1",
        "policy.train_global_batch_size=24",
        "policy.generation.max_new_tokens=4",
        "policy.optimizer.kwargs.lr=0.05",
        "checkpointing.enabled=false",
        *settings,
    )
    launch_ppo(load_config(None, [*(text for text in common if "normalize" not in text), *more], PPOConfig))
    return records(folder / "run")
