"""The worker of a reward model: plain Transformers' scores, whatever else is in the call, and what it cannot score."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import nemo_rl.workers.reward_model as worker_module
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.types import Message
from nemo_rl.errors import ModelError
from nemo_rl.training.step import score_tokens
from nemo_rl.workers.reward_model import RewardModelWorker
from tiny_run import make_tiny_reward_model


def conversation(question: str, answer: str) -> list[Message]:
    return [Message(role="user", content=question), Message(role="assistant", content=answer)]


CONVERSATIONS = [conversation("1 + 1?", answer) for answer in ("2", "3, I think", "no")] + [conversation("Why?", "2")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_reward_model(tmp_path_factory.mktemp("models") / "judge"))


def worker(model: str, **settings: Any) -> RewardModelWorker:
    return RewardModelWorker(model, tokenizer=model, precision="float32", device="cpu", **settings)


def plain_score(model: str, messages: Sequence[Message]) -> float:
    classifier = AutoModelForSequenceClassification.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer.apply_chat_template(list(messages), tokenize=False)
    with torch.no_grad():
        return float(classifier(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits)


@pytest.mark.parametrize("max_batch_tokens", [8192, 40])
def test_scores_are_those_of_plain_transformers(model: str, max_batch_tokens: int) -> None:
    scores = worker(model, max_batch_tokens=max_batch_tokens).score(CONVERSATIONS)
    assert scores == pytest.approx([plain_score(model, messages) for messages in CONVERSATIONS], rel=1e-5, abs=1e-6)
    assert len(set(scores)) == 4


def test_answers_to_one_prompt_are_a_group(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TokenBatch] = []

    def score(scorer: Any, batch: TokenBatch, **settings: Any) -> torch.Tensor:
        seen.append(batch)
        return score_tokens(scorer, batch, **settings)

    monkeypatch.setattr(worker_module, "score_tokens", score)
    worker(model).score(CONVERSATIONS)
    assert [batch.group_ids.tolist() for batch in seen] == [[0, 0, 0, 1]]


def test_a_conversation_that_cannot_be_scored_says_why_and_harms_no_other(model: str) -> None:
    judge = worker(model, max_model_len=50)
    long = conversation("1 + 1?", "two " * 30)
    good, why = judge.score([CONVERSATIONS[0], long])
    assert good == pytest.approx(plain_score(model, CONVERSATIONS[0]), rel=1e-5)
    assert isinstance(why, str) and "tokens for the reward model and max_model_len is 50" in why
    assert len(judge.score([long])) == 1
    strict = worker(model, chat_template="{{ raise_exception('no system message') }}")
    assert "the chat template cannot write" in str(strict.score(CONVERSATIONS[:1])[0])


def test_a_conversation_of_more_tokens_than_positions_is_refused(model: str) -> None:
    (why,) = worker(model).score([conversation("?", "two " * 3000)])
    assert "max_model_len is 2048" in str(why)


def test_a_model_that_never_learnt_to_score_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="has no trained head, so every answer would get the same reward"):
        worker(str(tiny_llama))
