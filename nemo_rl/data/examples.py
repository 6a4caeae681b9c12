"""Conversations and pairs of answers, made ready for training: text to `Example` and `Preference`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from nemo_rl.data.chat import PromptFormat, check_readable, check_spoken, encode_conversation
from nemo_rl.data.types import Chat, ChatPair, Example, Message, Preference, Tool, TooLong
from nemo_rl.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ChatEncoder:
    """Applies the chat template to conversations and pairs, masks what is to be learnt and holds them to a limit.

    Attributes:
        tokenizer: whose chat template is applied.
        roles: whose words of a conversation are learnt; of a pair it is always the two answers.
        max_length: the most tokens a sequence may have; None sets no limit.
        too_long: what happens to a longer one: `error` stops, all else passes over the record.
        prompt_format: what surrounds the first words of the user, where a record does not say.
    """

    tokenizer: PreTrainedTokenizerBase
    roles: frozenset[str] = frozenset({"assistant"})
    max_length: int | None = None
    too_long: TooLong = "error"
    prompt_format: PromptFormat = field(default_factory=PromptFormat)

    def example(self, chat: Chat) -> Example | None:
        """Encode a conversation; of a judged one, only the last message is learnt. None for one to be skipped.

        Raises:
            DataError: it has nothing to learn, shows images, the template cannot write it, or it is too long and that
                is an error.
        """
        check_readable(chat.images, f"record {chat.index}")
        messages = self.prompt_format.with_own(chat.template, chat.system_prompt).around(chat.messages)
        roles, num_given = (self.roles, 0) if chat.desirable is None else (_ASSISTANT, len(messages) - 1)
        example = self._encode(messages, roles, chat.tools, num_given, chat.index)
        return example and replace(example, desirable=chat.desirable)

    def judged(self, chat: Chat) -> Example | None:
        """Encode a judged conversation; see `example`.

        Raises:
            DataError: besides, nobody judged it.
        """
        if chat.desirable is None:
            raise DataError(f"record {chat.index} is not judged good or bad, which kto needs; set its `desirable`")
        return self.example(chat)

    def preference(self, pair: ChatPair) -> Preference | None:
        """Encode both conversations of a pair; None for a pair of which one is to be skipped.

        Raises:
            DataError: an answer is empty, both are the same tokens, the template cannot write them, or one is too long
                and that is an error.
        """
        prompt = self.prompt_format.with_own(pair.template, pair.system_prompt).around(pair.prompt)
        chosen, rejected = (
            self._encode((*prompt, *answer), _ASSISTANT, pair.tools, len(prompt), pair.index)
            for answer in (pair.chosen, pair.rejected)
        )
        return as_preference(chosen, rejected, pair)

    def example_length(self, chat: Chat) -> int:
        """Tokens of a conversation, however many."""
        made = replace(self, max_length=None).example(chat)
        return 0 if made is None else len(made.token_ids)

    def preference_length(self, pair: ChatPair) -> int:
        """Tokens of the longer conversation of a pair, however many."""
        made = replace(self, max_length=None).preference(pair)
        return 0 if made is None else max(len(made.chosen.token_ids), len(made.rejected.token_ids))

    @property
    def about(self) -> tuple[object, ...]:
        """What decides the lengths besides the records and the tokenizer."""
        return (self.prompt_format,)

    def _encode(
        self, messages: Sequence[Message], roles: frozenset[str], tools: Sequence[Tool], num_given: int, index: int
    ) -> Example | None:
        check_spoken([message for message in messages[num_given:] if message["role"] in roles], f"record {index}")
        try:
            token_ids, loss_mask = encode_conversation(
                self.tokenizer, messages, roles, tools=tools, num_given=num_given
            )
        except DataError as error:
            raise DataError(f"record {index}: {error}") from error
        if not fits(token_ids, self.max_length, self.too_long, index):
            return None
        loss_mask[:1] = False
        if not loss_mask.any():
            raise DataError(
                f"record {index} has no words of {', '.join(sorted(roles))} to learn; remove it, or choose other roles"
            )
        return Example(token_ids, loss_mask, index)


_ASSISTANT = frozenset({"assistant"})


def fits(token_ids: Tensor, max_length: int | None, too_long: TooLong, index: int) -> bool:
    """Whether the sequence of record `index` keeps to the limit, if there is one.

    Raises:
        DataError: it does not, and `too_long` makes that an error.
    """
    if max_length is None or len(token_ids) <= max_length:
        return True
    if too_long != "error":
        return False
    raise DataError(
        f"record {index} has {len(token_ids)} tokens and the limit is {max_length}; raise "
        "policy.max_total_sequence_length, or set data.too_long=skip to leave such records out"
    )


def as_preference(chosen: Example | None, rejected: Example | None, pair: ChatPair) -> Preference | None:
    """Join the encoded conversations of a pair; None for a pair of which one is to be skipped.

    Raises:
        DataError: both are the same tokens.
    """
    if chosen is None or rejected is None:
        return None
    if torch.equal(chosen.token_ids, rejected.token_ids):
        raise DataError(
            f"record {pair.index} has two answers that are the same tokens, so neither can be preferred; remove it"
        )
    return Preference(chosen, rejected, pair.margin, pair.index)


def mismatched(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Give every prompt the answer of the next example: what KTO estimates its reference point from.

    The answer of an example is all from its first loss token on, here cut off behind `max_length` tokens.

    Raises:
        DataError: there are fewer than two examples, so no other answer.
    """
    if len(examples) < 2:
        raise DataError("KTO compares each prompt with another one's answer; use at least 2 examples in a batch")
    starts = [int(example.loss_mask.int().argmax()) for example in examples]
    following = [*examples[1:], examples[0]]
    return [
        Example(
            token_ids=torch.cat([example.token_ids[:start], other.token_ids[other_start:]])[:max_length],
            loss_mask=torch.cat([example.loss_mask[:start], other.loss_mask[other_start:]])[:max_length],
            index=example.index,
            desirable=example.desirable,
        )
        for example, start, other, other_start in zip(
            examples, starts, following, [*starts[1:], starts[0]], strict=True
        )
    ]
