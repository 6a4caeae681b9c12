"""A configured precision becomes number formats that the hardware is fast in."""

import pytest
import torch

from nemo_rl.models import precision
from nemo_rl.models.precision import Precision, has_bfloat16_arithmetic, precision_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "weights", "autocast"),
    [
        ("float32", torch.float32, None),
        ("bfloat16", torch.bfloat16, None),
        ("bfloat16_autocast", torch.float32, torch.bfloat16),
    ],
)
def test_a_named_precision_is_what_it_says(
    name: precision.PrecisionName, weights: torch.dtype, autocast: torch.dtype | None
) -> None:
    assert precision_of(name, CPU) == Precision(name, weights, autocast)


@pytest.mark.parametrize(
    ("capabilities", "name"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "float32"),
        ({"avx2": True, "avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({}, "float32"),
    ],
)
def test_auto_is_bfloat16_where_the_processor_computes_in_it(
    capabilities: dict[str, bool], name: precision.PrecisionName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert precision_of("auto", CPU) == precision_of(name, CPU)


def test_this_processor_is_asked() -> None:
    told = torch.cpu.get_capabilities()
    assert has_bfloat16_arithmetic(CPU) == bool(told.get("avx512_bf16") or told.get("amx_bf16"))
