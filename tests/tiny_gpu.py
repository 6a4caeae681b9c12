"""Backends over a tiny model on any device, with nothing that a bare GPU machine lacks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nemo_rl.config.schema.policy import PolicyConfig
from nemo_rl.training.pytorch.backend import PyTorchBackend
from tiny_models import tiny_model  # pyright: ignore[reportImplicitRelativeImport]

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
"""The `pytestmark` of every file in tests/gpu."""


def save_model(folder: Path) -> Path:
    """Write a random Qwen2 with 4 query and 2 key heads of 16."""
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "initializer_range": 0.1}
    tiny_model("qwen2", tie_word_embeddings=True, **sizes).save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerBase:
    """Words that are numbers."""
    words = Tokenizer(WordLevel({str(number): number for number in range(128)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="2", pad_token="2")


def make_backend(folder: Path, device: str, precision: str, **changes: Any) -> PyTorchBackend:
    """A policy with plain SGD of rate 1, so that a step shows the gradient; `changes` to the section go on top."""
    settings: dict[str, Any] = {
        "model_name": str(folder),
        "train_global_batch_size": 9,
        "max_total_sequence_length": 64,
        "precision": precision,
        "max_grad_norm": None,
        "device": device,
        "optimizer": {"name": "torch.optim.SGD", "kwargs": {"lr": 1.0}},
        "generation": {"backend": "hf", "max_new_tokens": 8, "temperature": 0.8},
    }
    return PyTorchBackend(PolicyConfig.model_validate(settings | changes), str(folder), tokenizer())


def masters(backend: PyTorchBackend) -> Tensor:
    """All float32 weights that the optimizer steps, flat and on the CPU."""
    return torch.cat([weight.detach().flatten().cpu() for weight in backend._masters.parameters])
