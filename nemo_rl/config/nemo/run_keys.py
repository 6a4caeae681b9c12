"""Sections `checkpointing`, `logger`, `cluster` and `env`, which all algorithms share."""

import re
from typing import Any

from nemo_rl.config.nemo.actions import NOTHING, Action, Add, Config, Convert, Ignore, Only, Refuse, Set, Table
from nemo_rl.config.nemo.judge_keys import REWARD_MODEL

_EXPORT = "the model is exported to one safetensors folder at the end of the run (checkpointing.export_hf)"


def _metric(name: Any, _: Config) -> Action | None:
    """`val_reward` (v0.3), `val:val_loss` and `val:validation-NAME_loss` (v0.4, v0.5) in today's words."""
    if not isinstance(name, str):
        return None
    new = re.sub(r"^(train|val)_", r"\1:", name)
    new = re.sub(r"^(?:val:)?validation-(?P<set>.+)_(?P<metric>[a-z]+)$", r"val:\g<metric>", new)
    new = {"val:reward": "val:accuracy", "val:val_loss": "val:loss"}.get(new, new)
    return Set({"checkpointing.metric_name": new})


CHECKPOINTING: Table = {
    "checkpointing.metric_name": Convert(_metric),
    "checkpointing.model_save_format": Only((None, "safetensors"), Ignore(_EXPORT)),
    "checkpointing.save_consolidated": Only((None, False, "false"), Ignore(_EXPORT)),
    "checkpointing.save_optimizer": Only((True,), Ignore("a checkpoint holds the optimizer, or it could not continue")),
    "checkpointing.is_async": Only((None, False), Ignore("checkpoints are written before the next step")),
    "checkpointing.is_peft": Only((None, False), Ignore("all weights are trained and saved")),
    "checkpointing.peft_config": Only((None, {}), Ignore("all weights are trained and saved")),
    "checkpointing.model_cache_dir": Only((None,), Ignore("models are cached where the hub's client keeps them")),
    "checkpointing.model_repo_id": Only((None,), Ignore("the name of the model is policy.model_name")),
}

LOGGER: Table = {
    "logger.swanlab_enabled": Only((False,), Ignore("there is no SwanLab sink: metrics.jsonl has every metric")),
    "logger.swanlab": NOTHING,  # its switch says it
    "logger.monitor_gpus": Only((False,), Ignore("the use of the GPUs is not recorded")),
    "logger.gpu_monitoring": NOTHING,  # its switch says it
    "logger.tensorboard.log_dir": Ignore("events stand in the folder of the logs"),
    "logger.wandb.entity": Ignore("runs belong to the default entity of the account (WANDB_ENTITY)"),
    "logger.mlflow.run_id": Ignore("a resumed run is a run of its own"),
    "logger.mlflow.artifact_location": Ignore("artifacts stand where the tracking server keeps them"),
}

CLUSTER: Table = {
    "cluster.master_port_range_low": Ignore("ports are chosen by the system"),
    "cluster.master_port_range_high": Ignore("ports are chosen by the system"),
    "cluster.segment_size": Only((None,), Ignore("nodes are not ordered by their network")),
}


def _has_type(section: Any) -> bool:
    return not isinstance(section, dict) or "type" in section


def _math(section: Any, _: Config) -> Action | None:
    """NeMo RL knows an environment by its name, this library by its `type`."""
    return None if _has_type(section) else Add({"env.math.type": "math"})


def _other(section: Any, _: Config) -> Action | None:
    if _has_type(section):
        return None
    return Refuse(
        "of NeMo RL's environments there are math and reward_model: use env.NAME: {type: function, path:"
        " 'module:function'}"
    )


ENVIRONMENTS: Table = {
    **REWARD_MODEL,
    "env.math": Convert(_math),
    "env.math.math_verify_impl": Only((None, "hf_math_verify"), Refuse("answers are compared by math-verify alone")),
    "env.math.verifier_type": Only((None, "math"), Refuse("answers are compared as mathematics alone")),
    "env.math.stop_strings": Only((None,), Refuse("set policy.generation.stop_strings")),
    "env.*": Convert(_other),
}

RUN = {**CHECKPOINTING, **LOGGER, **CLUSTER}
