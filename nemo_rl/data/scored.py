"""Whole conversations of which a reward model gives one score each, made ready for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from nemo_rl.data.chat import PromptFormat, check_spoken, encode_whole
from nemo_rl.data.examples import as_preference, fits
from nemo_rl.data.types import ChatPair, Example, Message, Preference, Tool, TooLong
from nemo_rl.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_PLACEHOLDER = 0


@dataclass(frozen=True, slots=True)
class ScoreEncoder:
    """Applies the chat template to conversations and pairs, and marks where their score is read.

    A score is the value at the last token that is no padding, which is the one that Transformers' classifiers read.
    Behind it stands a placeholder, the one loss token of the sequence: its value is the one *before* it. Nothing
    predicts from it, so it never enters the model.

    Attributes:
        tokenizer: whose chat template is applied.
        pad_token_id: of the model; conversations lose it at their end. None keeps every token.
        max_length: the most tokens a sequence may have; None sets no limit.
        too_long: what happens to a longer one: `error` stops, anything else passes over the record.
        prompt_format: put around the prompts of pairs.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_token_id: int | None
    max_length: int | None = None
    too_long: TooLong = "error"
    prompt_format: PromptFormat = field(default_factory=PromptFormat)

    def example(self, messages: Sequence[Message], tools: Sequence[Tool] = (), index: int = 0) -> Example | None:
        """Encode a conversation; None for one to be skipped.

        Raises:
            DataError: the template cannot write it or writes nothing, or it is too long and that is an error.
        """
        try:
            token_ids = self._without_padding(encode_whole(self.tokenizer, messages, tools))
        except DataError as error:
            raise DataError(f"record {index}: {error}") from error
        if not fits(token_ids, self.max_length, self.too_long, index):
            return None
        token_ids = torch.nn.functional.pad(token_ids, (0, 1), value=_PLACEHOLDER)
        return Example(token_ids, torch.arange(len(token_ids)) == len(token_ids) - 1, index)

    def preference(self, pair: ChatPair) -> Preference | None:
        """Encode both conversations of a pair; None for a pair of which one is to be skipped.

        Raises:
            DataError: an answer is empty, both are the same tokens, the template cannot write them, or one is too long
                and that is an error.
        """
        spoken = [message for message in (*pair.chosen, *pair.rejected) if message["role"] == "assistant"]
        check_spoken(spoken, f"record {pair.index}")
        prompt = self.prompt_format.with_own(pair.template, pair.system_prompt).around(pair.prompt)
        chosen, rejected = (
            self.example((*prompt, *answer), pair.tools, pair.index) for answer in (pair.chosen, pair.rejected)
        )
        return as_preference(chosen, rejected, pair)

    def preference_length(self, pair: ChatPair) -> int:
        """Tokens of the longer conversation of a pair, however many."""
        made = replace(self, max_length=None).preference(pair)
        return 0 if made is None else max(len(made.chosen.token_ids), len(made.rejected.token_ids)) - 1

    @property
    def about(self) -> tuple[object, ...]:
        """What decides the lengths besides the records and the tokenizer."""
        return ("score", self.prompt_format)

    def _without_padding(self, token_ids: Tensor) -> Tensor:
        real = torch.arange(len(token_ids)) if self.pad_token_id is None else (token_ids != self.pad_token_id).nonzero()
        if not len(real):
            raise DataError("the chat template writes nothing that a score could be read from; choose another one")
        return token_ids[: int(real[-1]) + 1]
