"""Compiled layers compute what plain ones do, for streams of any length."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from nemo_rl.data.packing import build_stream
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.models.compiled import compile_layers
from tiny_batches import rollout_batch
from tiny_models import tiny_model


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, as it compiles
def test_compiled_layers_are_plain_layers_and_share_their_graphs() -> None:
    plain = tiny_model("qwen2", num_hidden_layers=3)
    models = [CausalLM.wrap(copy.deepcopy(plain)) for _ in range(2)]
    assert compile_layers(models[1].trunk) == 3
    batch = rollout_batch(plain)
    torch._dynamo.reset()
    counters.clear()
    for count in (9, 5, 3):  # three lengths
        stream = build_stream(batch.select(range(count)))
        expected, found = (model.stream_hidden(stream) for model in models)
        assert (found - expected).norm() <= 1e-5 * expected.norm()
        expected.square().sum().backward()
        found.square().sum().backward()
    for (name, one), other in zip(models[1].trunk.named_parameters(), models[0].trunk.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 1e-4 * other.grad.norm(), name
    assert 0 < counters["stats"]["unique_graphs"] <= 4  # not per layer, not per length
