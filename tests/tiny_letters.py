"""A model of single characters, so small that a run of dozens of steps takes a second or two."""

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tiny_run import VOWELS, launch, overrides, records, reward_file  # pyright: ignore[reportImplicitRelativeImport]

SPECIAL = ["<unk>", "<end>"]
CHARACTERS = string.ascii_letters + string.digits + " .?+-"

RIGHT_AND_SHORT = """
def reward(completion: str) -> dict[str, float]:
    share = sum(letter in "aeiou" for letter in completion) / max(1, len(completion))
    return {"vowels": share, "start": 0.01 * completion.startswith(tuple("aeiou"))}
"""
"""Two named rewards of different scale."""


def make_letters_model(folder: Path) -> Path:
    """Write a random Llama with one token for each of 69 characters; untrained, a tenth of what it says are vowels."""
    vocabulary = {text: number for number, text in enumerate([*SPECIAL, *CHARACTERS])}
    tokens = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = Split("", "isolated")
    tokens.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        unk_token="<unk>",
        eos_token="<end>",
        pad_token="<end>",
        chat_template="{% for message in messages %}{{ message.content }}{% endfor %}",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(vocabulary),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                eos_token_id=vocabulary["<end>"],
                pad_token_id=vocabulary["<end>"],
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def letters_run(model: Path, folder: Path, *settings: str, code: str = VOWELS) -> list[dict[str, float | None]]:
    """Train 4 prompts x 6 answers of at most 4 characters a step, without checkpoints, and return its records."""
    more = (
        "grpo.max_num_steps=16",
        "grpo.num_prompts_per_step=4",
        "grpo.num_generations_per_prompt=6",
        "policy.train_global_batch_size=24",
        "policy.generation.max_new_tokens=4",
        "policy.optimizer.kwargs.lr=0.05",
        "checkpointing.enabled=false",
        *settings,
    )
    launch(overrides(model, reward_file(folder, code), folder / "run", *more))
    return records(folder / "run")


def late_reward(lines: list[dict[str, float | None]]) -> float:
    """The mean reward of the last five steps."""
    return sum(line["train/reward/mean"] or 0.0 for line in lines[-5:]) / 5
