"""Loading a model for training: whole or shard by shard, with its head and its adapters, and over its ranks."""

import logging
from pathlib import Path
from typing import Literal, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nemo_rl.config.schema.moe import MoEConfig
from nemo_rl.config.schema.policy import TrainedPolicyConfig
from nemo_rl.distributed.mesh import Mesh
from nemo_rl.errors import ConfigError
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.models.load import (
    SCORE,
    empty_model,
    is_stored_as_it_is,
    load_causal_lm,
    load_scalar_model,
)
from nemo_rl.models.lora import Adapters, add_adapters
from nemo_rl.models.peft_format import load_adapter
from nemo_rl.models.precision import precision_of
from nemo_rl.models.scalar_model import ScalarModel
from nemo_rl.models.weight_files import WeightFiles, named_tensors
from nemo_rl.training.pytorch.experts import shard_experts
from nemo_rl.training.pytorch.parallelize import is_sharded, parallelize
from nemo_rl.training.pytorch.routing import Balance, use_float32_routers
from nemo_rl.training.pytorch.spread import Alone, Spread

_log = logging.getLogger(__name__)


def choose_device(device: str) -> torch.device:
    """Turn `policy.device` into a device; `auto` is the GPU when there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


type Head = Literal["language", "language_and_value", "scalar"]
"""`language`: a policy; `language_and_value`: with a critic on its trunk; `scalar`: a reward model or a critic."""


def load_model(
    config: TrainedPolicyConfig, source: str, head: Head, tokenizer: PreTrainedTokenizerBase, mesh: Mesh | None
) -> tuple[CausalLM | ScalarModel, Adapters | None, Spread]:
    """Load a model without dropout, which has no place in a ratio of probabilities, and spread it over its ranks."""
    device = choose_device(config.device) if mesh is None else mesh.device
    precision, lora = precision_of(config.precision, device), config.dtensor_cfg.lora_cfg
    offload = config.dtensor_cfg.cpu_offload
    if mesh is None and offload and device.type == "cuda":
        raise ConfigError("dtensor_cfg.cpu_offload needs ranks that meet, be it one; give the backend a mesh")
    if mesh is not None and lora.quantize != "none":
        raise ConfigError("compressed weights are not spread: set lora_cfg.quantize to none, or train in one process")
    # sharded weights that are trained are their own masters
    is_master = mesh is not None and is_sharded(mesh, config.dtensor_cfg) and not lora.enabled
    held, place = torch.float32 if is_master else precision.weights, torch.device("cpu") if offload else device
    to_fill = None if mesh is None or lora.enabled else _empty(source, head, tokenizer, held, mesh)
    if to_fill is None:
        model, adapters = _load_whole(config, source, head, tokenizer, place, held)
    else:
        model, adapters = _with_head(to_fill[0], head), None
    if balance := balance_of(config.moe, mesh):
        balance.check(model.module, model.takes_plans)
    if config.moe.float32_routers:
        use_float32_routers(model.module)
    if mesh is None:
        shard_experts(model.module)
        return model, adapters, Alone()
    model, spread = parallelize(model, mesh, config.dtensor_cfg, precision)
    if to_fill is not None:
        to_fill[1].fill(model.module, place)
    return model, adapters, spread


def _empty(
    source: str, head: Head, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, mesh: Mesh
) -> tuple[PreTrainedModel, WeightFiles] | None:
    """The model without weights, and the files out of which every rank can read its part.

    None if files are not on every rank's machine, or hold other tensors than the model has.
    """
    padding = cast("int | None", tokenizer.pad_token_id) if head == "scalar" else None
    model = empty_model(source, dtype=dtype, is_scalar=head == "scalar", pad_token_id=padding)
    files = WeightFiles.find(source)
    if files is not None and not (is_stored_as_it_is(model) and named_tensors(model).keys() - {SCORE} <= files.names):
        files = None
    if mesh.most(int(files is None)) or files is None:
        _log.info("%s is loaded whole by every rank: no files that hold the model's own tensors are here", source)
        return None
    return model, files


def _load_whole(
    config: TrainedPolicyConfig,
    source: str,
    head: Head,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[CausalLM | ScalarModel, Adapters | None]:
    lora = config.dtensor_cfg.lora_cfg
    place = device if lora.quantize == "none" else torch.device("cpu")  # until it is small enough
    if head == "scalar":
        padding = cast("int | None", tokenizer.pad_token_id)
        module, _ = load_scalar_model(source, dtype=dtype, device=place, pad_token_id=padding)
    else:
        module, _ = load_causal_lm(source, dtype=dtype, device=place)
    adapters = add_adapters(module, lora, device) if lora.enabled else None
    if adapters and lora.restore_from is not None:
        load_adapter(module, adapters, Path(lora.restore_from).expanduser())
    return _with_head(module.eval(), head), adapters


def _with_head(module: PreTrainedModel, head: Head) -> CausalLM | ScalarModel:
    if head == "scalar":
        return ScalarModel.wrap(module)
    model = CausalLM.wrap(module)
    return model.with_value_head() if head == "language_and_value" else model


def balance_of(config: MoEConfig, mesh: Mesh | None) -> Balance | None:
    """How the experts of a model are kept busy alike; None where nothing is asked for.

    Raises:
        ConfigError: ranks that divide sequences cannot count for it.
    """
    if not (config.balance_coefficient or config.bias_update_rate):
        return None
    if mesh is not None and mesh.sizes.context > 1:
        raise ConfigError(
            "experts are balanced over whole sequences; set policy.dtensor_cfg.context_parallel_size to 1, or "
            "policy.moe.balance_coefficient and policy.moe.bias_update_rate to 0"
        )
    group = None if mesh is None else mesh.sequences["data"].get_group()
    return Balance(config.balance_coefficient, config.bias_update_rate, group)
