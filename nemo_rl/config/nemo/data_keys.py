"""Section `data`, in its flat form (v0.3, v0.4) and with `train`, `validation` and `default` (v0.5)."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from nemo_rl.config.nemo.actions import NOTHING, Action, Config, Convert, Ignore, Only, Refuse, Set, Table

type Spec = Mapping[str, Any]

_AIME_2024: Spec = {
    "name": "hub",
    "path": "HuggingFaceH4/aime_2024",
    "split": "train",
    "prompt_key": "problem",
    "answer_key": "answer",
}
_DEEPSCALER: Spec = {
    "name": "hub",
    "path": "agentica-org/DeepScaleR-Preview-Dataset",
    "split": "train",
    "prompt_key": "problem",
    "answer_key": "answer",
}
_OPEN_MATH: Spec = {
    "name": "hub",
    "path": "nvidia/OpenMathInstruct-2",
    "split": "train_1M",
    "prompt_key": "problem",
    "answer_key": "expected_answer",
}

BUILT_IN: Mapping[str, Spec] = {
    "AIME2024": _AIME_2024,
    "DeepScaler": _DEEPSCALER,
    "OpenMathInstruct-2": _OPEN_MATH,
    "openmathinstruct2": _OPEN_MATH,
}
"""What NeMo RL's names of data sets stand for."""

REGISTERED: Mapping[str, str] = {
    "DAPOMath17K": "DAPOMath17K",
    "HelpSteer3": "HelpSteer3",
    "Tulu3Preference": "tulu3_preference",
    "open_assistant": "open_assistant",
    "oasst": "open_assistant",
    "squad": "squad",
    "tulu3_sft_mixture": "tulu3_sft_mixture",
}
"""Data sets that have a name here as well."""

_FLAT_VALIDATION: Mapping[str, Spec] = {
    "DeepScaler": _AIME_2024,
    "DAPOMath17K": _AIME_2024,
    "HelpSteer3": {"name": "HelpSteer3", "split": "validation"},
    "squad": {"name": "squad", "split": "validation"},
}
"""The data that validate a data set which the flat form names alone; any other gives a share of itself."""

_FLAT_SHARE = 5
"""Percent of the data that validate in the flat form."""

_FILES = (None, "ResponseDataset", "PreferenceDataset", "BinaryPreferenceDataset", "openai_format")
"""Names that stand for a file of the user's, or a data set of the hub."""

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
"""What tells a file from a name on the hub."""

PROMPTS = {
    "cot.txt": "Think step-by-step to solve the following problem. Output your answer inside of \\boxed{} tags.\n\n{}",
}
"""The template files that come with NeMo RL."""

_COLUMNS = {
    "input_key": "prompt_key",
    "output_key": "answer_key",
    "prompt_key": "prompt_key",
    "chosen_key": "chosen_key",
    "rejected_key": "rejected_key",
    "subset": "subset",
    "split": "split",
    "env_name": "environment",
}
_PROCESSORS = ("math_hf_data_processor", "math_data_processor", "sft_processor", "preference_preprocessor")

_SAID = NOTHING  # by the data set, into whose description it goes


def _spec(dataset: Spec, split: str) -> Spec | Refuse:
    """The description of one data set (`train`, `validation` of v0.5) in today's keys."""
    name, path = dataset.get("dataset_name"), dataset.get("data_path")
    own = {new: dataset[old] for old, new in _COLUMNS.items() if dataset.get(old) is not None}
    if dataset.get("repeat", 1) != 1:
        return Refuse("a data set is read as it is here: remove repeat and raise max_val_samples")
    if isinstance(name, str) and name in BUILT_IN:
        return {**BUILT_IN[name], **own, "split": BUILT_IN[name]["split"]}
    if isinstance(name, str) and name in REGISTERED:
        return {"name": REGISTERED[name], **own}
    if name not in _FILES:
        return Refuse(f"the name is not known here: write data.{split}={{name: hub, path: ..., prompt_key: ...}}")
    if not isinstance(path, str):
        return Refuse("the path is missing: set data_path")
    is_file = Path(path).suffix in _SUFFIXES
    if is_file:
        own.pop("split", None)
    columns = {"prompt_key": "input", "answer_key": "output"} if name in (None, "ResponseDataset") else {}
    return {"name": "local" if is_file else "hub", "path": path, **columns, **own}


def _flat(name: Any, config: Config) -> Action:
    """`data.dataset_name` with all that describes it beside it."""
    data = config.get("data")
    train = _spec({**data, "data_path": data.get("train_data_path"), "split": data.get("train_split")}, "train")
    if isinstance(train, Refuse):
        return train
    named = data.get("val_data_paths")
    paths = list(named.values()) if isinstance(named, dict) else [data.get("val_data_path")]
    if len(paths) > 1:
        return Refuse("there is one validation set here: name one file in data.val_data_paths")
    if paths != [None]:
        other = _spec({**data, "data_path": paths[0], "split": data.get("val_split")}, "validation")
    elif name in _FLAT_VALIDATION:
        other = _FLAT_VALIDATION[name]
    elif name in BUILT_IN or name in REGISTERED:
        return _shares(train, _FLAT_SHARE)
    else:
        return Set({"data.train": train})
    return other if isinstance(other, Refuse) else Set({"data.train": train, "data.validation": other})


def _shares(spec: Spec, percent: float) -> Set:
    """One data set cut into validation, at its start, and training."""
    cut, split = f"{percent:g}%", spec.get("split", "train")
    train, validation = ({**spec, "split": f"{split}[{part}]"} for part in (f"{cut}:", f":{cut}"))
    return Set(
        {"data.train": train, "data.validation": validation},
        note=f"the first {cut} of the data validate, where NeMo RL draws them at random",
    )


def _nested(split: str, dataset: Any, config: Config) -> Action | None:
    """`data.train` and `data.validation` of v0.5, on top of `data.default`."""
    if dataset is None:
        return NOTHING
    if isinstance(dataset, dict) and "name" in dataset:
        return None
    if not isinstance(dataset, dict):
        return Refuse(f"this version reads one data set: write one section into data.{split}")
    default = config.get("data.default")
    whole = {"env_name": config.get("data.env_name"), **(default if isinstance(default, dict) else {}), **dataset}
    spec = _spec(whole, split)
    if isinstance(spec, Refuse):
        return spec
    processor = whole.get("processor")
    if processor is not None and processor not in _PROCESSORS:
        return _NO_PROCESSOR
    prompts = dict(_prompts(whole.get("prompt_file")))
    if (system := whole.get("system_prompt_file")) is not None:
        prompts["data.system_prompt_file"] = system
    share = whole.get("split_validation_size")
    if isinstance(share, int | float) and share:
        cut = _shares(spec, 100 * share)
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
_TEMPLATE = Ignore("the chat template decides what surrounds a message")

DATA: Table = {
    "data.max_input_seq_length": Convert(_prompt_limit),
    "data.prompt_file": Convert(lambda file, _: Set(_prompts(file))),
    "data.dataset_name": Convert(_flat),
    "data.train": Convert(partial(_nested, "train")),
    "data.validation": Convert(partial(_nested, "validation")),
    "data.default": _SAID,
    "data.train_data_path": _SAID,
    "data.val_data_path": _SAID,
    "data.train_split": _SAID,
    "data.val_split": _SAID,
    **{f"data.{name}": _SAID for name in _COLUMNS},
    "data.val_data_paths": _SAID,
    "data.seed": _SAID,
    "data.processor": Only((None, *_PROCESSORS), _NO_PROCESSOR),
    "data.download_dir": Ignore("files are cached where the hub's client keeps them (HF_HOME)"),
    "data.use_multiple_dataloader": Only((False,), Refuse("this version reads one data set")),
    "data.num_prompts_per_dataloader": NOTHING,  # use_multiple_dataloader says it
    "data.chat_key": Only((None, "messages"), Refuse("a record holds its conversation as messages: rename the column")),
    "data.tool_key": Only((None, "tools"), Refuse("a record holds its tools as tools: rename the column")),
    "data.system_key": Only((None,), Refuse("a system message is the first of the messages: move it there")),
    "data.system_prompt": Only((None,), Refuse("write it into a file and name it as data.system_prompt_file")),
    "data.use_preserving_dataset": Ignore("records may differ in form"),
    "data.add_bos": _TEMPLATE,
    "data.add_eos": _TEMPLATE,
    "data.add_generation_prompt": _TEMPLATE,
    "data.add_system_prompt": _TEMPLATE,
}
