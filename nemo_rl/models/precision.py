"""`Precision`: the number formats of a model's weights and of its arithmetic."""

from dataclasses import dataclass
from typing import Literal

import torch

type PrecisionName = Literal["float32", "bfloat16", "bfloat16_autocast"]


@dataclass(frozen=True, slots=True)
class Precision:
    """How a model computes.

    Attributes:
        name: as a configuration has it, never `auto`.
        weights: dtype of the weights in memory.
        autocast: dtype of the arithmetic where it is another one, or None.
    """

    name: PrecisionName
    weights: torch.dtype
    autocast: torch.dtype | None = None


def precision_of(name: PrecisionName | Literal["auto"], device: torch.device) -> Precision:
    """Turn a configured precision into number formats.

    `auto` is bfloat16 where `device` multiplies matrices in it, and float32 elsewhere: a processor that has to convert
    first is several times slower in bfloat16 than in float32.
    """
    match name:
        case "auto":
            return precision_of("bfloat16" if has_bfloat16_arithmetic(device) else "float32", device)
        case "float32":
            return Precision(name, torch.float32)
        case "bfloat16":
            return Precision(name, torch.bfloat16)
        case "bfloat16_autocast":
            return Precision(name, torch.float32, torch.bfloat16)


def has_bfloat16_arithmetic(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
