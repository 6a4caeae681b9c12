"""Folders of random models with a tokenizer, for benchmarks that need no pretrained one."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast


def write_model(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, device: str) -> None:
    """Write a random causal language model, made on `device`, and a tokenizer whose only words are two."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({"<unk>": 0, "<end>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(folder)
