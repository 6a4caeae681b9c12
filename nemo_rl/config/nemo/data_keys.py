"""Section `data`, in its flat form (v0.3, v0.4) and with `train`, `validation` and `default` (v0.5)."""

from collections.abc import Mapping
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
    "DAPOMath17K": {"name": "DAPOMath17K"},
    "DeepScaler": {"name": "DeepScaler"},
    "HelpSteer3": {"name": "HelpSteer3"},
    "OpenMathInstruct-2": {"name": "OpenMathInstruct-2"},
    "Tulu3Preference": {"name": "tulu3_preference"},
    "oasst": {"name": "open_assistant"},
    "open_assistant": {"name": "open_assistant"},
    "openmathinstruct2": {"name": "OpenMathInstruct-2"},
    "squad": {"name": "squad"},
    "tulu3_sft_mixture": {"name": "tulu3_sft_mixture"},
}
"""What NeMo RL's names of data sets stand for."""

_USUAL_SPLIT = {"OpenMathInstruct-2": "train_1M"}
"""The split that is cut where none is named; any other data set has `train`."""

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
    "cot.txt": "Think step-by-step to solve the following problem. Output your answer inside of \\boxed{} tags.\n\n{}",
}
"""The template files that come with NeMo RL."""

_PROCESSORS = ("math_hf_data_processor", "math_data_processor", "sft_processor", "preference_preprocessor")


def _renamed(dataset: Spec, names: Mapping[str, str]) -> Spec:
    return {new: dataset[old] for old, new in names.items() if dataset.get(old) is not None}


def _spec(kind: Kind, dataset: Spec, split: str) -> Spec | Refuse:
    """The description of one data set (`train`, `validation` of v0.5) in today's keys."""
    name, repeat = dataset.get("dataset_name") or "ResponseDataset", dataset.get("repeat", 1)
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
        return _shares(kind, train, _FLAT_SHARE)
    else:
        return Set({"data.train": train})
    return other if isinstance(other, Refuse) else Set({"data.train": train, "data.validation": other})


def _shares(kind: Kind, spec: Spec, share: float) -> Set:
    """One data set cut into validation and training."""
    if kind == "examples":
        return Set({"data.train": spec, "data.split_validation_size": share})
    cut, split = f"{100 * share:g}%", spec.get("split") or _USUAL_SPLIT.get(spec["name"], "train")
    train, validation = ({**spec, "split": f"{split}[{part}]"} for part in (f"{cut}:", f":{cut}"))
    return Set(
        {"data.train": train, "data.validation": validation},
        note=f"the first {cut} of the data validate, where NeMo RL draws them at random",
    )


def _nested(kind: Kind, split: str, dataset: Any, config: Config) -> Action | None:
    """`data.train` and `data.validation` of v0.5, on top of `data.default`."""
    if dataset is None:
        return NOTHING
    if isinstance(dataset, dict) and "name" in dataset:
        return None
    if not isinstance(dataset, dict):
        return Refuse(f"a list mixes data sets by size, which has no form here: write one section into data.{split}")
    default = config.get("data.default")
    whole = {"env_name": config.get("data.env_name"), **(default if isinstance(default, dict) else {}), **dataset}
    spec = _spec(kind, whole, split)
    if isinstance(spec, Refuse):
        return spec
    if whole.get("processor") not in (None, *_PROCESSORS):
        return _NO_PROCESSOR
    prompts = dict(_prompts(whole.get("prompt_file")))
    if (system := whole.get("system_prompt_file")) is not None:
        prompts["data.system_prompt_file"] = system
    if prompts and kind == "examples":
        return _NO_TEMPLATE
    share = whole.get("split_validation_size")
    if isinstance(share, int | float) and share:
        cut = _shares(kind, spec, share)
        return Set({**cut.values, **prompts}, note=cut.note)
    return Set({f"data.{split}": spec, **prompts})


def _prompts(file: Any) -> Mapping[str, Any]:
    """The template of a file that comes with NeMo RL, or the file."""
    if not isinstance(file, str):
        return {} if file is None else {"data.prompt_file": file}
    is_theirs = Path(file).name in PROMPTS and not Path(file).is_file()
    return {"data.prompt": PROMPTS[Path(file).name]} if is_theirs else {"data.prompt_file": file}


def _prompt_limit(limit: Any, _: Config) -> Action | None:
    """NeMo RL takes longer prompts out of the loss."""
    return None if limit is None else Set({"data.max_input_seq_length": limit, "data.too_long": "skip"})


_NO_PROCESSOR = Refuse("records are made into prompts by data.prompt and its columns, or by data.train={name: custom}")
_NO_TEMPLATE = Refuse("a record holds its whole prompt: write the template into the records")
_TEMPLATE = Ignore("the chat template decides what surrounds a message")
_SAID = NOTHING  # by the data set, into whose description it goes

_PROMPTS: Mapping[Kind, Table] = {
    "tasks": {"data.prompt_file": Convert(lambda file, _: Set(_prompts(file)))},
    "examples": {
        "data.prompt_file": Only((None,), _NO_TEMPLATE),
        "data.system_prompt_file": Only((None,), _NO_TEMPLATE),
    },
}
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
        **_PROMPTS[kind],
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
