"""What a teacher says is what plain Transformers says of each sequence alone, however sequences are laid out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_rl.config.schema.policy import ModelConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.workers.teacher import TeacherWorker
from tiny_batches import rollout_batch
from tiny_models import tiny_model

LAYOUTS: list[dict[str, Any]] = [{}, {"logprob_mb_tokens": 30, "logprob_chunk_size": 3}, {"share_prefixes": False}]


def worker(model: PreTrainedModel, folder: Path, *, temperature: float, vocab_size: int | None, **changes: Any):
    model.save_pretrained(folder)
    config = ModelConfig(model_name=str(folder), precision="float32", device="cpu", num_threads=1, **changes)
    return TeacherWorker(config, str(folder), temperature=temperature, vocab_size=vocab_size)


def plain(model: PreTrainedModel, batch: TokenBatch, *, temperature: float, vocab_size: int | None) -> Tensor:
    """The distribution in place of every loss token, [M, V]."""
    lengths, mask, found = batch.lengths.tolist(), batch.token_columns["loss_mask"], []
    for tokens, asked in zip(batch.token_ids.split(lengths), mask.split(lengths), strict=True):
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, asked.nonzero()[:, 0] - 1].float()
        found.append((logits[:, :vocab_size] / temperature).log_softmax(-1))
    return torch.cat(found)


@pytest.mark.parametrize("changes", LAYOUTS)
@pytest.mark.parametrize(("temperature", "vocab_size"), [(1.0, None), (0.7, 100)])
def test_top_k_is_that_of_plain_transformers(
    changes: dict[str, Any], temperature: float, vocab_size: int | None, tmp_path: Path
) -> None:
    model = tiny_model()
    batch = rollout_batch(model)
    mask = batch.token_columns["loss_mask"]
    teacher = worker(model, tmp_path, temperature=temperature, vocab_size=vocab_size, **changes)
    logprobs, ids = teacher.topk_logprobs(batch, 5)
    top = plain(model, batch, temperature=temperature, vocab_size=vocab_size).topk(5)
    torch.testing.assert_close(logprobs[mask], top.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(ids[mask].long(), top.indices)
    assert (logprobs.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert not logprobs[~mask].any() and not ids[~mask].any()


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # the second one caps its logits
@pytest.mark.parametrize("changes", LAYOUTS)
def test_hidden_states_and_head_make_the_whole_distribution(
    changes: dict[str, Any], family: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    batch = rollout_batch(model)
    mask = batch.token_columns["loss_mask"]
    teacher = worker(model, tmp_path, temperature=1.0, vocab_size=None, **changes)
    hidden, head = teacher.last_hidden(batch), teacher.head()
    assert hidden.shape == (batch.num_tokens, 32) and not hidden[~mask].any()
    assert not head.weight.requires_grad
    model.set_attn_implementation("eager")  # Transformers leaves the caps of Gemma 2 out of its faster ones
    whole = plain(model, batch, temperature=1.0, vocab_size=None)
    torch.testing.assert_close(head(hidden[mask]).log_softmax(-1), whole, rtol=1e-5, atol=1e-5)
