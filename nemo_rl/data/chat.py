"""Conversations to token ids, by the chat template of the tokenizer."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from nemo_rl.data.types import Message
from nemo_rl.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BatchEncoding, PreTrainedTokenizerBase

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """What surrounds a problem before it becomes a prompt.

    Attributes:
        prompt: template of the user's message; its `{}` is filled with the problem, other braces are left alone.
        system_prompt: system message to begin with; None leaves that to the conversation and the chat template.
        examples: worked examples as chat turns, put before the problem.

    Raises:
        DataError: the template has not exactly one `{}`.
    """

    prompt: str = "{}"
    system_prompt: str | None = None
    examples: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a template that would lose or repeat the problem."""
        if (places := self.prompt.count("{}")) != 1:
            raise DataError(
                f"the prompt template {self.prompt!r} has {places} places '{{}}' for the problem; give it one"
            )

    def apply(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Wrap the last message of a conversation, and put system prompt and examples before the conversation.

        Raises:
            DataError: the conversation is empty, or brings a system message of its own beside `system_prompt`.
        """
        if not messages:
            raise DataError("a task has no message to answer; every record needs at least one")
        has_system = messages[0]["role"] == "system"
        if has_system and self.system_prompt is not None:
            raise DataError("a task brings its own system message and a system prompt is set; drop one of them")
        system: list[Message] = (
            [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        )
        head, turns, last = messages[:has_system], messages[has_system:-1], messages[-1]
        wrapped = Message(role=last["role"], content=self.prompt.replace("{}", last["content"]))
        return (*system, *head, *self.examples, *turns, wrapped)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Tensor:
    """Tokenize a conversation up to the point where the policy speaks.

    Returns:
        int64 [P], ending with the template's generation prompt.
    """
    return _tokenize(tokenizer, _render(tokenizer, messages, add_generation_prompt=True))[0]


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], roles: Collection[str] = frozenset({"assistant"})
) -> tuple[Tensor, Tensor]:
    """Tokenize a whole conversation and mark what these roles said, the token that ends the turn included.

    A template with `{% generation %}` markers says itself which tokens are the assistant's. For other templates and
    roles each message is the text that it adds to the rendered conversation before it; the header that the template
    writes as a generation prompt is not part of it.

    Returns:
        `token_ids` int64 [T] and `loss_mask` bool [T].

    Raises:
        DataError: the template rewrites earlier messages when later ones follow, so the difference tells nothing.
    """
    text = _render(tokenizer, messages)
    token_ids, offsets = _tokenize(tokenizer, text)
    template = tokenizer.get_chat_template()
    if set(roles) == {"assistant"} and _GENERATION_MARKER.search(template):
        marked = tokenizer.apply_chat_template(
            _as_dicts(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return token_ids, torch.tensor(cast("BatchEncoding", marked)["assistant_masks"], dtype=torch.bool)
    loss_mask = torch.zeros(len(token_ids), dtype=torch.bool)
    for position, message in enumerate(messages):
        if message["role"] in roles:
            start, stop = _span(tokenizer, messages, position, text)
            loss_mask |= (offsets[:, 0] < stop) & (offsets[:, 1] > start)
    return token_ids, loss_mask


def _span(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], position: int, text: str) -> tuple[int, int]:
    """Where in the rendered conversation this message stands, without header and without whitespace after its end."""
    before, message = messages[:position], messages[position]
    is_answer = message["role"] == "assistant" and position > 0
    header = _render(tokenizer, before, add_generation_prompt=is_answer) if before else ""
    through = _render(tokenizer, messages[: position + 1])
    if not through.startswith(header) or not text.startswith(through):
        raise DataError(
            f"the chat template writes message {position} ({message['role']}) differently when messages are added, so "
            "its tokens cannot be told apart; use a template with {% generation %} around the assistant's words"
        )
    # Only an answer has a generation prompt to tell its header by; elsewhere the words themselves are looked for.
    start = len(header) if is_answer else through.rfind(message["content"].strip(), len(header))
    return max(start, len(header)), len(through.rstrip())


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    """Apply the chat template, as text."""
    if tokenizer.chat_template is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; set policy.tokenizer.chat_template"
        )
    return cast(
        "str",
        tokenizer.apply_chat_template(_as_dicts(messages), tokenize=False, add_generation_prompt=add_generation_prompt),
    )


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return cast("list[dict[str, str]]", list(messages))


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[Tensor, Tensor]:
    """Token ids int64 [T] of rendered text, and the characters of each, int64 [T, 2]."""
    if not tokenizer.is_fast:
        raise DataError(f"the tokenizer {tokenizer.name_or_path!r} keeps no character offsets; use a fast tokenizer")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return torch.tensor(encoded["input_ids"]), torch.tensor(encoded["offset_mapping"]).view(-1, 2)
