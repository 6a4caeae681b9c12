"""Activation checkpointing really saves: bytes that the forward pass leaves for the backward pass, counted."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from nemo_rl.data.packing import build_stream
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.training.pytorch import recompute
from nemo_rl.training.pytorch.recompute import Recompute, recompute_layers
from tiny_batches import rollout_batch
from tiny_models import tiny_model

KINDS: list[Recompute] = [False, "selective", True]
STREAM = build_stream(rollout_batch(tiny_model("llama")), share_prefixes=True)


def prepared(kind: Recompute) -> CausalLM:
    model = CausalLM.wrap(tiny_model("llama", num_hidden_layers=6))
    recompute_layers(model.trunk, kind)
    return model


def forward(model: CausalLM) -> Tensor:
    return model.stream_hidden(STREAM).square().sum()


def kept_bytes(kind: Recompute) -> int:
    """What the allocator still holds after a forward pass, less what it held before."""
    model = prepared(kind)
    forward(model).backward()  # what libraries keep from the first call on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = forward(model)
    del loss
    return sum(event.self_device_memory_usage + event.self_cpu_memory_usage for event in profiler.key_averages())


def test_each_kind_keeps_less_than_the_one_before() -> None:
    everything, selective, full = map(kept_bytes, KINDS)
    print(f"kept for the backward pass: {everything:,} all, {selective:,} selective, {full:,} full")
    assert selective < 0.75 * everything
    assert full < 0.25 * everything


def saved_bytes(kind: Recompute) -> int:
    """What autograd saves outside of layers that are computed again."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model = prepared(kind)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model).backward()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.module.parameters()}
    return sum(size for where, size in sizes.items() if where not in weights)


def test_autograd_saves_little_but_the_inputs_of_layers() -> None:
    assert saved_bytes(True) < 0.25 * saved_bytes(False)


def test_the_selective_kind_computes_no_product_of_a_layer_twice() -> None:
    flops: dict[Recompute, int] = {}
    for kind in KINDS:
        model = prepared(kind)
        loss = forward(model)
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops[kind] = counter.get_total_flops()
    assert flops["selective"] == flops[False]
    assert flops[True] > 1.35 * flops[False]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_names_stay_and_nothing_is_wrapped_without_gradient(kind: Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(kind)
    assert [name for name, _ in model.module.named_parameters()] == [
        name for name, _ in prepared(False).module.named_parameters()
    ]
    calls: list[object] = []
    watched = partial(counting, calls)
    monkeypatch.setattr(recompute, "checkpoint", watched)
    with torch.no_grad():
        forward(model)
    assert not calls
    forward(model)
    assert len(calls) == 6


def counting(calls: list[object], *args: Any, **kwargs: Any) -> Any:
    calls.append(args)
    return checkpoint(*args, **kwargs)
