"""Adapters in the format of PEFT: a folder with `adapter_config.json` and `adapter_model.safetensors`.

`peft.PeftModel.from_pretrained(model, folder)` loads what is written here, and so do samplers that take adapters. What
PEFT wrote is read, as long as it is plain LoRA of the layers, rank and scale that the run is configured with.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from nemo_rl.errors import CheckpointError, ConfigError, ModelError
from nemo_rl.models.causal_lm import VALUE_HEAD
from nemo_rl.models.lora import Adapters

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_VARIANTS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication")
"""Settings of PEFT with which an adapter is something else than scale * B A."""


def adapter_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Stream what is trained of a model with adapters, by PEFT's names; a value head is none of its concern."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not name.startswith(VALUE_HEAD):
            yield _PREFIX + name, parameter.detach()


def adapter_config(module: PreTrainedModel, adapters: Adapters, base: str) -> dict[str, Any]:
    """What `adapter_config.json` says.

    Args:
        module: the model with its adapters.
        adapters: of that model.
        base: folder or hub name of the model without them.
    """
    names = {name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    ends = {name.rpartition(".")[2] for name in adapters.layers}
    meant = {name for name in names if name.rpartition(".")[2] in ends and not name.endswith((".lora_A", ".lora_B"))}
    heads = [name for name, _ in module.named_children() if name == "score"]
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if heads else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapters.config.dim,
        "lora_alpha": adapters.config.alpha,
        "lora_dropout": adapters.config.dropout,
        "target_modules": sorted(ends if meant == set(adapters.layers) else adapters.layers),
        "modules_to_save": heads or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def save_adapter(folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write an adapter: its whole weights by PEFT's names, and its configuration (`adapter_config`).

    Raises:
        CheckpointError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: weight.to("cpu").contiguous() for name, weight in weights.items()}
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
        (folder / _CONFIG).write_text(json.dumps(config, indent=2))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the adapter {folder} ({error})") from error


@torch.no_grad()
def load_adapter(module: PreTrainedModel, adapters: Adapters, folder: Path) -> None:
    """Start from the adapters in `folder`; heads that it does not hold stay as they are.

    Raises:
        ModelError: the folder holds no adapter, or one of other layers.
        ConfigError: it is not plain LoRA of the rank and the scale that are configured.
    """
    try:
        config: Mapping[str, Any] = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        saved = load_file(folder / _WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"cannot load an adapter from {folder} ({error})") from error
    found = (config.get("peft_type"), config.get("r"), config.get("lora_alpha"))
    expected = ("LORA", adapters.config.dim, adapters.config.alpha)
    if found != expected:
        raise ConfigError(
            f"the adapter {folder} is {found[0]} with r={found[1]} and lora_alpha={found[2]}: set lora_cfg.dim and "
            f"alpha, which are {expected[1]} and {expected[2]}, to that, or name a LoRA adapter"
        )
    if odd := next((name for name in _VARIANTS if config.get(name)), None):
        raise ConfigError(f"the adapter {folder} has {odd}, which is not plain LoRA: name another one")
    targets = dict(adapter_weights(module))
    needed = {name for name in targets if ".lora_" in name}
    if odd := sorted((needed - saved.keys()) | (saved.keys() - targets.keys())):
        raise ModelError(
            f"the adapter {folder} and lora_cfg are of different layers, the first is {odd[0].removeprefix(_PREFIX)}: "
            "set lora_cfg.target_modules to those of its adapter_config.json"
        )
    for name, weight in saved.items():
        if weight.shape != targets[name].shape:
            raise ModelError(f"the adapter {folder} is of another model: {name} has the shape {tuple(weight.shape)}")
        targets[name].copy_(weight)
