"""Section `data` of algorithms that learn from given answers: conversations, judged answers, or pairs."""

from typing import Annotated, Literal

from pydantic import Field

from nemo_rl.config.schema.base import NonNegativeInt, PositiveFloat, PositiveInt, Section
from nemo_rl.config.schema.data import ArithmeticDataConfig, BuiltinDataConfig, CustomDataConfig
from nemo_rl.config.schema.formats import RecordFormat


class LocalExamplesConfig(Section):
    """A JSONL, JSON, CSV, Parquet or Arrow file."""

    name: Literal["local"]
    """Kind of data set."""

    path: str
    """The file."""

    format: RecordFormat | None = None
    """Which field holds what; None recognises the usual names (see docs/data.md)."""


class HubExamplesConfig(Section):
    """A data set of the Hugging Face hub, or a local folder laid out like one."""

    name: Literal["hub"]
    """Kind of data set."""

    path: str
    """Name on the hub, e.g. `trl-lib/ultrafeedback_binarized`."""

    subset: str | None = None
    """Subset (configuration) of the data set; None is its default."""

    split: str = "train"
    """Split of the data set, slices such as `train[:1%]` included."""

    format: RecordFormat | None = None
    """Which field holds what; None recognises the usual names (see docs/data.md)."""


type ExampleSource = Annotated[
    ArithmeticDataConfig | LocalExamplesConfig | HubExamplesConfig | BuiltinDataConfig | CustomDataConfig,
    Field(discriminator="name"),
]


class WeightedExamplesConfig(Section):
    """One data set of a mixture."""

    weight: PositiveFloat = 1.0
    """Its share of the mixture, relative to the other weights."""

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


class ExampleDataConfig(Section):
    """Answers to learn from, and how they become tokens."""

    train: ExampleSpec
    """Records to learn from."""

    validation: ExampleSpec | None = None
    """Records for the validation loss."""

    split_validation_size: Annotated[float, Field(ge=0)] = 0.0
    """Keep so many records of `train` (below 1: this share of them) for validation instead; 0 keeps none."""

    roles: Annotated[frozenset[Literal["system", "user", "assistant", "tool"]], Field(min_length=1, strict=False)] = (
        frozenset({"assistant"})
    )
    """Whose words of a conversation are learnt; of pairs and judged answers it is always the answer."""

    shuffle: bool = True
    """Draw a new order in every epoch."""

    num_workers: NonNegativeInt = 0
    """Processes that prepare data; 0 does it in the run's own process."""

    max_input_seq_length: PositiveInt | None = None
    """Longest sequence in tokens; None is `policy.max_total_sequence_length`."""

    too_long: Literal["error", "skip"] = "error"
    """What happens to a sequence above the limit: stop, or leave its record out and count it."""
