"""The sampling worker: no answer outgrows the longest sequence, and nothing of training is held."""

from pathlib import Path

import pytest
import torch

from nemo_rl.data.types import GenerationRequest, SamplingParams
from nemo_rl.errors import BackendError
from nemo_rl.workers.generation import GenerationWorker
from tiny_run import make_tiny_llama


def test_an_answer_ends_where_its_prompt_leaves_no_room(tmp_path: Path) -> None:
    folder = str(make_tiny_llama(tmp_path / "model"))
    worker = GenerationWorker(
        folder, tokenizer=folder, max_model_len=12, max_batch_size=4, precision="float32", device="cpu"
    )
    sampling = SamplingParams(max_new_tokens=100)
    prompts = [torch.arange(3, 3 + length) for length in (4, 11)]
    answers = worker.generate([GenerationRequest(prompt, sampling, seed) for seed, prompt in enumerate(prompts)])
    assert [len(answer.token_ids) for answer in answers] == [8, 1]
    assert {answer.stop_reason for answer in answers} == {"length"}
    assert worker.generation_metrics()["generation/sampled_tokens"].value == 9
    short = SamplingParams(max_new_tokens=2)
    assert len(worker.generate([GenerationRequest(prompts[0], short)])[0].token_ids) == 2
    with pytest.raises(BackendError, match="a prompt has 12 tokens and a sequence at most 12"):
        worker.generate([GenerationRequest(torch.arange(12), sampling)])
