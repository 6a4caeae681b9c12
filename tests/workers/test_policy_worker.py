"""A policy worker samples and trains on the same weights, and its handles say what it says."""

import asyncio
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from nemo_rl.config.schema.policy import PolicyConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.types import Completion, GenerationRequest, SamplingParams
from nemo_rl.distributed.local import LocalExecutor
from nemo_rl.errors import ConfigError
from nemo_rl.interfaces import WorkerHandle
from nemo_rl.metrics import scalars
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.objectives.weights import loss_weights
from nemo_rl.workers.handles import ColocatedGenerator, Policy
from nemo_rl.workers.policy import PolicyWorker

SAMPLING = SamplingParams(max_new_tokens=6, temperature=0.9)
REQUESTS = [GenerationRequest(torch.arange(3, 9), SAMPLING, seed) for seed in range(4)]


def policy_config(model: Path, **generation: Any) -> PolicyConfig:
    return PolicyConfig.model_validate(
        {
            "model_name": str(model),
            "train_global_batch_size": 4,
            "max_total_sequence_length": 32,
            "precision": "float32",
            "device": "cpu",
            "num_threads": torch.get_num_threads(),  # of the test's thread and of the worker's
            "optimizer": {"kwargs": {"lr": 0.05}},
            "generation": {"backend": "hf", "max_new_tokens": 6, "temperature": 0.9, **generation},
        }
    )


@pytest.fixture
def worker(tiny_llama: Path) -> Iterator[WorkerHandle]:
    with LocalExecutor() as executor:
        yield executor.start(PolicyWorker, policy_config(tiny_llama), str(tiny_llama), with_reference=True)


def to_batch(completions: list[Completion]) -> TokenBatch:
    """The answers to REQUESTS; every second one was good."""
    parts = [
        (r.prompt_ids, c.token_ids, c.logprobs, [1.0, -1.0][i % 2])
        for i, (r, c) in enumerate(zip(REQUESTS, completions, strict=True))
    ]
    mask = torch.cat([torch.arange(len(prompt) + len(answer)) >= len(prompt) for prompt, answer, _, _ in parts])
    cu_seqlens = torch.tensor([0] + [len(prompt) + len(answer) for prompt, answer, _, _ in parts]).cumsum(0)
    return TokenBatch(
        torch.cat([torch.cat([prompt, answer]) for prompt, answer, _, _ in parts]),
        cu_seqlens,
        torch.zeros(len(parts), dtype=torch.int64),
        {
            "loss_mask": mask,
            "loss_weights": loss_weights(mask, cu_seqlens),
            "advantages": torch.cat(
                [torch.full((len(prompt) + len(answer),), good) for prompt, answer, _, good in parts]
            ),
            "rollout_logprobs": torch.cat([torch.cat([torch.zeros(len(p)), logprobs]) for p, _, logprobs, _ in parts]),
        },
    )


def test_generating_and_training_share_the_weights(worker: WorkerHandle) -> None:
    policy, sampler = Policy(worker), ColocatedGenerator(worker)
    policy.publish(3)
    before = asyncio.run(sampler.generate(REQUESTS))
    assert {completion.policy_version for completion in before} == {3}
    batch = to_batch(before)
    start = policy.logprobs(batch)
    torch.testing.assert_close(start, batch.token_columns["rollout_logprobs"], rtol=0, atol=1e-5)
    metrics = scalars(policy.train(batch, ClippedPolicyObjective(on_policy=True)))
    assert metrics["token_mult_prob_error"] == pytest.approx(1.0, abs=1e-5)
    policy.publish(4)
    after = asyncio.run(sampler.generate(REQUESTS))
    assert {completion.policy_version for completion in after} == {4}
    assert [c.token_ids.tolist() for c in after] != [c.token_ids.tolist() for c in before]
    fresh = to_batch(after)
    torch.testing.assert_close(policy.logprobs(fresh), fresh.token_columns["rollout_logprobs"], rtol=0, atol=1e-5)
    gain = (policy.logprobs(batch) - start) * batch.token_columns["advantages"]
    assert gain.sum() > 0  # good answers became likelier, bad ones less likely
    with policy.reference():
        assert torch.equal(policy.logprobs(batch), start)
    assert not torch.equal(policy.logprobs(batch), start)
    assert scalars(sampler.metrics())["generation/sampled_tokens"] == sum(len(c.token_ids) for c in [*before, *after])


def test_a_worker_goes_on_where_another_saved_with_an_objective_that_travelled(
    worker: WorkerHandle, tiny_llama: Path, tmp_path: Path
) -> None:
    batch = to_batch(worker.call("generate", REQUESTS).result())
    objective = ClippedPolicyObjective(on_policy=True, ratio_clip_c=3.0)
    policy = Policy(worker)
    policy.train(batch, objective)
    policy.save(tmp_path / "policy")
    policy.export(tmp_path / "hf")
    exported = PolicyWorker(policy_config(tiny_llama), str(tmp_path / "hf"))
    assert torch.equal(exported.logprobs(batch), policy.logprobs(batch))
    other = PolicyWorker(policy_config(tiny_llama), str(tiny_llama))
    other.load(tmp_path / "policy")
    travelled = pickle.loads(pickle.dumps((batch, objective)))
    assert other.train(*travelled) == policy.train(batch, objective)
    assert torch.equal(other.logprobs(batch), policy.logprobs(batch))
    assert other.describe() == policy.describe()


def test_log_probabilities_are_those_of_the_truncated_distribution_that_was_sampled_from(tiny_llama: Path) -> None:
    rule = {"temperature": 0.7, "top_p": 0.8, "top_k": 50, "min_p": 0.05}
    worker = PolicyWorker(policy_config(tiny_llama, **rule), str(tiny_llama))
    sampling = SamplingParams(max_new_tokens=6, temperature=0.7, top_p=0.8, top_k=50, min_p=0.05)
    batch = to_batch(worker.generate([replace(request, sampling=sampling) for request in REQUESTS]))
    sampled = batch.token_columns["rollout_logprobs"]
    torch.testing.assert_close(worker.logprobs(batch), sampled, rtol=0, atol=1e-4)
    metrics = scalars(worker.train(batch, ClippedPolicyObjective(on_policy=True)))
    assert metrics["token_mult_prob_error"] == pytest.approx(1.0, abs=1e-4)
    for name, value in {"temperature": 1.0, "top_p": 1.0, "top_k": None, "min_p": 0.9}.items():  # each one counts
        other = PolicyWorker(policy_config(tiny_llama, **rule | {name: value}), str(tiny_llama))
        assert (other.logprobs(batch) - sampled).abs().max() > 1e-2, name


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("bfloat16_autocast", torch.bfloat16)],
)
def test_sampling_scoring_and_training_compute_in_the_precision_asked_for(
    precision: str, dtype: torch.dtype, tiny_llama: Path
) -> None:
    config = policy_config(tiny_llama).model_copy(update={"precision": precision})
    worker = PolicyWorker(config, str(tiny_llama))
    seen: set[torch.dtype] = set()
    worker._backend.model.module.get_submodule("model.layers.1.mlp.down_proj").register_forward_hook(
        lambda module, inputs, output: seen.add(output.dtype)
    )
    batch = to_batch(worker.generate(REQUESTS))
    assert seen == {dtype}
    seen.clear()
    worker.logprobs(batch)
    assert seen == {dtype}
    seen.clear()
    worker.train(batch, ClippedPolicyObjective(on_policy=True))
    assert seen == {dtype}
    assert {weight.dtype for weight in worker._backend._masters.parameters} == {torch.float32}


@pytest.mark.parametrize(("max_batch_size", "rows"), [(1, 1), (3, 3), (64, 4)])
def test_at_most_so_many_answers_run_side_by_side(max_batch_size: int, rows: int, tiny_llama: Path) -> None:
    worker = PolicyWorker(policy_config(tiny_llama, max_batch_size=max_batch_size), str(tiny_llama))
    sizes: list[int] = []
    worker._backend.model.module.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: sizes.append(inputs[0].numel())
    )
    requests = [replace(request, prompt_ids=torch.tensor([10 + i])) for i, request in enumerate(REQUESTS)]
    worker.generate(requests)
    assert max(sizes) == rows


def test_the_worker_computes_on_the_threads_it_is_given(tiny_llama: Path) -> None:
    before = torch.get_num_threads()
    try:
        for num_threads in (3, 2):
            PolicyWorker(policy_config(tiny_llama).model_copy(update={"num_threads": num_threads}), str(tiny_llama))
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)


def test_stop_strings_are_read_with_the_tokenizer_of_the_model(tiny_llama: Path) -> None:
    worker = PolicyWorker(policy_config(tiny_llama), str(tiny_llama))
    (free,) = worker.generate(REQUESTS[:1])
    text = AutoTokenizer.from_pretrained(tiny_llama).decode(free.token_ids[:3])
    stopping = SamplingParams(max_new_tokens=6, temperature=0.9, stop_strings=(text[-4:],))
    (stopped,) = worker.generate([GenerationRequest(REQUESTS[0].prompt_ids, stopping, seed=0)])
    assert (stopped.stop_reason, stopped.token_ids.tolist()) == ("stop", free.token_ids[:3].tolist())


def test_an_engine_that_does_not_share_the_process_is_refused_with_a_sentence(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy.generation.backend=vllm .* use backend=hf"):
        PolicyWorker(policy_config(tiny_llama, backend="vllm"), str(tiny_llama))
