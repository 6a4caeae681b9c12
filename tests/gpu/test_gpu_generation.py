"""What the sampler on a GPU says about its tokens is what training says about them."""

from pathlib import Path

import pytest
import torch

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.types import GenerationRequest, Rollout, RolloutGroup, SamplingParams, Task
from nemo_rl.generation.hf import HFGenerator
from tiny_gpu import make_backend, needs_gpu, save_model

pytestmark = needs_gpu


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_sampled_tokens_are_as_likely_in_training(tmp_path: Path, precision: str, tolerance: float) -> None:
    backend = make_backend(save_model(tmp_path), "cuda", precision)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 128, (length,), generator=generator) for length in (5, 19, 40)]
    rule = SamplingParams(max_new_tokens=24, temperature=0.8)
    requests = [GenerationRequest(prompt, rule, seed) for prompt in prompts for seed in range(4)]
    completions = HFGenerator(backend.model).generate_now(requests)
    groups: list[RolloutGroup] = []
    for index, prompt in enumerate(prompts):
        rollouts = [
            Rollout(
                torch.cat([prompt, done.token_ids]),
                torch.arange(len(prompt) + len(done.token_ids)) >= len(prompt),
                torch.cat([torch.zeros(len(prompt)), done.logprobs]),
                {},
                "stop",
                0,
            )
            for done in completions[4 * index : 4 * index + 4]
        ]
        groups.append(RolloutGroup(Task((), "none", index=index), tuple(rollouts)))
    batch = TokenBatch.from_rollouts(groups)
    sampled = batch.token_columns["rollout_logprobs"]
    assert batch.token_columns["loss_mask"].sum() == 12 * 24
    assert (backend.logprobs(batch) - sampled).abs().max() <= tolerance
