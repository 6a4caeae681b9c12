"""Conversations to token ids, by the chat template of the tokenizer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from jinja2 import TemplateError

from nemo_rl.config.templates import split_template
from nemo_rl.data.types import Message, Tool
from nemo_rl.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BatchEncoding, PreTrainedTokenizerBase

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\b")
_PLACEHOLDER = re.compile(r"\[:(\d+):\]")
_FIRST_WORD = re.compile(r"\s*\S*")
_ASSISTANT = frozenset({"assistant"})


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """What surrounds a problem before it becomes a prompt.

    Attributes:
        prompt: template of the user's message; its `{}` is filled with the problem. Other braces are left alone; if
            `{{` is among them, `{{` and `}}` stand for single ones (see `split_template`).
        system_prompt: system message to begin with; None leaves that to the conversation and the chat template.
        examples: worked examples as chat turns, put before the problem.

    Raises:
        DataError: the template has not exactly one place for the problem.
    """

    prompt: str = "{}"
    system_prompt: str | None = None
    examples: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a template that would lose or repeat the problem."""
        split_template(self.prompt)

    def with_own(self, template: str | None, system_prompt: str | None) -> PromptFormat:
        """Put what an item says about itself in the place of what holds for all."""
        if template is None and system_prompt is None:
            return self
        prompt, system = template or self.prompt, self.system_prompt if system_prompt is None else system_prompt
        return PromptFormat(prompt, system, self.examples)

    def around(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Wrap the first words of the user in a conversation with answers; what follows them stays as it is.

        Raises:
            DataError: the conversation has no words of the user, or a system message of its own beside `system_prompt`.
        """
        if self == PromptFormat():
            return tuple(messages)
        asked = next((place for place, message in enumerate(messages) if message["role"] == "user"), None)
        if asked is None:
            raise DataError("a conversation has no user message for the prompt to be put around; remove the record")
        return (*self.apply(messages[: asked + 1]), *messages[asked + 1 :])

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
        wrapped = Message(role=last["role"], content=last["content"].join(split_template(self.prompt)))
        return (*system, *head, *self.examples, *turns, wrapped)


def check_spoken(messages: Sequence[Message], where: str) -> None:
    """Refuse a message without words or tool calls: there is nothing to learn from it.

    Raises:
        DataError: it begins with `where`.
    """
    for message in messages:
        if not message["content"].strip() and not message.get("tool_calls"):
            raise DataError(f"{where} has an empty {message['role']} message; remove the record, or fill it in")


def check_readable(images: Collection[object], where: str) -> None:
    """Refuse images: the models that are trained here read text.

    Raises:
        DataError: there are images; it begins with `where`.
    """
    if images:
        raise DataError(f"{where} shows {len(images)} images, and the model is trained on text alone; use data of text")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Tensor:
    """Tokenize a conversation up to the point where the policy speaks.

    Returns:
        int64 [P], ending with the template's generation prompt.
    """
    return _tokenize(tokenizer, _render(tokenizer, messages, add_generation_prompt=True))[0]


def encode_whole(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Tensor:
    """Tokenize a whole conversation of which nothing has to be told apart: int64 [T].

    Raises:
        DataError: the template cannot write the conversation.
    """
    return _tokenize(tokenizer, _render(tokenizer, messages, tools))[0]


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    roles: Collection[str] = _ASSISTANT,
    *,
    tools: Sequence[Tool] = (),
    num_given: int = 0,
) -> tuple[Tensor, Tensor]:
    """Tokenize a whole conversation and mark what these roles said, the token that ends the turn included.

    A template with `{% generation %}` markers says itself which tokens are the assistant's. For other templates and
    roles the words are looked up in the rendered conversation, see `_spans`; headers are nobody's.

    Args:
        tokenizer: whose chat template is applied.
        messages: the conversation.
        roles: whose words are marked.
        tools: descriptions of the tools on offer, for templates that write them.
        num_given: messages at the beginning that are never marked, e.g. the prompt that two answers share.

    Returns:
        `token_ids` int64 [T] and `loss_mask` bool [T].

    Raises:
        DataError: the template cannot write the conversation, or does not show who said what.
    """
    text = _render(tokenizer, messages, tools)
    token_ids, offsets = _tokenize(tokenizer, text)
    if frozenset(roles) == _ASSISTANT and _GENERATION_MARKER.search(_template(tokenizer, tools)):
        loss_mask = _marked_by_template(tokenizer, messages, tools)
        if num_given:
            loss_mask &= offsets[:, 0] >= len(_prefix(tokenizer, messages, num_given, tools, text))
        return token_ids, loss_mask
    loss_mask = torch.zeros(len(token_ids), dtype=torch.bool)
    wanted = [place for place, message in enumerate(messages) if place >= num_given and message["role"] in roles]
    for start, stop in _spans(tokenizer, messages, wanted, tools, text):
        loss_mask |= (offsets[:, 0] < stop) & (offsets[:, 1] > start)
    return token_ids, loss_mask


def _marked_by_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Tool]
) -> Tensor:
    """What the template's own generation markers enclose: bool [T]."""
    marked = tokenizer.apply_chat_template(
        _as_dicts(messages),
        tools=_or_none(tools),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return torch.tensor(cast("BatchEncoding", marked)["assistant_masks"], dtype=torch.bool)


def _spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    wanted: Sequence[int],
    tools: Sequence[Tool],
    text: str,
) -> Iterator[tuple[int, int]]:
    """Where in the rendered conversation the wanted messages stand, each with its end marker.

    The conversation is rendered once more with a placeholder for each message. What lies between placeholders is the
    template's, and if the words put back into the gaps give the conversation again, nothing is left to guess. A
    message that the template does more with than write it down (it tells reasoning from answer, or adds a tool call) is
    the text that it adds to the conversation before it.
    """
    words = _words(tokenizer, messages, tools, text)
    ends: dict[str, str] = {}
    for place in wanted:
        role = messages[place]["role"]
        if place in words:
            if role not in ends:
                ends[role] = _end_marker(tokenizer, messages[: place + 1], tools)
            start, stop = words[place]
            if text.startswith(ends[role], stop):
                yield start, stop + len(ends[role])
                continue
        start = len(_prefix(tokenizer, messages, place, tools, text))
        through = _render(tokenizer, messages[: place + 1], tools).rstrip()
        if role != "assistant" or not text.startswith(through) or len(through) <= start:
            raise _untold(place, role)
        yield start, len(through)


def _words(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Tool], text: str
) -> dict[int, tuple[int, int]]:
    """Where in `text` the words of each message stand, as far as placeholders show it.

    Raises:
        DataError: an answer follows other words without anything that tells them apart.
    """
    held = [
        _with_words(message, f"[:{place}:]") if message["content"] else message
        for place, message in enumerate(messages)
    ]
    pieces = _PLACEHOLDER.split(_render(tokenizer, held, tools))  # template, place, template, place, ... template
    found: dict[int, tuple[int, int]] = {}
    cursor = len(pieces[0])
    if not text.startswith(pieces[0]) or len(set(pieces[1::2])) < len(pieces[1::2]):
        return found
    for before, number, after in zip(pieces[::2], pieces[1::2], pieces[2::2], strict=False):
        place = int(number)
        content = messages[place]["content"]
        if messages[place]["role"] == "assistant" and found and not before.strip():
            raise DataError(
                f"the chat template writes message {place} (assistant) without any marker of who speaks; use a "
                "template that puts one before the assistant's words"
            )
        forms = (content, content.strip(), content.rstrip(), content.lstrip())
        said = next((form for form in forms if text.startswith(form + after, cursor)), None)
        if said is None:
            break
        found[place] = (cursor, cursor + len(said))
        cursor += len(said) + len(after)
    return found


def _end_marker(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
    """What the template writes after the last of these messages to end it, without whatever else ends the text."""
    held = [*messages[:-1], _with_words(messages[-1], "[:0:]")]
    after = _PLACEHOLDER.split(_render(tokenizer, held, tools))[-1]
    first_word = _FIRST_WORD.match(after)
    return first_word[0].rstrip() if first_word else ""


def _prefix(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], size: int, tools: Sequence[Tool], text: str
) -> str:
    """Render the first messages, and the header of an answer that follows them.

    Raises:
        DataError: the rendered conversation does not begin with it.
    """
    is_answer = size > 0 and messages[size]["role"] == "assistant"
    prefix = _render(tokenizer, messages[:size], tools, add_generation_prompt=is_answer) if size else ""
    if not text.startswith(prefix):
        raise _untold(size, messages[size]["role"])
    return prefix


def _untold(place: int, role: str) -> DataError:
    return DataError(
        f"the chat template writes message {place} ({role}) differently when messages are added, or not at "
        "all, so its tokens cannot be told apart; use a template with {% generation %} around the assistant's "
        "words, or make a record of its own for each answer"
    )


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Apply the chat template, as text."""
    _template(tokenizer, tools)
    try:
        rendered = tokenizer.apply_chat_template(
            _as_dicts(messages),
            tools=_or_none(tools),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the chat template cannot write a conversation of {roles} ({error}); correct the conversation or set "
            "policy.tokenizer.chat_template"
        ) from error
    return cast("str", rendered)


def _template(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool]) -> str:
    """The chat template for a conversation with these tools."""
    if tokenizer.chat_template is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; set policy.tokenizer.chat_template"
        )
    return tokenizer.get_chat_template(tools=_or_none(tools))


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return cast("list[dict[str, str]]", list(messages))


def _or_none(tools: Sequence[Tool]) -> list[Any] | None:
    """As Transformers wants them: templates ask whether there are `tools`."""
    return list(tools) or None


def _with_words(message: Message, words: str) -> Message:
    return cast("Message", {**message, "content": words})


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[Tensor, Tensor]:
    """Token ids int64 [T] of rendered text, and the characters of each, int64 [T, 2]."""
    if not tokenizer.is_fast:
        raise DataError(f"the tokenizer {tokenizer.name_or_path!r} keeps no character offsets; use a fast tokenizer")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return torch.tensor(encoded["input_ids"]), torch.tensor(encoded["offset_mapping"]).view(-1, 2)
