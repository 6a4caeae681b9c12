"""Section `data`: the problems, and how they become prompts."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from nemo_rl.config.schema.base import NonNegativeInt, PositiveFloat, PositiveInt, Section, conflict
from nemo_rl.config.schema.sources import (
    CustomDataConfig,
    LoadingConfig,
    PromptedConfig,
    SourceConfig,
    source_conflict,
)

type ArithmeticKind = Literal["sum_1_1", "sum_2_1", "sum_1_2", "sum_2_2", "difference", "product", "word", "chain"]


def _sums() -> dict[ArithmeticKind, float]:
    """Half one-digit sums, 30% two plus one digit, 20% two plus two: the standard mix of the held-out test."""
    return {"sum_1_1": 0.5, "sum_2_1": 0.3, "sum_2_2": 0.2}


class JudgedTasksConfig(Section):
    """Data whose records do not say who judges them."""

    environment: str = "math"
    """Name of the environment (a key of `env`) that judges these tasks."""


class RecordsConfig(JudgedTasksConfig, SourceConfig):
    """Records that are read as problems."""

    @model_validator(mode="after")
    def _one_reader(self) -> Self:
        ignored = {"prompt_key", "answer_key", "environment"} & self.model_fields_set
        if self.processor is not None and ignored:
            keys = " and ".join(sorted(ignored))
            raise conflict(f"the processor makes the tasks and leaves no use for {keys}: drop one", "processor")
        return self


class ArithmeticDataConfig(JudgedTasksConfig, PromptedConfig):
    """Arithmetic problems generated offline; train, validation and test never share a seed."""

    name: Literal["arithmetic"]
    """Kind of data set."""

    num_samples: PositiveInt
    """Problems to generate."""

    seed: NonNegativeInt = 0
    """Decides every problem together with the name of the split."""

    mix: dict[ArithmeticKind, Annotated[float, Field(ge=0)]] = Field(default_factory=_sums)
    """Share of each kind of problem; the shares are normalised to sum to 1."""

    @model_validator(mode="after")
    def _has_a_share(self) -> Self:
        if not sum(self.mix.values()) > 0:
            raise conflict("mix has no share above 0: give at least one kind of problem a positive share", "mix")
        return self


class LocalDataConfig(RecordsConfig):
    """A JSONL, JSON, CSV, Parquet or Arrow file."""

    name: Literal["local"]
    """Kind of data set."""

    path: str
    """The file."""

    prompt_key: str = "prompt"
    """Column of the problem: text, or a list of chat messages."""

    answer_key: str = "answer"
    """Column of the known answer."""


class HubDataConfig(RecordsConfig):
    """A data set of the Hugging Face hub, or a local folder laid out like one."""

    name: Literal["hub"]
    """Kind of data set."""

    path: str
    """Name on the hub, e.g. `nvidia/OpenMathInstruct-2`."""

    subset: str | None = None
    """Subset (configuration) of the data set, e.g. `main` of `openai/gsm8k`; None is its default."""

    split: str = "train"
    """Split of the data set, slices such as `train[:1%]` included."""

    prompt_key: str = "prompt"
    """Column of the problem: text, or a list of chat messages."""

    answer_key: str = "answer"
    """Column of the known answer."""


type PictureName = Literal["clevr-cogent", "refcoco", "geometry3k"]
"""Data sets whose problems show images."""

type TextName = Literal[
    "AIME2024",
    "AIME2025",
    "DAPOMathAIME2024",
    "MATH-500",
    "OpenMathInstruct-2",
    "DeepScaler",
    "DAPOMath17K",
    "GSM8K",
    "NuminaMath",
    "OpenR1-Math-220k",
    "squad",
    "open_assistant",
    "tulu3_sft_mixture",
    "tulu3_preference",
    "HelpSteer3",
]

type BuiltinName = TextName | PictureName


class BuiltinDataConfig(RecordsConfig):
    """A well-known data set, whose place on the hub and columns the library knows (see docs/data.md)."""

    name: BuiltinName
    """Which one."""

    path: str | None = None
    """A local folder in the hub's layout to read instead of the hub."""

    split: str | None = None
    """Split of the data set, slices such as `train[:1%]` included; None is the usual one."""

    image_folder: str | None = None
    """Where the files are that the records name: for refcoco, the folder of COCO's `train2014`."""

    @property
    def has_images(self) -> bool:
        """Whether its problems show images."""
        return self.name in get_args(PictureName.__value__)


type TaskSource = Annotated[
    ArithmeticDataConfig | LocalDataConfig | HubDataConfig | BuiltinDataConfig | CustomDataConfig,
    Field(discriminator="name"),
]


class WeightedTasksConfig(Section):
    """One data set of a mixture."""

    weight: PositiveFloat | None = 1.0
    """Its share of the mixture, relative to the other weights; None is its number of records."""

    data: TaskSource
    """The data set."""


class TaskMixtureConfig(Section):
    """Several data sets in one; a pass shows every record at least once."""

    name: Literal["mixture"]
    """Kind of data set."""

    datasets: Annotated[tuple[WeightedTasksConfig, ...], Field(min_length=1, strict=False)]
    """The data sets and their weights."""

    repeat: PositiveInt = 1
    """How often one pass shows the mixture."""


type DataSpec = Annotated[
    ArithmeticDataConfig | LocalDataConfig | HubDataConfig | BuiltinDataConfig | CustomDataConfig | TaskMixtureConfig,
    Field(discriminator="name"),
]


def parts_of(spec: DataSpec | None) -> tuple[TaskSource, ...]:
    """The data sets of a description: of a mixture all, else the one."""
    match spec:
        case None:
            return ()
        case TaskMixtureConfig():
            return tuple(part.data for part in spec.datasets)
        case _:
            return (spec,)


class DataConfig(LoadingConfig):
    """The problems, and how they become prompts."""

    train: DataSpec
    """Problems to learn from."""

    validation: DataSpec | None = None
    """Problems for the accuracy during the run; needed by `grpo.val_period`, `val_at_start` and `val_at_end`."""

    test: DataSpec | None = None
    """Held-out problems for the accuracy before and after the run; None leaves it out."""

    max_input_seq_length: PositiveInt | None = None
    """Longest prompt in tokens; None is what `policy.generation.max_new_tokens` leaves of
    `policy.max_total_sequence_length`."""

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        validation = None if self.validation is None else parts_of(self.validation)
        if found := source_conflict(self, parts_of(self.train), validation):
            raise found
        if found := image_conflict(parts_of(self.train), validation or (), parts_of(self.test)):
            raise found
        return self


def image_conflict(*sets: tuple[Section, ...]) -> PydanticCustomError | None:
    """Refuse problems that show images: the models that are trained here read text."""
    for part in (part for parts in sets for part in parts):
        if isinstance(part, BuiltinDataConfig) and part.has_images:
            return conflict(
                f"the problems of {part.name} show images, and policy.model_name is trained on text alone: choose data"
                " of text"
            )
    return None
