"""Section `env`: who judges the answers. Its keys are names of the user's choice; a task names its environment."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nemo_rl.config.schema.base import ImportPath, PositiveFloat, PositiveInt, Section, conflict
from nemo_rl.config.schema.policy import TokenizerConfig


class MathEnvironmentConfig(Section):
    """Compares the answer in a reply with the known one."""

    type: Literal["math"]
    """Kind of environment."""

    num_workers: PositiveInt = 2
    """Processes that compare symbolic answers."""

    timeout_seconds: PositiveFloat = 5.0
    """Deadline of one comparison in seconds; beyond it the answer counts as wrong and is counted as timed out."""

    extraction: Literal["math", "last_number", "multiple_choice"] = "math"
    """`math` finds boxed, LaTeX and plain expressions; `last_number` takes the last number in the reply,
    `multiple_choice` the letter that the reply chooses."""

    reward_correct: float = 1.0
    """Reward of a right answer."""

    reward_incorrect: float = 0.0
    """Reward of a wrong answer, or of none."""


class FunctionEnvironmentConfig(Section):
    """A Python function `reward(completion, **extra)` that returns a number or a dict of named numbers."""

    type: Literal["function"]
    """Kind of environment."""

    path: ImportPath
    """The function, as `package.module:function` or `path/to/file.py:function`."""

    timeout_seconds: PositiveFloat | None = None
    """Deadline of one call in seconds; None waits for ever."""


class RewardModelEnvironmentConfig(Section):
    """Scores the conversation with a reward model: reward = clip(reward_scale * score + reward_shift)."""

    type: Literal["reward_model"]
    """Kind of environment."""

    model_name: str
    """A folder, `embedded:NAME` or a name on the Hugging Face hub: a classifier with one label, e.g. what `nemo-rl rm`
    exports."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer of the reward model, whose chat template writes the conversation for it."""

    max_model_len: PositiveInt | None = None
    """Longest conversation in tokens; a longer one cannot be judged, so its group is dropped. None is as many as the
    model has positions."""

    max_batch_size: PositiveInt = 64
    """Most conversations in one call of the model."""

    max_wait_seconds: Annotated[float, Field(ge=0)] = 0.02
    """How long a conversation waits for others to be scored with."""

    max_batch_tokens: PositiveInt = 8192
    """Tokens of one forward pass as computed, shared prompts counted once; bounds memory, never changes a score."""

    precision: Literal["auto", "float32", "bfloat16"] = "bfloat16"
    """Number format of the weights and of the arithmetic; `auto`: `bfloat16` where the hardware computes in it, else
    `float32`."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model lives; `auto` is the GPU when there is one."""

    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs, or the share of one, that Ray reserves for the model beside the policy's; without Ray they share one."""

    num_threads: PositiveInt | None = None
    """CPU threads of the model's arithmetic; None is PyTorch's own choice."""

    reward_scale: float = 1.0
    """Multiplies the score."""

    reward_shift: float = 0.0
    """Is added to that."""

    reward_min: float | None = None
    """Smallest reward; None sets no bound."""

    reward_max: float | None = None
    """Largest reward; None sets no bound."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.reward_min is not None and self.reward_max is not None and self.reward_min >= self.reward_max:
            raise conflict(
                f"reward_min = {self.reward_min:g} is not below reward_max = {self.reward_max:g}, so every reward would"
                " be the same: lower the first or raise the second",
                "reward_min",
                "reward_max",
            )
        return self

    @model_validator(mode="after")
    def _scale_tells_scores_apart(self) -> Self:
        if self.reward_scale == 0:
            raise conflict("reward_scale = 0 makes every reward the same: give it another value", "reward_scale")
        return self


type EnvironmentConfig = Annotated[
    MathEnvironmentConfig | FunctionEnvironmentConfig | RewardModelEnvironmentConfig, Field(discriminator="type")
]
