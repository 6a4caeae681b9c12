"""What each family of models can do, found on its tiny model; `python tests/tiny_model_table.py` writes docs/models.md.

`tests/models/test_families.py` fails when the committed table says something else.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from torch import nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedModel

from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.training.pytorch.experts import expert_modules
from tiny_models import FAMILIES, tiny_model  # pyright: ignore[reportImplicitRelativeImport]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
TABLE = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- end of table -->)", re.DOTALL)
ON_ROWS = ("qwen3_next", "mamba", "recurrent_gemma", "stablelm")
MEMBERS = {
    "llama": "Llama 2, Llama 3, SmolLM, SmolLM2",
    "smollm3": "SmolLM3",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3 mixtures (30B-A3B, 235B-A22B)",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "phi": "Phi-1, Phi-2",
    "phi3": "Phi-3, Phi-4",
    "gpt_oss": "gpt-oss",
    "deepseek_v3": "DeepSeek-V3, DeepSeek-R1, Moonlight",
    "qwen3_next": "Qwen3-Next",
    "mamba": "Mamba",
    "recurrent_gemma": "RecurrentGemma",
    "stablelm": "StableLM",
}


def table() -> str:
    """The table in Markdown."""
    head = ("family", "models", "packing", "shared prefixes", "CP", "TP", "EP", "LoRA", "score head")
    rows = [head, ("---",) * len(head), *map(_row, [*FAMILIES, *ON_ROWS])]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(family: str) -> tuple[str, ...]:
    model = tiny_model(family)
    experts = _yes(any(expert_modules(model)))
    layers = ", ".join(_linear_parts(model))
    has_plan = _yes(bool(model.config.base_model_tp_plan))
    has_score = _yes(type(model.config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING)
    packed = _yes(CausalLM.wrap(model).takes_plans)
    return f"`{family}`", MEMBERS[family], packed, packed, packed, has_plan, experts, layers, has_score


def _yes(fact: bool) -> str:
    return "yes" if fact else "–"


def _linear_parts(model: PreTrainedModel) -> Iterator[str]:
    """Where low-rank adapters find linear layers."""
    linear = [name for name, module in model.base_model.named_modules() if isinstance(module, nn.Linear)]
    attention = [name for name in linear if "attn" in name or "temporal_block" in name]
    if attention:
        yield "attention"
    if len(linear) > len(attention):
        yield "feed-forward" if attention else "mixer"


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(table(), PAGE.read_text()))
