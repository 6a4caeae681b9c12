"""One batch with every kind of sharing, and a model run on it by plain Transformers and by us."""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.packing import Stream
from nemo_rl.models.attention import TreeAttention
from nemo_rl.models.causal_lm import CausalLM


def group_batch(vocabulary: int, *, seed: int = 0) -> TokenBatch:
    """Three groups of four answers; within the first an answer stands twice and two answers begin alike."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> Tensor:
        return torch.randint(3, vocabulary, (length,), generator=generator)

    system = draw(9)  # all prompts begin alike
    sequences, masks, groups = [], [], []
    for group, prompt_length in enumerate((5, 14, 21)):
        prompt = torch.cat([system, draw(prompt_length)])
        answers = [draw(length) for length in (3, 7, 12, 17)]
        if group == 0:
            answers[1] = answers[0]
            answers[3] = torch.cat([answers[2][:10], answers[3]])
        for answer in answers:
            sequences.append(torch.cat([prompt, answer]))
            masks.append(torch.cat([torch.zeros(len(prompt)), torch.ones(len(answer))]).bool())
            groups.append(group)
    lengths = torch.tensor([0] + [len(sequence) for sequence in sequences])
    return TokenBatch(torch.cat(sequences), lengths.cumsum(0), torch.tensor(groups), {"loss_mask": torch.cat(masks)})


def plain_logprobs(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Every sequence alone through plain Transformers: [M] in the order of the loss tokens."""
    found = []
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        tokens, mask = batch.token_ids[start:end], batch.token_columns["loss_mask"][start:end]
        logprobs = model(tokens[None]).logits[0].float().log_softmax(-1)
        found.append(logprobs[:-1].gather(-1, tokens[1:, None])[:, 0][mask[1:]])
    return torch.cat(found)


def stream_logprobs(model: CausalLM, stream: Stream, plan: TreeAttention) -> Tensor:
    head = model.token_head(temperature=1.0, chunk_size=16)
    hidden = model.hidden(stream.input_ids, stream.position_ids, plan)
    return head(hidden, model.head.weight, stream.predictor, stream.target, bias=model.head.bias)[0]


def both(model: PreTrainedModel) -> tuple[PreTrainedModel, CausalLM]:
    """The model as Transformers runs it by its plainest formula, and an equal one as we run it."""
    ours = CausalLM.wrap(copy.deepcopy(model))
    model.set_attn_implementation("eager")  # Transformers' sdpa knows neither soft caps nor sinks
    return model, ours


def assert_same(plain: PreTrainedModel, ours: CausalLM, batch: TokenBatch, stream: Stream) -> None:
    weights = torch.randn(len(stream.target), generator=torch.Generator().manual_seed(1))
    expected = plain_logprobs(plain, batch)
    got = stream_logprobs(ours, stream, TreeAttention(stream.tree))
    assert (got - expected).norm() <= 1e-5 * expected.norm()
    plain.zero_grad()
    ours.module.zero_grad()
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    differences, norms = [], []
    for (name, ours_parameter), parameter in zip(ours.module.named_parameters(), plain.parameters(), strict=True):
        assert ours_parameter.grad is not None and parameter.grad is not None, name
        difference, norm = (ours_parameter.grad - parameter.grad).norm(), parameter.grad.norm()
        assert difference <= 3e-5 * norm, f"{name}: {difference / norm:.1e}"
        differences.append(difference)
        norms.append(norm)
    assert torch.stack(differences).norm() <= 1e-5 * torch.stack(norms).norm()
