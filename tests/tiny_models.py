"""Random models of every supported family, small enough for a test, and the one pretrained model that needs no hub."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    DeepseekV3Config,
    DogeConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    SmolLM3Config,
    StableLmConfig,
)

from nemo_rl.distributed.cache import cache_dir
from nemo_rl.models.embedded import embedded_model

FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "smollm3": SmolLM3Config,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
    "mistral": MistralConfig,
    "mixtral": MixtralConfig,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3_text": Gemma3TextConfig,
    "phi": PhiConfig,
    "phi3": Phi3Config,
    "gpt_oss": GptOssConfig,
    "deepseek_v3": DeepseekV3Config,
}
"""Families that attend through Transformers' attention interface and nothing else."""

OTHER_FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "mamba": MambaConfig,
    "recurrent_gemma": RecurrentGemmaConfig,
    "qwen3_next": Qwen3NextConfig,
    "stablelm": StableLmConfig,
    "doge": DogeConfig,
    "bert": BertConfig,
}
"""Recurrent, recurrent in some layers (two of them), attention of its own, a mask of its own, a head of its own."""

SIZES: dict[str, dict[str, Any]] = {
    # one layer with rotary positions, one without
    "smollm3": {"no_rope_layers": [1, 0]},
    # a dense layer, then one of experts
    "qwen3_moe": {
        "mlp_only_layers": [0],
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
    },
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    # rotary positions of another base in the layer with a window
    "gemma3_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
        },
    },
    "phi": {"partial_rotary_factor": 0.5, "qk_layernorm": True},
    "phi3": {"sliding_window": 8},
    # caps so low that scores reach them
    "gemma2": {
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
        "sliding_window": 8,
    },
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 8},
    # values narrower than keys
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "head_dim": 4,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 6,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 8, "logits_soft_cap": 3.0},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}
"""What a family needs beyond the sizes that all have."""


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
    return (FAMILIES | OTHER_FAMILIES)[family](**{**defaults, **SIZES.get(family, {}), **sizes})


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
