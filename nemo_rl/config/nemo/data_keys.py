"""Section `data`, in its flat form (v0.3, v0.4) and with `train`, `validation` and `default` (v0.5)."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from nemo_rl.config.nemo.actions import NOTHING, Action, Config, Convert, Ignore, Only, Refuse, Set, Table

type Spec = Mapping[str, Any]
type Kind = Literal["tasks", "examples"]
"""Problems for the policy to answer, or answers to learn from."""

_AIME_2024: Spec = {
    "name": "hub",
    "path": "HuggingFaceH4/aime_2024",
    "split": "train",
    "prompt_key": "problem",
    "answer_key": "answer",
}

KNOWN: Mapping[str, Spec] = {
    "AIME2024": _AIME_2024,
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

_FLAT_VALIDATION: Mapping[str, Spec] = {
    "DeepScaler": _AIME_2024,
    "DAPOMath17K": _AIME_2024,
    "HelpSteer3": {"name": "HelpSteer3", "split": "validation"},
    "squad": {"name": "squad", "split": "validation"},
}
"""The data that validate a data set which the flat form names alone; any other gives a share of itself."""

_FLAT_SHARE = 0.05

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

_PROCESSORS = ("math_hf_data_processor", "math_data_processor", "sft_processor", "preference_preprocessor")


def _renamed(dataset: Spec, names: Mapping[str, str]) -> Spec:
    return {new: dataset[old] for old, new in names.items() if dataset.get(old) is not None}


def _spec(kind: Kind, dataset: Spec, split: str) -> Spec | Refuse:
    """The description of one data set (`train`, `validation` of v0.5) in today's keys."""
    name, repeat = dataset.get("dataset_name") or "ResponseDataset", dataset.get("repeat", 1)
    if dataset.get("processor") not in (None, *_PROCESSORS):
        return _NO_PROCESSOR
    around = _renamed(dataset, {"env_name": "environment"} if kind == "tasks" else {})
    if isinstance(name, str) and name in KNOWN:
        spec: Spec = {**_renamed(dataset, {"split": "split"}), **KNOWN[name], **around}
    elif not isinstance(name, str) or name not in _FORMATS:
        return Refuse(f"the name is not known here: write data.{split}={{name: hub, path: ..., ...}}")
    elif not isinstance(path := dataset.get("data_path"), str):
        return Refuse("the path is missing: set data_path")
    else:
        is_file = Path(path).suffix in _SUFFIXES
        layout, keys = _FORMATS[name]
        columns: Spec = {"format": {**layout, **_renamed(dataset, keys)}}
        if kind == "tasks":
            columns = {"prompt_key": "input", "answer_key": "output", **_renamed(dataset, _TASK_KEYS)}
        place = {} if is_file else _renamed(dataset, {"subset": "subset", "split": "split"})
        spec = {"name": "local" if is_file else "hub", "path": path, **place, **columns, **around}
    return spec if repeat == 1 else {"name": "mixture", "datasets": [{"data": spec}], "repeat": repeat}


def _flat(kind: Kind, name: Any, config: Config) -> Action:
    """`data.dataset_name` with all that describes it beside it."""
    data = config.get("data")
    train = _spec(kind, {**data, "data_path": data.get("train_data_path"), "split": data.get("train_split")}, "train")
    if isinstance(train, Refuse):
        return train
    named = data.get("val_data_paths")
    paths = list(named.values()) if isinstance(named, dict) else [data.get("val_data_path")]
    if len(paths) > 1:
        return Refuse("there is one validation set here: name one file in data.val_data_paths")
    if paths != [None]:
        other = _spec(kind, {**data, "data_path": paths[0], "split": data.get("val_split")}, "validation")
    elif name in _FLAT_VALIDATION:
        other = _FLAT_VALIDATION[name]
    elif name in KNOWN:
        return Set({"data.train": train, "data.split_validation_size": _FLAT_SHARE})
    else:
        return Set({"data.train": train})
    return other if isinstance(other, Refuse) else Set({"data.train": train, "data.validation": other})


def _nested(kind: Kind, split: str, dataset: Any, config: Config) -> Action | None:
    """`data.train` and `data.validation` of v0.5, on top of `data.default`; a list is one data set after the other."""
    if dataset is None or (isinstance(dataset, dict) and "name" in dataset):
        return NOTHING if dataset is None else None
    default = config.get("data.default")
    around = {"env_name": config.get("data.env_name"), **(default if isinstance(default, dict) else {})}
    if isinstance(dataset, list) and all(isinstance(one, dict) for one in dataset):
        return _several(kind, split, [{**around, **one} for one in dataset])
    if not isinstance(dataset, dict):
        return Refuse("a data set is a section: write dataset_name and what describes it")
    whole: Spec = {**around, **dataset}
    spec = _spec(kind, whole, split)
    if isinstance(spec, Refuse):
        return spec
    share = whole.get("split_validation_size")
    divided = {"data.split_validation_size": share} if isinstance(share, int | float) and share else {}
    prompts = {f"data.{key}": value for key, value in _own_prompts(whole).items()}
    return Set({f"data.{split}": spec, **divided, **prompts})


def _several(kind: Kind, split: str, datasets: Sequence[Spec]) -> Action:
    """Data sets one after the other: a mixture by size."""
    parts: list[Spec] = []
    for dataset in datasets:
        if dataset.get("repeat", 1) != 1 or dataset.get("split_validation_size"):
            return Refuse(
                "data sets of a list are neither repeated nor divided one by one: name data.validation itself"
            )
        spec = _spec(kind, dataset, split)
        if isinstance(spec, Refuse):
            return spec
        parts.append({"weight": None, "data": {**spec, **_own_prompts(dataset)}})
    return Set({f"data.{split}": {"name": "mixture", "datasets": parts}})


def _own_prompts(dataset: Spec) -> Mapping[str, Any]:
    """The template and the system prompt that a data set names."""
    system = dataset.get("system_prompt_file")
    return {**_prompts(dataset.get("prompt_file")), **({} if system is None else {"system_prompt_file": system})}


def _prompts(file: Any) -> Mapping[str, Any]:
    """The template in the place of a file that comes with NeMo RL, or the file."""
    if not isinstance(file, str):
        return {} if file is None else {"prompt_file": file}
    is_theirs = Path(file).name in PROMPTS and not Path(file).is_file()
    return {"prompt": PROMPTS[Path(file).name]} if is_theirs else {"prompt_file": file}


def prompt_file(file: Any, _: Config) -> Action:
    """`data.prompt_file` in today's keys."""
    return Set({f"data.{key}": value for key, value in _prompts(file).items()})


def _prompt_limit(limit: Any, _: Config) -> Action | None:
    """NeMo RL takes longer prompts out of the loss."""
    return None if limit is None else Set({"data.max_input_seq_length": limit, "data.too_long": "skip"})


_NO_PROCESSOR = Refuse(
    "records are read by their columns, or by data.train.processor=package.module:name (see docs/data.md)"
)
_TEMPLATE = Ignore("the chat template decides what surrounds a message")
_SAID = NOTHING  # by the data set, into whose description it goes

_DESCRIPTION = (
    *("default", "train_data_path", "val_data_path", "val_data_paths", "train_split", "val_split", "subset", "split"),
    *("input_key", "output_key", "prompt_key", "chosen_key", "rejected_key", "chat_key", "tool_key", "env_name"),
    *("repeat", "seed"),
)


def data_keys(kind: Kind) -> Table:
    """The table of the section `data` of algorithms that learn from tasks, or from examples."""
    return {
        "data.max_input_seq_length": Convert(_prompt_limit),
        "data.dataset_name": Convert(partial(_flat, kind)),
        "data.train": Convert(partial(_nested, kind, "train")),
        "data.validation": Convert(partial(_nested, kind, "validation")),
        **{f"data.{name}": _SAID for name in _DESCRIPTION},
        "data.prompt_file": Convert(prompt_file),
        "data.system_key": Only((None,), Refuse("a system message is the first of the messages: move it there")),
        "data.system_prompt": Only((None,), Refuse("a system message is the first of the messages: move it there")),
        "data.use_preserving_dataset": Ignore("records may differ in form"),
        "data.processor": Only((None, *_PROCESSORS), _NO_PROCESSOR),
        "data.download_dir": Ignore("files are cached where the hub's client keeps them (HF_HOME)"),
        "data.use_multiple_dataloader": Only((False,), Refuse("this version reads one data set")),
        "data.num_prompts_per_dataloader": NOTHING,  # use_multiple_dataloader says it
        "data.add_bos": _TEMPLATE,
        "data.add_eos": _TEMPLATE,
        "data.add_generation_prompt": _TEMPLATE,
        "data.add_system_prompt": _TEMPLATE,
    }
