"""Section `data`, in its flat form (v0.3, v0.4) and with `train`, `validation` and `default` (v0.5)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from nemo_rl.config.nemo.actions import NOTHING, Action, Add, Config, Convert, Ignore, Only, Refuse, Set, Table
from nemo_rl.config.nemo.dataset_keys import (
    DATASET_KEYS,
    KNOWN,
    Kind,
    Spec,
    key_of,
    prompts_of,
    spec_of,
)

_FLAT_VALIDATION: Mapping[str, Spec] = {
    "DeepScaler": {"name": "AIME2024"},
    "DAPOMath17K": {"name": "DAPOMathAIME2024"},
    "HelpSteer3": {"name": "HelpSteer3", "split": "validation"},
    "squad": {"name": "squad", "split": "validation"},
}
"""The data that validate a data set which the flat form names alone; any other gives a share of itself."""

_FLAT_SHARE = 0.05

_FLAT = {
    **{key: key for key in DATASET_KEYS if key not in ("dataset_name", "prompt_file", "system_prompt_file")},
    **{"train_data_path": "data_path", "val_data_path": "data_path", "val_data_paths": "data_path"},
    **{"train_split": "split", "val_split": "split"},
}
"""What stands beside `data.dataset_name`, by the names that v0.5 has for it."""


def _flat(kind: Kind, name: Any, config: Config) -> Action:
    """`data.dataset_name` with all that describes it beside it."""
    data = config.get("data")
    for section in ("train", "validation"):
        if _described(config, section):
            return Refuse(f"data.{section} describes a data set as well: keep one of the two forms")
    split = data.get("train_split") or data.get("split")
    train = spec_of(kind, {**data, "data_path": data.get("train_data_path"), "split": split}, "train")
    if isinstance(train, Refuse):
        return train
    paths = _validation_paths(data)
    if len(paths) > 1:
        return Refuse("there is one validation set here: name one file in data.val_data_paths")
    if paths != [None]:
        other = spec_of(kind, {**data, "data_path": paths[0], "split": data.get("val_split")}, "validation")
    elif isinstance(name, str) and name in _FLAT_VALIDATION:
        other = _FLAT_VALIDATION[name]
    elif isinstance(name, str) and name in KNOWN:
        return Set({"data.train": train, "data.split_validation_size": _FLAT_SHARE})
    else:
        return Set({"data.train": train})
    return other if isinstance(other, Refuse) else Set({"data.train": train, "data.validation": other})


def _validation_paths(data: Spec) -> list[Any]:
    named = data.get("val_data_paths")
    return list(named.values()) if isinstance(named, dict) else [data.get("val_data_path")]


def _flat_key(kind: Kind, key: str, value: Any, config: Config) -> Action:
    """One of the keys beside `data.dataset_name`."""
    data = config.get("data")
    if value is None or (key == "env_name" and kind == "tasks"):
        return NOTHING
    is_validation = key.startswith("val_")
    paths = _validation_paths(data)
    if key == "val_split" and paths == [None] and data.get("dataset_name") is not None:
        return Refuse("there is no data.val_data_path beside it: describe data.train and data.validation instead")
    path = paths[0] if is_validation and paths else data.get("train_data_path")
    action = key_of(kind, _FLAT[key], value, {**data, "data_path": path})
    if data.get("dataset_name") is None and action == NOTHING:
        return Refuse("it describes data.dataset_name, which is not set: write it into data.train")
    return _seeded(action, key, value, config)


def _seeded(action: Action, key: str, value: Any, config: Config) -> Action:
    """The seed of the run is no other one."""
    seeds = (config.get(f"{section}.seed") for section in ("grpo", "sft", "dpo", "rm", "distillation"))
    return NOTHING if key == "seed" and value in seeds else action


def _described(config: Config, section: str) -> Sequence[Spec]:
    """The data sets of `data.train` or `data.validation` that are described in NeMo RL's keys."""
    held = config.get(f"data.{section}")
    datasets = held if isinstance(held, list) else [held]
    return [one for one in datasets if isinstance(one, dict) and "name" not in one]


def _around(config: Config) -> Spec:
    """What holds for all data sets of v0.5."""
    default = config.get("data.default")
    return {"env_name": config.get("data.env_name"), **(default if isinstance(default, dict) else {})}


def _nested(kind: Kind, split: str, dataset: Any, config: Config) -> Action | None:
    """`data.train` and `data.validation` of v0.5, on top of `data.default`; a list is one data set after the other."""
    if dataset is None or (isinstance(dataset, dict) and "name" in dataset):
        return NOTHING if dataset is None else None
    around = _around(config)
    if isinstance(dataset, list) and all(isinstance(one, dict) for one in dataset):
        return _several(kind, split, dataset, around)
    if not isinstance(dataset, dict):
        return Refuse("a data set is a section: write dataset_name and what describes it")
    spec = _whole(kind, split, dataset, around)
    if isinstance(spec, Refuse):
        return spec
    share = {**around, **dataset}.get("split_validation_size") if split == "train" else None
    divided = {"data.split_validation_size": share} if isinstance(share, int | float) and share else {}
    return Add({f"data.{split}": spec, **divided})


def _several(kind: Kind, split: str, datasets: Sequence[Spec], around: Spec) -> Action:
    """Data sets one after the other: a mixture by size."""
    parts: list[Spec] = []
    for dataset in datasets:
        whole = {**around, **dataset}
        if whole.get("repeat", 1) != 1 or whole.get("split_validation_size"):
            return Refuse(
                "data sets of a list are neither repeated nor divided one by one: name data.validation itself"
            )
        spec = _whole(kind, split, dataset, around)
        if isinstance(spec, Refuse):
            return spec
        parts.append({"weight": None, "data": spec})
    return Add({f"data.{split}": {"name": "mixture", "datasets": parts}})


def _whole(kind: Kind, split: str, dataset: Spec, around: Spec) -> dict[str, Any] | Refuse:
    """The description of a data set with the words of its own; those of `data.default` stand in `data`."""
    words: dict[str, Any] = dict(prompts_of(dataset.get("prompt_file")))
    if "prompt_file" in dataset and not words and around.get("prompt_file") is not None:
        words["prompt"] = "{}"
    if (system := dataset.get("system_prompt_file")) is not None:
        words["system_prompt_file"] = system
    elif "system_prompt_file" in dataset and around.get("system_prompt_file") is not None:
        return Refuse("a system prompt cannot be taken back: name system_prompt_file in the data sets that have one")
    spec = spec_of(kind, {**around, **dataset}, split)
    if isinstance(spec, Refuse):
        return spec
    if spec["name"] == "mixture":
        return {**spec, "datasets": [{"data": {**part["data"], **words}} for part in spec["datasets"]]}
    return {**spec, **words}


def _nested_key(kind: Kind, split: str, key: str, value: Any, config: Config) -> Action | None:
    """One key of `data.train` or `data.validation`; those of today's form are none of ours."""
    around = _around(config)
    own = [one for one in _described(config, split) if key in one and one[key] == value]
    if not own:
        return None
    if key == "split_validation_size" and split == "validation" and value:
        return Refuse("data for validation are not divided: leave it out")
    return _worst([key_of(kind, key, value, {**around, **one}) for one in own], key, value, config)


def _default_key(kind: Kind, key: str, value: Any, config: Config) -> Action:
    """One key of `data.default`, which may have no meaning for some of the data sets."""
    if value is None:
        return NOTHING
    if key in ("prompt_file", "system_prompt_file"):
        return prompt_file(value, config) if key == "prompt_file" else Set({f"data.{key}": value})
    around = _around(config)
    heirs = [one for split in ("train", "validation") for one in _described(config, split) if key not in one]
    answers = [key_of(kind, key, value, {**around, **one}) for one in heirs]
    useful = [answer for answer in answers if not isinstance(answer, Refuse)]
    if not heirs:
        return Ignore("every data set says it itself, or is described in the keys of this version")
    return _worst(useful or answers, key, value, config)


def _worst(answers: Sequence[Action], key: str, value: Any, config: Config) -> Action:
    """Of what several data sets say about a key, what has to be told."""
    told = next((one for kind in (Refuse, Only, Ignore) for one in answers if isinstance(one, kind)), answers[0])
    return _seeded(told, key, value, config)


def _default(default: Any, _: Config) -> Action | None:
    return None if default is None or isinstance(default, dict) else Refuse("it is a section: write its keys into it")


def prompt_file(file: Any, _: Config) -> Action:
    """`data.prompt_file` in today's keys."""
    return Set({f"data.{key}": value for key, value in prompts_of(file).items()})


def _prompt_limit(limit: Any, _: Config) -> Action | None:
    """NeMo RL takes longer prompts out of the loss."""
    return None if limit is None else Set({"data.max_input_seq_length": limit, "data.too_long": "skip"})


_TEMPLATE = Ignore("the chat template decides what surrounds a message")


def data_keys(kind: Kind) -> Table:
    """The table of the section `data` of algorithms that learn from tasks, or from examples."""
    return {
        "data.max_input_seq_length": Convert(_prompt_limit),
        "data.dataset_name": Convert(partial(_flat, kind)),
        "data.train": Convert(partial(_nested, kind, "train")),
        "data.validation": Convert(partial(_nested, kind, "validation")),
        "data.default": Convert(_default),
        **_dataset_tables(kind),
        "data.prompt_file": Convert(prompt_file),
        "data.use_multiple_dataloader": Only((False,), Refuse("this version reads one data set")),
        "data.num_prompts_per_dataloader": NOTHING,  # use_multiple_dataloader says it
        "data.add_bos": _TEMPLATE,
        "data.add_eos": _TEMPLATE,
        "data.add_generation_prompt": _TEMPLATE,
        "data.add_system_prompt": _TEMPLATE,
    }


def _dataset_tables(kind: Kind) -> Table:
    """The keys of a data set, in each of the places where they may stand."""
    table: dict[str, Action] = {f"data.{key}": Convert(partial(_flat_key, kind, key)) for key in _FLAT}
    for key in DATASET_KEYS:
        table[f"data.default.{key}"] = Convert(partial(_default_key, kind, key))
        for split in ("train", "validation"):
            table[f"data.{split}.{key}"] = Convert(partial(_nested_key, kind, split, key))
    return table
