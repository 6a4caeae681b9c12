"""Section `env`: who judges the answers. Its keys are names of the user's choice; a task names its environment."""

from typing import Annotated, Literal

from pydantic import Field

from nemo_rl.config.schema.base import ImportPath, PositiveFloat, PositiveInt, Section


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


type EnvironmentConfig = Annotated[MathEnvironmentConfig | FunctionEnvironmentConfig, Field(discriminator="type")]
