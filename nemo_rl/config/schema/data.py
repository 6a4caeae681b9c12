"""Section `data`: the problems, and how they become prompts."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from nemo_rl.config.schema.base import ImportPath, NonNegativeInt, PositiveFloat, PositiveInt, Section, conflict

type ArithmeticKind = Literal["sum_1_1", "sum_2_1", "sum_1_2", "sum_2_2", "difference", "product", "word", "chain"]


def _sums() -> dict[ArithmeticKind, float]:
    """Half one-digit sums, 30% two plus one digit, 20% two plus two: the standard mix of the held-out test."""
    return {"sum_1_1": 0.5, "sum_2_1": 0.3, "sum_2_2": 0.2}


class RecordsConfig(Section):
    """Data whose records do not say who judges them."""

    environment: str = "math"
    """Name of the environment (a key of `env`) that judges these tasks."""


class ArithmeticDataConfig(RecordsConfig):
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
    """A JSONL, JSON, CSV or Parquet file."""

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


type BuiltinName = Literal[
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


class BuiltinDataConfig(RecordsConfig):
    """A well-known data set, whose place on the hub and columns the library knows (see docs/data.md)."""

    name: BuiltinName
    """Which one."""

    path: str | None = None
    """A local folder in the hub's layout to read instead of the hub."""

    split: str | None = None
    """Split of the data set, slices such as `train[:1%]` included; None is the usual one."""


class CustomDataConfig(Section):
    """A data set of your own, by import path; each of its tasks names its environment."""

    name: Literal["custom"]
    """Kind of data set."""

    path: ImportPath
    """A callable that returns a sequence of `Task`, or of `Chat` or `ChatPair` where answers are given, as
    `package.module:name` or `path/to/file.py:name`."""

    kwargs: dict[str, JsonValue] = Field(default_factory=dict[str, Any])
    """Keyword arguments of the callable."""


type TaskSource = Annotated[
    ArithmeticDataConfig | LocalDataConfig | HubDataConfig | BuiltinDataConfig | CustomDataConfig,
    Field(discriminator="name"),
]


class WeightedTasksConfig(Section):
    """One data set of a mixture."""

    weight: PositiveFloat = 1.0
    """Its share of the mixture, relative to the other weights."""

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


class DataConfig(Section):
    """The problems, and how they become prompts."""

    train: DataSpec
    """Problems to learn from."""

    validation: DataSpec | None = None
    """Problems for the accuracy during the run; needed by `grpo.val_period`, `val_at_start` and `val_at_end`."""

    test: DataSpec | None = None
    """Held-out problems for the accuracy before and after the run; None leaves it out."""

    shuffle: bool = True
    """Draw a new order in every epoch."""

    num_workers: NonNegativeInt = 0
    """Processes that prepare data; 0 does it in the run's own process."""

    prompt: str | None = None
    """Template of the user message, `{}` stands for the problem; None leaves the problem as it is."""

    prompt_file: str | None = None
    """A file that holds the template instead of `prompt`."""

    system_prompt_file: str | None = None
    """A file that holds the system message; None uses the chat template's own."""

    max_input_seq_length: PositiveInt | None = None
    """Longest prompt in tokens; None is what `policy.generation.max_new_tokens` leaves of
    `policy.max_total_sequence_length`."""

    too_long: Literal["error", "skip"] = "error"
    """What happens to a prompt above the limit: stop before the run, or leave it out and count it."""

    @model_validator(mode="after")
    def _one_template(self) -> Self:
        if self.prompt is not None and self.prompt_file is not None:
            raise conflict("prompt and prompt_file are both set: keep one", "prompt", "prompt_file")
        if self.prompt is not None and "{}" not in self.prompt:
            raise conflict("prompt has no '{}' where the problem goes: add it", "prompt")
        return self
