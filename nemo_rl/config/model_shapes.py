"""Sizes of a model from its `config.json`, or from a small table: parameters and bytes per token without loading it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A dense decoder of the Llama family (gated feed-forward, grouped-query attention, RMS norms).

    Attributes:
        hidden: width H.
        layers: decoder layers.
        intermediate: width of the feed-forward part.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of one head.
        vocab: vocabulary V.
        tied: whether the LM head is the embedding.
        qkv_bias: whether query, key and value projections have a bias.
        qk_norm: whether queries and keys are normalised per head.
    """

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        vectors = self.qkv_bias * (q + 2 * kv) + self.qk_norm * 2 * self.head_dim + 2 * self.hidden
        embeddings = (1 if self.tied else 2) * self.vocab * self.hidden
        return embeddings + self.linear_parameters + self.layers * vectors + self.hidden

    @property
    def linear_parameters(self) -> int:
        """Numbers in the matrices of all linear layers but the head."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """Inputs and outputs of all linear layers but the head, by name."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = {
            "self_attn.q_proj": (self.hidden, q),
            "self_attn.k_proj": (self.hidden, kv),
            "self_attn.v_proj": (self.hidden, kv),
            "self_attn.o_proj": (q, self.hidden),
            "mlp.gate_proj": (self.hidden, self.intermediate),
            "mlp.up_proj": (self.hidden, self.intermediate),
            "mlp.down_proj": (self.intermediate, self.hidden),
        }
        return {f"model.layers.{i}.{name}": sizes for i in range(self.layers) for name, sizes in layer.items()}

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers that one token leaves in the KV cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def activation_elements_per_token(self) -> int:
        """Numbers kept for the backward pass, roughly: inputs of all matrix products, norms and the gate."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.layers * (6 * self.hidden + 3 * (q + kv) + 4 * self.intermediate)


_SMOLLM2_135M = ModelShape(576, 30, 1536, 9, 3, 64, 49152)
_QWEN25_1_5B = ModelShape(1536, 28, 8960, 12, 2, 128, 151936, qkv_bias=True)
KNOWN = {
    "SmolLM2-135M": _SMOLLM2_135M,
    "SmolLM2-135M-Instruct": _SMOLLM2_135M,
    "Qwen2.5-0.5B": ModelShape(896, 24, 4864, 14, 2, 64, 151936, qkv_bias=True),
    "Qwen2.5-1.5B": _QWEN25_1_5B,
    "Qwen2.5-1.5B-Instruct": _QWEN25_1_5B,
    "Qwen2.5-Math-1.5B": _QWEN25_1_5B,
    "Qwen2.5-7B": ModelShape(3584, 28, 18944, 28, 4, 128, 152064, tied=False, qkv_bias=True),
    "Qwen3-0.6B": ModelShape(1024, 28, 3072, 16, 8, 128, 151936, qk_norm=True),
    "Llama-3.2-1B-Instruct": ModelShape(2048, 16, 8192, 32, 8, 64, 128256),
    "Llama-3.1-8B-Instruct": ModelShape(4096, 32, 14336, 32, 8, 128, 128256, tied=False),
}
"""Shapes by the last part of the model's name, for models whose `config.json` is not on this machine."""

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def model_shape(name: str) -> ModelShape | None:
    """The shape of a local, cached or well-known model; None for any other."""
    if (config := _config_file(name)) and (shape := _from_config(json.loads(config.read_text(encoding="utf-8")))):
        return shape
    return KNOWN.get(name.split("/")[-1].split(":")[-1])


def _config_file(name: str) -> Path | None:
    local = Path(name) / "config.json"
    if local.is_file():
        return local
    if "/" not in name or Path(name).exists():
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def _from_config(config: Mapping[str, Any]) -> ModelShape | None:
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        return None
    heads = config["num_attention_heads"]
    return ModelShape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        intermediate=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        qkv_bias=kind == "qwen2" or config.get("attention_bias", False),
        qk_norm=kind == "qwen3",
    )
