"""Random models of every supported family, small enough for a test, and the one pretrained model that needs no hub."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from nemo_rl.distributed.cache import cache_dir
from nemo_rl.models.embedded import embedded_model

FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
}


def tiny_config(family: str = "llama", **sizes: Any) -> PreTrainedConfig:
    """The configuration of a model of that family with two layers, 4 query heads, 2 key heads and 128 tokens.

    Any field can be given, e.g. `tie_word_embeddings=True` or `sliding_window=8`.
    """
    defaults: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return FAMILIES[family](**{**defaults, **sizes})


def tiny_model(
    family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any
) -> PreTrainedModel:
    """A random model of that family in evaluation mode; equal seeds give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **sizes), dtype=torch.float32)
        for parameter in model.parameters():  # norms and biases start at constants, which would hide mistakes
            if parameter.dim() == 1:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


@cache
def embedded_folder() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder in the user's cache, unpacked at most once per machine."""
    return embedded_model("SmolLM2-135M-Instruct", cache_dir())
