"""GRPO runs that take a second or two: a random Llama with a real tokenizer, a reward function, a handful of steps."""

import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nemo_rl.algorithms.launch import launch_grpo
from nemo_rl.algorithms.outcome import Outcome
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.training.pytorch.backend import PyTorchBackend
from tiny_models import embedded_folder  # pyright: ignore[reportImplicitRelativeImport]

VOWELS = """
def reward(completion: str) -> float:
    return sum(letter in "aeiou" for letter in completion) / max(1, len(completion))
"""


def make_tiny_llama(folder: Path, *, hidden_size: int = 16) -> Path:
    """Write a random Llama that answers gibberish with the tokenizer of SmolLM2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=49152,
                hidden_size=hidden_size,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                eos_token_id=2,
                pad_token_id=2,
                tie_word_embeddings=True,
            )
        )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_folder()).save_pretrained(folder)
    return folder


def make_tiny_reward_model(folder: Path) -> Path:
    """Write a classifier with one label and the trunk of `make_tiny_llama`, whose head is random too."""
    make_tiny_llama(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        torch.nn.init.normal_(model.get_parameter("score.weight"))
    model.save_pretrained(folder)
    return folder


def reward_file(folder: Path, code: str = VOWELS) -> str:
    """Write a module with a function `reward` and return its import path."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "reward.py"
    file.write_text(code)
    return f"{file}:reward"


def overrides(model: Path, reward: str, folder: Path, *more: str) -> list[str]:
    """Three steps of 3 prompts x 4 answers of at most 6 tokens in one thread, saved at the end; `more` goes on top."""
    return [
        f"policy.model_name={model}",
        f"checkpointing.checkpoint_dir={folder}",
        "grpo.max_num_steps=3",
        "grpo.num_prompts_per_step=3",
        "grpo.num_generations_per_prompt=4",
        "grpo.report_base_model=false",
        "grpo.adv_estimator.normalize_rewards=true",
        "policy.generation.max_new_tokens=6",
        "policy.precision=float32",
        "policy.num_threads=1",
        "policy.optimizer={name: torch.optim.AdamW, kwargs: {lr: 0.01, weight_decay: 0.0}}",
        "policy.scheduler=[]",
        "~env.math",
        f"+env.function={{type: function, path: '{reward}'}}",
        "data.train={name: arithmetic, num_samples: 50, environment: function}",
        "data.validation=null",
        "data.test=null",
        "checkpointing.export_hf=false",
        "logger.tensorboard_enabled=false",
        "logger.print_sample_period=0",
        *more,
    ]


def launch(settings: list[str]) -> Outcome:
    """Run in this process."""
    return launch_grpo(load_config(None, settings, GRPOConfig))


def in_process(
    settings: list[str], *, killed_in_save: int | None = None, stuck_in_save: int | None = None
) -> ForkServerProcess:
    """Start the command line in a process of its own, which if asked to dies, or hangs, in the middle of its n-th save.

    Its output goes to `<run folder>.log`; a save that hangs touches `<run folder>.stuck`.
    """
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nemo_rl.algorithms.launch"])
    process = context.Process(target=_command_line, args=(settings, killed_in_save, stuck_in_save))
    process.start()
    return process


def _command_line(settings: list[str], killed_in_save: int | None, stuck_in_save: int | None) -> None:
    from nemo_rl.cli import main

    folder = next(text for text in settings if text.startswith("checkpointing.checkpoint_dir=")).partition("=")[2]
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    save = PyTorchBackend.save
    saves: list[Path] = []

    def save_and_fail(backend: PyTorchBackend, to: Path, *, in_background: bool = False) -> None:
        save(backend, to, in_background=in_background)
        saves.append(to)
        if len(saves) == killed_in_save:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(saves) == stuck_in_save:
            Path(f"{folder}.stuck").touch()
            time.sleep(600)

    PyTorchBackend.save = save_and_fail
    sys.exit(main(["grpo", *settings]))


def records(folder: Path) -> list[dict[str, float | None]]:
    """The lines of `metrics.jsonl` without what the clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("timing/")} for line in lines]


def rollouts(folder: Path) -> dict[str, str]:
    """The rollout files by name."""
    return {path.name: path.read_text() for path in sorted((folder / "rollouts").iterdir())}


def saved_tensors(folder: Path, step: int, *, part: str = "policy") -> dict[str, Tensor]:
    """Every tensor of a trained part of a checkpoint, weights and optimizer, read without the code under test."""
    tensors: dict[str, Any] = {}
    for kind in ("weights", "optimizer"):
        place = folder / f"step_{step}" / part / kind
        stored = dcp.FileSystemReader(place).read_metadata().state_dict_metadata
        held: dict[str, Any] = {
            name: torch.empty(item.size, dtype=item.properties.dtype)
            for name, item in stored.items()
            if isinstance(item, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(held, checkpoint_id=place, no_dist=True)
        tensors |= {f"{kind}/{name}": tensor for name, tensor in held.items()}
    return tensors


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Metrics, rollouts, weights and optimizer are the same, bit for bit."""
    assert records(one) == records(other)
    assert rollouts(one) == rollouts(other)
    left, right = saved_tensors(one, step), saved_tensors(other, step)
    assert left.keys() == right.keys() and len(left) > 20
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
