"""Section `data` of algorithms that learn from given answers: conversations, judged answers, or pairs."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nemo_rl.config.schema.base import PositiveFloat, PositiveInt, Section, conflict
from nemo_rl.config.schema.data import ArithmeticDataConfig, BuiltinDataConfig, image_conflict
from nemo_rl.config.schema.formats import RecordFormat
from nemo_rl.config.schema.sources import CustomDataConfig, LoadingConfig, SourceConfig, source_conflict


class FormattedConfig(SourceConfig):
    """Records that are read as conversations or pairs."""

    format: RecordFormat | None = None
    """Which field holds what; None recognises the usual names (see docs/data.md)."""

    @model_validator(mode="after")
    def _one_reader(self) -> Self:
        if self.processor is not None and self.format is not None:
            raise conflict("the processor reads the records and leaves no use for format: drop one", "processor")
        return self


class LocalExamplesConfig(FormattedConfig):
    """A JSONL, JSON, CSV, Parquet or Arrow file."""

    name: Literal["local"]
    """Kind of data set."""

    path: str
    """The file."""


class HubExamplesConfig(FormattedConfig):
    """A data set of the Hugging Face hub, or a local folder laid out like one."""

    name: Literal["hub"]
    """Kind of data set."""

    path: str
    """Name on the hub, e.g. `trl-lib/ultrafeedback_binarized`."""

    subset: str | None = None
    """Subset (configuration) of the data set; None is its default."""

    split: str = "train"
    """Split of the data set, slices such as `train[:1%]` included."""


type ExampleSource = Annotated[
    ArithmeticDataConfig | LocalExamplesConfig | HubExamplesConfig | BuiltinDataConfig | CustomDataConfig,
    Field(discriminator="name"),
]


class WeightedExamplesConfig(Section):
    """One data set of a mixture."""

    weight: PositiveFloat | None = 1.0
    """Its share of the mixture, relative to the other weights; None is its number of records."""

    data: ExampleSource
    """The data set."""


class ExampleMixtureConfig(Section):
    """Several data sets in one; a pass shows every record at least once."""

    name: Literal["mixture"]
    """Kind of data set."""

    datasets: Annotated[tuple[WeightedExamplesConfig, ...], Field(min_length=1, strict=False)]
    """The data sets and their weights."""

    repeat: PositiveInt = 1
    """How often one pass shows the mixture."""


type ExampleSpec = Annotated[
    ArithmeticDataConfig
    | LocalExamplesConfig
    | HubExamplesConfig
    | BuiltinDataConfig
    | CustomDataConfig
    | ExampleMixtureConfig,
    Field(discriminator="name"),
]


def _parts_of(spec: ExampleSpec) -> tuple[ExampleSource, ...]:
    return tuple(part.data for part in spec.datasets) if isinstance(spec, ExampleMixtureConfig) else (spec,)


class ExampleDataConfig(LoadingConfig):
    """Answers to learn from, and how they become tokens."""

    train: ExampleSpec
    """Records to learn from."""

    validation: ExampleSpec | None = None
    """Records for the validation loss."""

    roles: Annotated[frozenset[Literal["system", "user", "assistant", "tool"]], Field(min_length=1, strict=False)] = (
        frozenset({"assistant"})
    )
    """Whose words of a conversation are learnt; of pairs and judged answers it is always the answer."""

    max_input_seq_length: PositiveInt | None = None
    """Longest sequence in tokens; None is `policy.max_total_sequence_length`."""

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        validation = None if self.validation is None else _parts_of(self.validation)
        if found := source_conflict(self, _parts_of(self.train), validation):
            raise found
        if found := image_conflict(_parts_of(self.train), validation or ()):
            raise found
        return self
