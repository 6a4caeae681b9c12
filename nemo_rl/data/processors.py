"""Tasks as people write them, made ready for the sampler."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from nemo_rl.config.templates import prompt_text
from nemo_rl.data.chat import PromptFormat, check_readable, encode_prompt
from nemo_rl.data.types import Task, TooLong
from nemo_rl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TaskProcessor:
    """Wraps the problem, applies the chat template and holds the prompt to a limit.

    Attributes:
        tokenizer: whose chat template is applied.
        prompt_format: prompt template, system prompt and worked examples.
        max_input_length: the most tokens a prompt may have; None sets no limit.
        too_long: what happens to a longer prompt: `error` stops, all else passes over the task.
    """

    tokenizer: PreTrainedTokenizerBase
    prompt_format: PromptFormat = field(default_factory=PromptFormat)
    max_input_length: int | None = None
    too_long: TooLong = "error"

    def __call__(self, task: Task) -> Task | None:
        """Give the task its final messages and its `token_ids`; None for a prompt that is to be skipped.

        Raises:
            DataError: the prompt is too long and `too_long` is `error`, or the task shows images.
        """
        check_readable(task.images, f"task {task.index}")
        messages = self.prompt_format.with_own(task.template, task.system_prompt).apply(task.messages)
        token_ids = encode_prompt(self.tokenizer, messages)
        if self.max_input_length is not None and len(token_ids) > self.max_input_length:
            if self.too_long != "error":
                return None
            raise DataError(
                f"the prompt of task {task.index} has {len(token_ids)} tokens and data.max_input_seq_length is "
                f"{self.max_input_length}; raise it, or set data.too_long=skip to leave such tasks out"
            )
        return replace(task, messages=messages, token_ids=token_ids)

    def length(self, task: Task) -> int:
        """Tokens of the prompt, however many."""
        messages = self.prompt_format.with_own(task.template, task.system_prompt).apply(task.messages)
        return len(encode_prompt(self.tokenizer, messages))


def read_prompt_format(
    prompt: str | None, prompt_file: str | None, system_prompt_file: str | None, *, default: str = "{}"
) -> PromptFormat:
    """Build the prompt format of a `data` section; `prompt` wins over `prompt_file`, and either over `default`.

    Raises:
        DataError: a file cannot be read, or the template has not exactly one place for the problem.
    """
    template = prompt or prompt_text(prompt_file, "prompt_file") or default
    return PromptFormat(prompt=template, system_prompt=prompt_text(system_prompt_file, "system_prompt_file"))
