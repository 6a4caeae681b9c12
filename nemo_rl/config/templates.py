"""Prompt templates: where the problem goes in, and the files that hold them."""

import re
from pathlib import Path

from pydantic import BaseModel

from nemo_rl.errors import DataError

_PLACE = re.compile(r"(?<![A-Za-z])\{\}")  # not the braces of a LaTeX command such as \boxed{}
_FORMAT = re.compile(r"(\{\{|\}\}|\{\})")
_BRACES = {"{{": "{", "}}": "}"}


def split_template(template: str) -> tuple[str, str]:
    r"""Find the words before the problem and those after it.

    A template in which `{{` stands is read as Python's `str.format` reads it: `{{` and `}}` are single braces, and
    every `{}` is a place. In any other one braces are braces, and `{}` is a place unless it follows a letter.

    >>> split_template(r"{} Answer in \boxed{}.")
    ('', ' Answer in \\boxed{}.')
    >>> split_template(r"Answer in \boxed{{}}: {}")
    ('Answer in \\boxed{}: ', '')

    Raises:
        DataError: there is not exactly one place.
    """
    pieces = [""]
    if "{{" not in template:
        pieces = _PLACE.split(template)
    else:
        for part in _FORMAT.split(template):
            if part == "{}":
                pieces.append("")
            else:
                pieces[-1] += _BRACES.get(part, part)
    if len(pieces) != 2:
        raise DataError(
            f"the prompt template {template!r} has {len(pieces) - 1} places '{{}}' for the problem; give it one"
        )
    return pieces[0], pieces[1]


def prompt_text(path: str | None, key: str) -> str | None:
    """Read a prompt file; None if there is none.

    Args:
        path: the file.
        key: the setting that names it, for the error.

    Raises:
        DataError: it cannot be read, or is not text in UTF-8.
    """
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read data.{key} = {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read data.{key} = {path}: it is not text in UTF-8") from error


def check_prompts(section: BaseModel) -> None:
    """Read the prompt files that a configuration names, as the run will.

    Raises:
        DataError: one cannot be read, or a template has not exactly one place for the problem.
    """
    for name, value in section:
        if isinstance(value, BaseModel):
            check_prompts(value)
        elif isinstance(value, tuple):
            for part in value:
                if isinstance(part, BaseModel):
                    check_prompts(part)
        elif name in ("prompt_file", "system_prompt_file"):
            text = prompt_text(value, name)
            if text and name == "prompt_file":
                split_template(text)
