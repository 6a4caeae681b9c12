"""Section `env.reward_model`, and the GPUs that it takes from the cluster."""

from typing import Any

from nemo_rl.config.nemo.actions import NOTHING, Action, Add, Config, Convert, Keep, Off, Only, Refuse, Set, Table
from nemo_rl.config.nemo.policy_keys import dtensor_keys, tokenizer_keys

_ROOT = "env.reward_model"
_NAMES = ("data.env_name", "data.default.env_name", "data.train.env_name")


def _section(section: Any, _: Config) -> Action | None:
    """NeMo RL knows an environment by its name, this library by its `type`."""
    if not isinstance(section, dict) or "type" in section:
        return None
    return Add({f"{_ROOT}.type": "reward_model"}) if section.get("enabled") else NOTHING


def _enabled(_: Any, config: Config) -> Action:
    """NeMo RL has a script whose every task goes to the reward model; here the data say who judges them."""
    if any(config.get(name) == "reward_model" for name in _NAMES):
        return NOTHING
    return Set(note="the data name their judge here: set environment: reward_model in data.train and data.validation")


def _batch_size(size: Any, config: Config) -> Action:
    """The tokens of so many conversations of full length."""
    length = config.get(f"{_ROOT}.max_model_len")
    if not isinstance(size, int) or not isinstance(length, int):
        return Refuse(f"its tokens are counted with {_ROOT}.max_model_len: give both as whole numbers")
    return Set({f"{_ROOT}.max_batch_tokens": size * length})


def _gpus(config: Config) -> Any:
    resources = config.get(f"{_ROOT}.resources")
    if not config.get(f"{_ROOT}.enabled") or not isinstance(resources, dict):
        return 0
    return resources.get("gpus_per_node", 1) * resources.get("num_nodes", 1)


def _resources(_: Any, config: Config) -> Action:
    gpus = _gpus(config)
    return Set({f"{_ROOT}.num_gpus": gpus}) if gpus <= 1 else Refuse("a reward model runs on one device: set it to 1")


def _cluster(gpus: Any, config: Config) -> Action | None:
    """NeMo RL counts the reward model's GPUs among the cluster's."""
    taken = _gpus(config)
    if not taken or not isinstance(gpus, int) or config.get("cluster.num_nodes", 1) != 1 or gpus <= taken:
        return None
    return Set({"cluster.gpus_per_node": gpus - taken})


REWARD_MODEL: Table = {
    _ROOT: Convert(_section),
    f"{_ROOT}.enabled": Convert(_enabled),
    f"{_ROOT}.batch_size": Convert(_batch_size),
    f"{_ROOT}.resources": Convert(_resources),
    f"{_ROOT}.checkpoint_path": Only((None,), Refuse(f"{_ROOT}.model_name names the folder of the model: set that")),
    f"{_ROOT}.reward_model_type": Only(("bradley_terry",), Refuse("only bradley_terry is known")),
    f"{_ROOT}.max_model_len": Keep(),
    f"{_ROOT}.logprob_batch_size": NOTHING,  # batch_size says it
    f"{_ROOT}.dynamic_batching": Off(NOTHING),
    f"{_ROOT}.sequence_packing": Off(NOTHING),
    f"{_ROOT}.max_grad_norm": NOTHING,  # a judge learns nothing
    f"{_ROOT}.optimizer": NOTHING,
    f"{_ROOT}.scheduler": NOTHING,
    f"{_ROOT}.generation": NOTHING,
    **dtensor_keys(_ROOT),
    **tokenizer_keys(f"{_ROOT}.tokenizer"),
    "cluster.gpus_per_node": Convert(_cluster),
}
