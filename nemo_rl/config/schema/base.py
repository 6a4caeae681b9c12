"""What every section of the configuration has in common."""

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

type PositiveInt = Annotated[int, Field(ge=1)]
type NonNegativeInt = Annotated[int, Field(ge=0)]
type PositiveFloat = Annotated[float, Field(gt=0)]
type Share = Annotated[float, Field(ge=0, le=1)]
type ImportPath = Annotated[str, Field(pattern=r"^[^:]+:[A-Za-z_]\w*$")]
"""`package.module:name` or `path/to/file.py:name`."""


class Section(BaseModel):
    """A frozen section of the configuration: unknown keys are errors, the text under a field is its documentation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class CommandConfig(Section):
    """Everything a command needs to know."""

    default_recipe: ClassVar[str]
    """Packaged recipe that holds where no file is given."""


def conflict(reason: str, *keys: str) -> PydanticCustomError:
    """Describe settings that exclude each other.

    Args:
        reason: one clause that says what is wrong and what to do.
        keys: dotted keys, relative to the section that checks them, that the loader shows with file and line.
    """
    return PydanticCustomError("conflict", "{reason}", {"reason": reason, "keys": keys})
