"""`RewardModelWorker`: a trained reward model that only scores, in a process of its own or in this one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.scored import ScoreEncoder
from nemo_rl.data.types import Example, Message
from nemo_rl.errors import DataError, ModelError
from nemo_rl.models.load import load_scalar_model, load_tokenizer, quiet_libraries
from nemo_rl.models.precision import precision_of
from nemo_rl.models.scalar_model import ScalarModel
from nemo_rl.training.pytorch.loading import choose_device
from nemo_rl.training.step import Scorer, score_tokens

type Conversation = Sequence[Message]


class RewardModelWorker:
    """Scores conversations; a plain class that an executor starts in some process."""

    def __init__(
        self,
        source: str,
        *,
        tokenizer: str,
        chat_template: str | None = None,
        max_model_len: int | None = None,
        max_batch_tokens: int = 8192,
        precision: Literal["auto", "float32", "bfloat16"] = "bfloat16",
        device: Literal["auto", "cpu", "cuda"] = "auto",
        num_threads: int | None = None,
    ) -> None:
        """Load the model from `source` (a folder or a hub name).

        Args:
            source: what `resolve_model` returned.
            tokenizer: folder or hub name.
            chat_template: replaces the tokenizer's own.
            max_model_len: longest conversation in tokens; None is what the model has positions for.
            max_batch_tokens: tokens of one forward pass as computed.
            precision: number format of the weights and of the arithmetic; see `precision_of`.
            device: where the model is put; `auto` is the GPU when there is one.
            num_threads: CPU threads; None is PyTorch's own choice.

        Raises:
            ModelError: the model or the tokenizer cannot be loaded, or the model has never learnt to score.
        """
        quiet_libraries()
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        place = choose_device(device)
        module, config = load_scalar_model(source, dtype=precision_of(precision, place).weights, device=place)
        text = config.get_text_config()
        self._encoder = ScoreEncoder(load_tokenizer(tokenizer, chat_template), text.pad_token_id)
        self._max_model_len: int | None = max_model_len or getattr(text, "max_position_embeddings", None)
        self._max_batch_tokens = max_batch_tokens
        model = ScalarModel.wrap(module.eval())
        if not model.score.weight.any():
            raise ModelError(
                f"{source} has no trained head, so every answer would get the same reward; train it with `nemo-rl rm`, "
                "or name the model folder that such a run has exported"
            )
        self._scorer = Scorer(model)

    def score(self, conversations: Sequence[Conversation]) -> list[float | str]:
        """Score whole conversations; for one that cannot be, say why in a sentence instead."""
        encoded = [self._encode(conversation) for conversation in conversations]
        places = [place for place, example in enumerate(encoded) if isinstance(example, Example)]
        places.sort(key=lambda place: str(conversations[place][:-1]))  # answers to one prompt share it
        answers: list[float | str] = [example if isinstance(example, str) else 0.0 for example in encoded]
        if places:
            examples = (encoded[place] for place in places)
            batch = TokenBatch.from_examples([example for example in examples if isinstance(example, Example)])
            batch = replace(batch, group_ids=_groups([conversations[place] for place in places]))
            values = score_tokens(self._scorer, batch, max_tokens=self._max_batch_tokens, reads="values")
            for place, value in zip(places, values[batch.cu_seqlens[1:] - 1].tolist(), strict=True):
                answers[place] = value
        return answers

    def _encode(self, conversation: Conversation) -> Example | str:
        try:
            example = self._encoder.encode(conversation)
        except DataError as error:
            return str(error)
        length = len(example.token_ids) - 1
        if self._max_model_len is not None and length > self._max_model_len:
            return (
                f"the conversation has {length} tokens for the reward model and max_model_len is {self._max_model_len}"
            )
        return example


def _groups(conversations: Sequence[Conversation]) -> Tensor:
    """Number the prompts of sorted conversations: int64 [B]."""
    prompts = [str(conversation[:-1]) for conversation in conversations]
    number = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    return torch.tensor([number[prompt] for prompt in prompts])
