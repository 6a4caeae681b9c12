"""What the descriptions of data sets have in common: the words around a record, who reads it, and how much is held."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from nemo_rl.config.schema.base import ImportPath, NonNegativeInt, PositiveInt, Section, conflict
from nemo_rl.config.templates import split_template
from nemo_rl.errors import DataError


def template_fault(prompt: str | None) -> PydanticCustomError | None:
    """Refuse a template that would lose or repeat the problem."""
    try:
        split_template("{}" if prompt is None else prompt)
    except DataError as error:
        return conflict(str(error), "prompt")
    return None


class PromptedConfig(Section):
    """The words around a problem."""

    prompt: str | None = None
    """Template of the user message, `{}` stands for the problem; None leaves the problem as it is, or in a data set as
    `data.prompt` says."""

    prompt_file: str | None = None
    """A file that holds the template instead of `prompt`."""

    system_prompt_file: str | None = None
    """A file that holds the system message; None uses the chat template's own, or in a data set that of
    `data.system_prompt_file`."""

    @model_validator(mode="after")
    def _one_template(self) -> Self:
        if self.prompt is not None and self.prompt_file is not None:
            raise conflict("prompt and prompt_file are both set: keep one", "prompt", "prompt_file")
        if fault := template_fault(self.prompt):
            raise fault
        return self


class SourceConfig(PromptedConfig):
    """A data set made of records."""

    processor: ImportPath | None = None
    """A callable of yours that turns a record (a mapping) into a `Task`, or into a `Chat` or `ChatPair` where answers
    are given, instead of the columns: `package.module:name` or `path/to/file.py:name`."""

    streaming: bool = False
    """Read the records as they are needed and hold none but a buffer: for data that do not fit the memory or the disk.
    """

    buffer_size: PositiveInt = 10_000
    """Records that a streamed data set holds to shuffle them."""

    malformed: Literal["error", "skip"] = "error"
    """What happens to records that cannot be read: `error` stops before the first step and names one, `skip` leaves
    them out and says how many."""

    @model_validator(mode="after")
    def _held_records_are_looked_through(self) -> Self:
        if self.streaming and self.malformed == "skip":
            raise conflict(
                "a streamed data set cannot be looked through before the run: set malformed to error", "malformed"
            )
        return self


class CustomDataConfig(PromptedConfig):
    """A data set of your own, by import path; each of its tasks names its environment."""

    name: Literal["custom"]
    """Kind of data set."""

    path: ImportPath
    """A callable that returns a sequence of `Task`, or of `Chat` or `ChatPair` where answers are given, as
    `package.module:name` or `path/to/file.py:name`."""

    kwargs: dict[str, JsonValue] = Field(default_factory=dict[str, Any])
    """Keyword arguments of the callable."""


class LoadingConfig(PromptedConfig):
    """How a run draws from its data."""

    split_validation_size: Annotated[float, Field(ge=0)] = 0.0
    """Keep so many records of `train` (below 1: this share of them) for validation instead; 0 keeps none."""

    shuffle: bool = True
    """Draw a new order in every epoch."""

    num_workers: NonNegativeInt = 0
    """Processes that prepare data; 0 does it in the run's own process."""

    too_long: Literal["error", "skip", "filter"] = "error"
    """What happens to a record above the limit: `error` stops, `skip` passes over it and counts it, `filter` measures
    the training data before the first step (once: the lengths are kept) and leaves the longer ones out."""


def source_conflict(
    data: LoadingConfig, train: tuple[Section, ...], validation: tuple[Section, ...] | None
) -> PydanticCustomError | None:
    """Find what in a section `data` excludes each other; `train` and `validation` are the parts of the data sets."""
    streamed = any(isinstance(part, SourceConfig) and part.streaming for part in train)
    if data.split_validation_size and validation is not None:
        keys = ("validation", "split_validation_size")
        return conflict("validation and split_validation_size are both set: keep one", *keys)
    if streamed and data.split_validation_size:
        reason = "a streamed data set has no size to take split_validation_size from: name validation data instead"
        return conflict(reason, "split_validation_size")
    if streamed and data.too_long == "filter":
        return conflict("a streamed data set cannot be measured before the run: use too_long = skip", "too_long")
    for name, parts in (("train", train), ("validation", validation or ())):
        if len(parts) > 1 and any(isinstance(part, SourceConfig) and part.streaming for part in parts):
            reason = f"{name} mixes a streamed data set, whose length is unknown, with others: stream it alone"
            return conflict(reason, name)
    return None
