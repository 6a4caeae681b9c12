"""Data sets whose items have words of their own around them, instead of those that hold for the whole run."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

from nemo_rl.config.schema.sources import PromptedConfig
from nemo_rl.data.datasets.records import Reader, Record
from nemo_rl.data.datasets.streams import ItemStream, Source
from nemo_rl.data.processors import read_prompt_format
from nemo_rl.data.types import Chat, ChatPair, ItemDataset, Task


def prompted[Item: (Task, Chat, ChatPair)](source: Source[Item], spec: PromptedConfig) -> Source[Item]:
    """Give the items the template and the system prompt of their data set's description; its items' own win.

    Raises:
        DataError: a prompt file cannot be read, or the template has not exactly one place for the problem.
    """
    if spec.prompt is spec.prompt_file is spec.system_prompt_file is None:
        return source
    form = read_prompt_format(spec.prompt, spec.prompt_file, spec.system_prompt_file)
    template = None if spec.prompt is spec.prompt_file is None else form.prompt
    if isinstance(source, ItemStream):
        return replace(source, reader=_PromptedReader(source.reader, template, form.system_prompt))
    return Prompted(source, template, form.system_prompt)


@dataclass(frozen=True, slots=True)
class Prompted[Item: (Task, Chat, ChatPair)]:
    """The items of a data set with a template and a system prompt."""

    dataset: ItemDataset[Item]
    template: str | None
    system_prompt: str | None

    def __len__(self) -> int:
        """Number of items."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item:
        """Item `index`."""
        return _with_prompts(self.dataset[index], self.template, self.system_prompt)

    @property
    def fingerprint(self) -> str:
        """Hash of the data set and of the words."""
        content = repr((self.dataset.fingerprint, self.template, self.system_prompt))
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _PromptedReader[Item: (Task, Chat, ChatPair)]:
    """Reads items and gives them a template and a system prompt."""

    reader: Reader[Item]
    template: str | None
    system_prompt: str | None

    def read(self, record: Record, index: int, where: str) -> Item:
        return _with_prompts(self.reader.read(record, index, where), self.template, self.system_prompt)


def _with_prompts[Item: (Task, Chat, ChatPair)](item: Item, template: str | None, system_prompt: str | None) -> Item:
    own: dict[str, Any] = {
        "template": item.template if item.template is not None else template,
        "system_prompt": item.system_prompt if item.system_prompt is not None else system_prompt,
    }
    return replace(item, **own)
