"""What the `policy` section asks of a worker is what it does: seen from the inputs its model runs on."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import LlamaModel

from nemo_rl.config.load import load_config
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.types import GenerationRequest, SamplingParams
from nemo_rl.metrics import scalars
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.workers.policy import PolicyWorker

PROMPT, ANSWERS, ANSWER = 10, 4, 5


def worker_with(model: Path, *settings: str) -> PolicyWorker:
    sizes = ("grpo.num_prompts_per_step=1", f"grpo.num_generations_per_prompt={ANSWERS}")
    fixed = ("policy.train_global_batch_size=4", "policy.precision=float32", "policy.scheduler=[]")
    return PolicyWorker(load_config(None, [*sizes, *fixed, *settings], GRPOConfig).config.policy, str(model))


def batch() -> TokenBatch:
    """One group: a prompt, and four answers that have nothing else in common."""
    answers = [torch.arange(ANSWER) + 50 * (number + 1) for number in range(ANSWERS)]
    length = PROMPT + ANSWER
    mask = (torch.arange(length) >= PROMPT).repeat(ANSWERS)
    return TokenBatch(
        torch.cat([torch.cat([torch.arange(PROMPT) + 3, answer]) for answer in answers]),
        torch.arange(ANSWERS + 1) * length,
        torch.zeros(ANSWERS, dtype=torch.int64),
        {
            "loss_mask": mask,
            "loss_weights": mask / mask.sum(),
            "advantages": torch.ones(ANSWERS * length),
        },
    )


@contextmanager
def counted_passes() -> Generator[list[int]]:
    """The sizes of the inputs with which any Llama runs meanwhile."""
    sizes: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del args
        if isinstance(module, LlamaModel):
            sizes.append(output.last_hidden_state.shape[:-1].numel())

    handle = register_module_forward_hook(count)
    try:
        yield sizes
    finally:
        handle.remove()


SHARED, SEPARATE = PROMPT + ANSWERS * (ANSWER - 1), ANSWERS * (PROMPT + ANSWER - 1)


@pytest.mark.parametrize(
    ("setting", "trained", "scored"),
    [
        ("share_prefixes=true", [SHARED], [SHARED]),
        ("share_prefixes=false", [SEPARATE], [SEPARATE]),
        (f"min_shared_prefix={PROMPT}", [SHARED], [SHARED]),
        (f"min_shared_prefix={PROMPT + 1}", [SEPARATE], [SEPARATE]),
        ("train_mb_tokens=20", [18, 18], [SHARED]),
        ("logprob_mb_tokens=20", [SHARED], [18, 18]),
    ],
)
def test_a_worker_cuts_its_batches_as_asked(
    setting: str, trained: list[int], scored: list[int], tiny_llama: Path
) -> None:
    worker = worker_with(tiny_llama, f"policy.{setting}")
    with counted_passes() as sizes:
        worker.logprobs(batch())
    assert sizes == scored
    with counted_passes() as sizes:
        worker.train(batch(), ClippedPolicyObjective(on_policy=True))
    assert sizes == trained


@pytest.mark.parametrize(
    ("algorithm", "tokens"),
    [
        ("concatenative", [27 + 26 + 23, 51]),
        ("first_fit_decreasing", [51 + 27, 26 + 23]),
        ("modified_first_fit_decreasing", [51 + 26 + 23, 27]),
    ],
)
def test_a_worker_packs_as_asked(algorithm: str, tokens: list[int], tiny_llama: Path) -> None:
    lengths = torch.tensor([27, 26, 23, 51]) + 1
    last = lengths.cumsum(0) - 1
    apart = TokenBatch(
        torch.cat([torch.arange(length) + 10 * i + 3 for i, length in enumerate(lengths.tolist())]),
        torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        torch.arange(4),
        {"loss_mask": torch.zeros(int(lengths.sum()), dtype=torch.bool).index_fill(0, last, True)},
    )
    worker = worker_with(tiny_llama, f"policy.sequence_packing.algorithm={algorithm}", "policy.logprob_mb_tokens=100")
    with counted_passes() as sizes:
        worker.logprobs(apart)
    assert sizes == tokens


def requests() -> list[GenerationRequest]:
    sampling = SamplingParams(max_new_tokens=2)
    return [GenerationRequest(torch.arange(4) + 10 * seed, sampling, seed) for seed in range(6)]


def test_a_worker_samples_side_by_side_as_many_answers_as_asked(tiny_llama: Path) -> None:
    passes: list[int] = []
    for size in (1, 3, 6):
        with counted_passes() as sizes:
            worker_with(tiny_llama, f"policy.generation.max_batch_size={size}").generate(requests())
        passes.append(len(sizes))
    assert passes[0] > passes[1] > passes[2]


def test_a_worker_computes_on_as_many_threads_as_asked(tiny_llama: Path) -> None:
    before = torch.get_num_threads()
    try:
        worker_with(tiny_llama, f"policy.num_threads={before + 2}")
        assert torch.get_num_threads() == before + 2
    finally:
        torch.set_num_threads(before)


def test_autocast_computes_in_bfloat16_in_training_and_in_sampling(tiny_llama: Path) -> None:
    plain, cast = (worker_with(tiny_llama, f"policy.precision={name}") for name in ("float32", "bfloat16_autocast"))
    rounding = (cast.logprobs(batch()) - plain.logprobs(batch())).abs().max()
    assert 1e-5 < rounding < 0.1

    samples = [torch.cat([one.logprobs for one in worker.generate(requests())]) for worker in (cast, plain)]
    assert samples[0].dtype == torch.float32
    assert not torch.allclose(samples[0], samples[1], rtol=0, atol=1e-5)

    objective = ClippedPolicyObjective(on_policy=True)
    entropy, other = (scalars(worker.train(batch(), objective))["entropy"] for worker in (cast, plain))
    assert 1e-6 < abs(entropy - other) < 0.1
