"""Compiling a model's layers: their many small operations between matrix products become few."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(trunk: nn.Module) -> int:
    """Compile every decoder layer in place, for streams of any length; names and weights stay what they are.

    Attention along a plan stays outside, so a layer becomes three graphs, which all layers of one kind share.

    Returns:
        How many layers there are.
    """
    layers = [module for module in trunk.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)
