"""The generator is `model.generate` to the token, and samples exactly what it says, whatever runs beside a request."""

import asyncio
import copy
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.types import Completion, GenerationRequest, SamplingParams
from nemo_rl.errors import BackendError
from nemo_rl.generation.hf import HFGenerator
from nemo_rl.metrics import scalars
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.objectives.truncation import WHOLE, Truncation
from nemo_rl.training.passes import arithmetic
from nemo_rl.training.step import Scorer, score_tokens
from tiny_models import embedded_folder, tiny_model

GREEDY = SamplingParams(max_new_tokens=10, temperature=0.0)
SAMPLED = SamplingParams(max_new_tokens=10, temperature=0.7)


def draw(length: int, seed: int, vocabulary: int = 128) -> Tensor:
    return torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(seed))


def mixed_requests(sampling: SamplingParams, vocabulary: int = 128) -> list[GenerationRequest]:
    """Prompts of 1 to 25 tokens, a group of three, two that begin alike, one inside another; budgets of 1 to 12."""
    shared = draw(14, 99, vocabulary)
    prompts = [draw(length, length, vocabulary) for length in (1, 5, 25, 9)]
    prompts += [shared, shared, shared, torch.cat([shared[:8], draw(6, 98, vocabulary)]), shared[:5]]
    budgets = [12, 3, 10, 1, 8, 8, 12, 5, 11]
    return [
        GenerationRequest(prompt, replace(sampling, max_new_tokens=budget), seed)
        for seed, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True))
    ]


def plain_greedy(model: PreTrainedModel, request: GenerationRequest) -> list[int]:
    output = model.generate(
        request.prompt_ids[None],
        attention_mask=torch.ones(1, len(request.prompt_ids), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=request.sampling.max_new_tokens,
        eos_token_id=list(request.sampling.stop_token_ids) or None,
        pad_token_id=0,
    )
    return output[0, len(request.prompt_ids) :].tolist()


def generator(model: PreTrainedModel, *, max_batch_size: int = 4) -> HFGenerator:
    return HFGenerator(CausalLM.wrap(copy.deepcopy(model)), max_batch_size=max_batch_size)


def token_lists(completions: Sequence[Completion]) -> list[list[int]]:
    return [completion.token_ids.tolist() for completion in completions]


def assert_same(found: Sequence[Completion], expected: Sequence[Completion]) -> None:
    assert token_lists(found) == token_lists(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
        assert one.stop_reason == other.stop_reason


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": 6}),
        ("gemma", {}),
        ("gemma2", {"attn_implementation": "eager"}),
        ("gpt_oss", {"attn_implementation": "eager"}),
        ("deepseek_v3", {}),
    ],
)
def test_greedy_is_generate_token_for_token_with_stop_ids_and_fewer_slots_than_requests(
    family: str, sizes: dict[str, Any]
) -> None:
    plain = tiny_model(family, **sizes)
    plain.generation_config.eos_token_id = None
    requests = mixed_requests(replace(GREEDY, stop_token_ids=tuple(range(16))))
    completions = generator(plain, max_batch_size=3).generate_now(requests)
    assert token_lists(completions) == [plain_greedy(plain, request) for request in requests]
    assert {completion.stop_reason for completion in completions} == {"stop", "length"}
    for request, completion in zip(requests, completions, strict=True):
        stopped = int(completion.token_ids[-1]) in request.sampling.stop_token_ids
        assert completion.stop_reason == ("stop" if stopped else "length")


def test_greedy_is_generate_on_a_pretrained_model() -> None:
    plain = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32).eval()
    plain.generation_config.eos_token_id = None
    requests = [request for i, request in enumerate(mixed_requests(GREEDY, vocabulary=2000)) if i in (1, 5, 7)]
    ours = HFGenerator(CausalLM.wrap(copy.deepcopy(plain)), max_batch_size=2)
    assert token_lists(ours.generate_now(requests)) == [plain_greedy(plain, request) for request in requests]


def test_a_completion_does_not_depend_on_what_runs_beside_it() -> None:
    model = tiny_model("qwen3")
    requests = mixed_requests(SAMPLED)
    alone = [generator(model, max_batch_size=1).generate_now([request])[0] for request in requests]
    for max_batch_size in (1, 2, 5, 64):
        assert_same(generator(model, max_batch_size=max_batch_size).generate_now(requests), alone)
    assert_same(generator(model).generate_now(requests[::-1])[::-1], alone)
    mixed = generator(model).generate_now([*requests, *mixed_requests(replace(GREEDY, top_k=3, top_p=0.5))])
    assert_same(mixed[: len(requests)], alone)


def test_the_seed_of_a_request_alone_decides_its_draws() -> None:
    ours = generator(tiny_model())
    prompt = draw(6, 1)
    first = ours.generate_now([GenerationRequest(prompt, SAMPLED, seed) for seed in (5, 6, 7)])
    torch.manual_seed(123)
    again = ours.generate_now([GenerationRequest(prompt, SAMPLED, seed) for seed in (7, 5, 6)])
    assert_same([again[1], again[2], again[0]], first)
    assert len({tuple(tokens) for tokens in token_lists(first)}) == 3


@pytest.mark.parametrize(
    ("autocast", "tolerance", "truncation"),
    [
        (None, 1e-5, WHOLE),
        (torch.bfloat16, 0.1, WHOLE),
        (None, 1e-4, Truncation(top_p=0.8, top_k=50, min_p=0.05)),
    ],
)
def test_sampled_logprobs_are_those_of_training(
    autocast: torch.dtype | None, tolerance: float, truncation: Truncation
) -> None:
    model = CausalLM.wrap(tiny_model("mistral", sliding_window=6))
    requests = mixed_requests(replace(SAMPLED, **asdict(truncation)))
    completions = HFGenerator(model, max_batch_size=4, autocast=autocast).generate_now(requests)
    lengths, masks = [0], []
    for request, completion in zip(requests, completions, strict=True):
        masks += [torch.zeros(len(request.prompt_ids)), torch.ones(len(completion.token_ids))]
        lengths.append(len(request.prompt_ids) + len(completion.token_ids))
    pairs = zip(requests, completions, strict=True)
    batch = TokenBatch(
        torch.cat([part for request, completion in pairs for part in (request.prompt_ids, completion.token_ids)]),
        torch.tensor(lengths).cumsum(0),
        torch.arange(len(requests)),
        {"loss_mask": torch.cat(masks).bool()},
    )
    scorer = Scorer(model, temperature=0.7, min_shared=2, autocast=autocast, truncation=truncation)
    trained = score_tokens(scorer, batch, max_tokens=50)[batch.token_columns["loss_mask"]]
    sampled = torch.cat([completion.logprobs for completion in completions])
    torch.testing.assert_close(sampled, trained, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("changes", "warpers"),
    [
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        ({"top_k": 9, "top_p": 0.8, "min_p": 0.1}, [TopKLogitsWarper(9), TopPLogitsWarper(0.8), MinPLogitsWarper(0.1)]),
    ],
)
def test_truncated_sampling_reports_the_renormalised_probability(
    changes: dict[str, float], warpers: Sequence[TopKLogitsWarper]
) -> None:
    plain = tiny_model()
    requests = mixed_requests(replace(SAMPLED, temperature=1.5, **changes))
    warp = LogitsProcessorList([TemperatureLogitsWarper(1.5), *warpers])
    completions = generator(plain).generate_now(requests)
    for request, completion in zip(requests, completions, strict=True):
        tokens = torch.cat([request.prompt_ids, completion.token_ids])
        logits = plain(tokens[None]).logits[0, len(request.prompt_ids) - 1 : -1]
        expected = warp(tokens[None], logits).log_softmax(-1).gather(-1, completion.token_ids[:, None])[:, 0]
        torch.testing.assert_close(completion.logprobs, expected, rtol=0, atol=1e-5)


def test_a_model_that_keeps_more_than_keys_and_values_is_refused() -> None:
    with pytest.raises(BackendError, match=r"MambaForCausalLM .*use policy\.generation\.backend=vllm"):
        HFGenerator(CausalLM.wrap(tiny_model("mamba")))


def test_top_k_of_one_samples_the_greedy_tokens() -> None:
    ours = generator(tiny_model())
    sampled = ours.generate_now(mixed_requests(replace(SAMPLED, top_k=1)))
    assert token_lists(sampled) == token_lists(ours.generate_now(mixed_requests(GREEDY)))


def hexadecimal(token_ids: Sequence[int]) -> str:
    return "".join(f"{token:02x}" for token in token_ids)


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it() -> None:
    model = CausalLM.wrap(tiny_model())
    ours = HFGenerator(model, decode=hexadecimal)
    prompt = draw(6, 4)
    (free,) = ours.generate_now([GenerationRequest(prompt, replace(SAMPLED, max_new_tokens=40), 3)])
    text = hexadecimal(free.token_ids.tolist())
    for start, length in ((3, 3), (8, 2), (1, 1), (21, 30)):  # within a token, across two, across sixteen
        string = text[start : start + length]
        end = text.index(string) + length
        sampling = replace(SAMPLED, max_new_tokens=40, stop_strings=("never said", string))
        (stopped,) = ours.generate_now([GenerationRequest(prompt, sampling, 3)])
        assert (len(stopped.token_ids), stopped.stop_reason) == (-(-end // 2), "stop")
        assert torch.equal(stopped.token_ids, free.token_ids[: len(stopped.token_ids)])


def test_a_prompt_enters_the_model_once_for_its_whole_group() -> None:
    ours = generator(tiny_model(), max_batch_size=64)
    shared = draw(20, 1)
    other = torch.cat([shared[:12], draw(5, 2)])
    requests = [
        GenerationRequest(prompt, replace(SAMPLED, max_new_tokens=2), i) for i in range(8) for prompt in (shared, other)
    ]
    completions = ours.generate_now(requests)
    first_tokens = {(i % 2, int(completion.token_ids[0])) for i, completion in enumerate(completions)}
    assert scalars(ours.metrics()) == {
        "generation/prompt_tokens": 8 * (20 + 17),
        "generation/prompt_tokens_computed": 20 + 5,
        "generation/sampled_tokens": 16 * 2,
        "generation/sampled_tokens_computed": len(first_tokens),
    }
    assert set(scalars(ours.metrics()).values()) == {0}


@pytest.mark.parametrize("slots", [24, 7])
def test_requests_that_agree_so_far_are_computed_as_one_and_answered_as_if_alone(slots: int) -> None:
    """At a low temperature samples of a prompt agree for a while; they must part exactly where they would alone."""
    prompts = [draw(9, 1), draw(9, 1), draw(14, 2)]  # the first two are one prompt
    sampling = replace(SAMPLED, temperature=0.4, max_new_tokens=12)
    budgets = [12, 5, 9]
    requests = [
        GenerationRequest(prompts[i % 3], replace(sampling, max_new_tokens=budgets[i % 2]), i) for i in range(24)
    ]
    ours = generator(tiny_model(), max_batch_size=slots)
    together = ours.generate_now(requests)
    computed = scalars(ours.metrics())["generation/sampled_tokens_computed"]
    alone = [ours.generate_now([request])[0] for request in requests]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.token_ids, other.token_ids)
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
    if slots == 24:  # all run side by side: what enters the model are the distinct beginnings that were continued
        fed = {
            (request.prompt_ids.tolist().__repr__(), tuple(completion.token_ids[:end].tolist()))
            for request, completion in zip(requests, together, strict=True)
            for end in range(1, len(completion.token_ids))
        }
        assert computed == len(fed) < sum(len(completion.token_ids) - 1 for completion in together)


def test_weights_changed_in_place_are_what_the_next_call_samples_from() -> None:
    plain = tiny_model()
    model = CausalLM.wrap(copy.deepcopy(plain))
    ours = HFGenerator(model)
    requests = mixed_requests(GREEDY)
    before = token_lists(ours.generate_now(requests))
    for changed in (plain, model.module):
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter.mul_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(3)) * 2)
    plain.generation_config.eos_token_id = None
    expected = [plain_greedy(plain, request) for request in requests]
    assert token_lists(ours.generate_now(requests)) == expected != before


def test_loaded_weights_are_those_of_the_version_that_answers() -> None:
    source = tiny_model(seed=1, tie_word_embeddings=True)
    source.generation_config.eos_token_id = None
    ours = generator(tiny_model(seed=0, tie_word_embeddings=True))
    requests = mixed_requests(GREEDY)
    assert {completion.policy_version for completion in ours.generate_now(requests)} == {0}
    weights = {**dict(source.named_parameters()), "lm_head.weight": source.lm_head.weight}
    ours.load_weights(iter(weights.items()), 7)
    completions = ours.generate_now(requests)
    assert {completion.policy_version for completion in completions} == {7}
    assert token_lists(completions) == [plain_greedy(source, request) for request in requests]
    ours.load_weights(None, 8)
    assert ours.generate_now(requests)[0].policy_version == 8
    with pytest.raises(BackendError, match=r"model.embed.weight"):
        ours.load_weights(iter({"model.embed.weight": torch.zeros(1)}.items()), 9)


def test_no_memory_is_read_before_it_is_written() -> None:
    model = tiny_model()
    requests = mixed_requests(SAMPLED)
    expected = generator(model).generate_now(requests)
    ours = generator(model)
    torch.use_deterministic_algorithms(True)  # fresh memory is filled with NaN then
    try:
        assert_same(ours.generate_now(requests), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_model_trains_after_it_has_generated() -> None:
    model = CausalLM.wrap(tiny_model("mistral", sliding_window=6))
    HFGenerator(model, autocast=torch.bfloat16).generate_now(mixed_requests(SAMPLED))
    assert not any(tensor.is_inference() for tensor in model.module.state_dict(keep_vars=True).values())
    assert not any(buffer.is_inference() for buffer in model.module.buffers())
    tokens = draw(12, 5)
    batch = TokenBatch(tokens, torch.tensor([0, 12]), torch.tensor([0]), {"loss_mask": torch.arange(12) > 4})
    scorer = Scorer(model, autocast=torch.bfloat16)
    stream = scorer.stream(batch)
    with arithmetic(model, torch.bfloat16):
        outputs = scorer.outputs(model.read(stream), stream, "logprobs")
    outputs.policy_logprobs.sum().backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in model.module.parameters())


def test_generating_in_the_background_gives_the_same_answers() -> None:
    ours = generator(tiny_model())
    requests = mixed_requests(SAMPLED)
    assert_same(asyncio.run(ours.generate(requests)), ours.generate_now(requests))
    assert ours.generate_now([]) == []


def test_what_cannot_be_generated_is_refused() -> None:
    ours = generator(tiny_model())
    with pytest.raises(BackendError, match="empty prompt"):
        ours.generate_now([GenerationRequest(torch.empty(0, dtype=torch.int64), GREEDY)])
    with pytest.raises(BackendError, match="decode"):
        ours.generate_now([GenerationRequest(draw(3, 0), replace(GREEDY, stop_strings=("a",)))])
    with pytest.raises(BackendError, match="max_new_tokens"):
        ours.generate_now([GenerationRequest(draw(3, 0), replace(GREEDY, max_new_tokens=0))])
