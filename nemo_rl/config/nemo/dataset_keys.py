"""One data set as NeMo RL describes it: its name, its place, its columns, and the words around a problem."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from nemo_rl.config.nemo.actions import NOTHING, Action, Ignore, Only, Refuse

type Spec = Mapping[str, Any]
type Kind = Literal["tasks", "examples"]
"""Problems for the policy to answer, or answers to learn from."""

KNOWN: Mapping[str, Spec] = {
    "AIME2024": {"name": "AIME2024"},
    "AIME2025": {"name": "AIME2025"},
    "DAPOMath17K": {"name": "DAPOMath17K"},
    "DAPOMathAIME2024": {"name": "DAPOMathAIME2024"},
    "DeepScaler": {"name": "DeepScaler"},
    "HelpSteer3": {"name": "HelpSteer3"},
    "OpenMathInstruct-2": {"name": "OpenMathInstruct-2"},
    "Tulu3Preference": {"name": "tulu3_preference"},
    "clevr-cogent": {"name": "clevr-cogent"},
    "clevr_cogent": {"name": "clevr-cogent"},
    "geometry3k": {"name": "geometry3k"},
    "gsm8k": {"name": "GSM8K"},
    "oasst": {"name": "open_assistant"},
    "open_assistant": {"name": "open_assistant"},
    "openmathinstruct2": {"name": "OpenMathInstruct-2"},
    "refcoco": {"name": "refcoco"},
    "squad": {"name": "squad"},
    "tulu3_sft_mixture": {"name": "tulu3_sft_mixture"},
}
"""What NeMo RL's names of data sets stand for."""

_TASK_KEYS = {"input_key": "prompt_key", "output_key": "answer_key", "prompt_key": "prompt_key"}

_FORMATS: Mapping[str, tuple[Spec, Mapping[str, str]]] = {
    "ResponseDataset": (
        {"type": "completion", "prompt_key": "input", "completion_key": "output"},
        {"input_key": "prompt_key", "output_key": "completion_key"},
    ),
    "PreferenceDataset": ({"type": "ranking"}, {}),
    "BinaryPreferenceDataset": (
        {"type": "pair"},
        {"prompt_key": "prompt_key", "chosen_key": "chosen_key", "rejected_key": "rejected_key"},
    ),
    "openai_format": ({"type": "messages"}, {"chat_key": "messages_key", "tool_key": "tools_key"}),
}
"""Names that stand for a file of the user's, or a data set of the hub: layout of its records, and the keys for it."""

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
"""What tells a file from a name on the hub."""

PROMPTS = {
    "cot.txt": "Solve the problem below step by step, and put your final answer inside \\boxed{}.\n\n{}\n\n"
    "Think step by step.",
}
"""In the place of template files that come with NeMo RL: the problem stands where it stands there, in words of ours."""

NO_PROCESSOR = Refuse(
    "records are read by their columns, or by data.train.processor=package.module:name (see docs/data.md)"
)
PROCESSORS = ("math_hf_data_processor", "math_data_processor", "sft_processor", "preference_preprocessor")


def _is_file(path: Any) -> bool:
    return isinstance(path, str) and Path(path).suffix in _SUFFIXES


def _renamed(dataset: Spec, names: Mapping[str, str]) -> Spec:
    return {new: dataset[old] for old, new in names.items() if dataset.get(old) is not None}


def spec_of(kind: Kind, dataset: Spec, split: str) -> Spec | Refuse:
    """The description of one data set (`train`, `validation` of v0.5) in today's keys."""
    name, repeat = dataset.get("dataset_name") or "ResponseDataset", dataset.get("repeat", 1)
    if dataset.get("processor") not in (None, *PROCESSORS):
        return NO_PROCESSOR
    around = _renamed(dataset, {"env_name": "environment"} if kind == "tasks" else {})
    if isinstance(name, str) and name in KNOWN:
        spec: Spec = {**_renamed(dataset, {"split": "split"}), **KNOWN[name], **around}
    elif not isinstance(name, str) or name not in _FORMATS:
        return Refuse(f"the name is not known here: write data.{split}={{name: hub, path: ..., ...}}")
    elif not isinstance(path := dataset.get("data_path"), str):
        return Refuse("the path is missing: set data_path")
    else:
        is_file = _is_file(path)
        layout, keys = _FORMATS[name]
        columns: Spec = {"format": {**layout, **_renamed(dataset, keys)}}
        if kind == "tasks":
            columns = {"prompt_key": "input", "answer_key": "output", **_renamed(dataset, _TASK_KEYS)}
        place = {} if is_file else _renamed(dataset, {"subset": "subset", "split": "split"})
        spec = {"name": "local" if is_file else "hub", "path": path, **place, **columns, **around}
    return spec if repeat == 1 else {"name": "mixture", "datasets": [{"data": spec}], "repeat": repeat}


def prompts_of(file: Any) -> Mapping[str, Any]:
    """The template in the place of a file that comes with NeMo RL, or the file."""
    if not isinstance(file, str):
        return {} if file is None else {"prompt_file": file}
    is_theirs = Path(file).name in PROMPTS and not Path(file).is_file()
    return {"prompt": PROMPTS[Path(file).name]} if is_theirs else {"prompt_file": file}


_FIXED: Mapping[tuple[Kind, str], Mapping[str, str]] = {
    ("tasks", "OpenMathInstruct-2"): {"input_key": "problem", "output_key": "expected_answer"},
    ("examples", "OpenMathInstruct-2"): {"input_key": "problem", "output_key": "generated_solution"},
}
"""Columns that NeMo RL's files write although the name of the data set says them."""

_COLUMNS = ("input_key", "output_key", "prompt_key", "chosen_key", "rejected_key", "chat_key", "tool_key")
_SYSTEM = Only((None,), Refuse("a system message is the first of the messages: move it there"))
_RULES: Mapping[str, Action] = {
    **dict.fromkeys(("dataset_name", "repeat", "split_validation_size", "prompt_file", "system_prompt_file"), NOTHING),
    "system_key": _SYSTEM,
    "system_prompt": _SYSTEM,
    "processor": Only((None, *PROCESSORS), NO_PROCESSOR),
    "seed": Only((None,), Ignore("records for validation are drawn by the seed of the run")),
    "download_dir": Only((None,), Ignore("files are cached where the hub's client keeps them (HF_HOME)")),
    "use_preserving_dataset": Only((None, False), Ignore("records may differ in form")),
    "filter_dataset": Only((None, False), Refuse("records are read as they are: filter the file before the run")),
}
"""What becomes of a key whatever the data set; what is `NOTHING` goes into `spec_of` and the like."""

DATASET_KEYS = (*_RULES, *_COLUMNS, "data_path", "subset", "split", "env_name")
"""The keys of one data set."""


def key_of(kind: Kind, key: str, value: Any, dataset: Spec) -> Action:
    """What becomes of one key (of `DATASET_KEYS`) of a data set, beside its description by `spec_of`."""
    name = dataset.get("dataset_name") or "ResponseDataset"
    if key in _RULES or value is None or not isinstance(name, str):
        return _RULES.get(key, NOTHING)
    if key == "env_name":
        return NOTHING if kind == "tasks" else Ignore("given answers are judged by nobody")
    if name in KNOWN:
        fixed = _FIXED.get((kind, KNOWN[name]["name"]), {})
        if key == "split" or value == fixed.get(key):
            return NOTHING
        return Refuse(f"{name} has its own place and columns: leave it out, or describe the data in place of the name")
    if key in _COLUMNS:
        read = _TASK_KEYS if kind == "tasks" else _FORMATS.get(name, ({}, {key: key}))[1]
        return NOTHING if key in read else Refuse(f"{name} has no use for it: leave it out")
    if key == "data_path" or not _is_file(dataset.get("data_path")):
        return NOTHING
    if key == "subset":
        return Ignore("a file has no subsets")
    return Only(("train",), Refuse("a file is read as a whole: leave it out"))
