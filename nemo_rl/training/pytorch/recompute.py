"""Activation checkpointing: a layer keeps its input, and computes what its backward pass needs a second time.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, https://arxiv.org/abs/1604.06174. The selective kind
keeps the outputs of matrix products and of attention, which cost most to compute, and repeats what lies between them
(Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 5).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

type Recompute = bool | Literal["selective"]
"""False keeps every activation, True those between the layers, `selective` also products and attention in them."""

_KEPT = {
    f"aten::{name}"
    for name in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "_grouped_mm",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
} | {"torch_attn::_varlen_attn"}
"""Operators whose outputs the selective kind keeps, by PyTorch's names."""


def recompute_layers(trunk: nn.Module, kind: Recompute) -> None:
    """Let the layers of a trunk compute their activations again in the backward pass; no value or gradient changes.

    The forward function of a layer is wrapped, not the layer: parameters keep their names, and what is hooked onto the
    layer, as FSDP is, stays around the wrapper, whether it was there before or comes later. Without gradient the
    function is called as it is.

    Args:
        trunk: with `layers`.
        kind: see `Recompute`.
    """
    if not kind:
        return
    settings: dict[str, Any] = {}
    if kind == "selective":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for layer in cast(nn.ModuleList, trunk.layers):
        if any(True for _ in layer.parameters()):  # not what another pipeline stage holds
            layer.forward = partial(_recomputed, layer.forward, settings)


def _recomputed(forward: Callable[..., Any], settings: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **settings, **kwargs)


def _policy(_: object, operator: Any, *args: object, **kwargs: object) -> CheckpointPolicy:
    del args, kwargs
    is_kept = operator.name().partition(".")[0] in _KEPT
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
