"""LoRA: adapters of low rank beside the frozen linear layers of a model (Hu et al. 2021, arXiv:2106.09685).

An adapted layer computes W x + b + (alpha / dim) B A x. B starts at zero, so a fresh adapter changes nothing. The layer
keeps the name and the weight of the one it takes the place of, its adapter stands beside them as `lora_A.weight` and
`lora_B.weight`, in float32 whatever the precision of the model: these are what the optimizer steps.
"""

import difflib
import math
import zlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nemo_rl.config.schema.lora import LoRAConfig, is_named
from nemo_rl.errors import ConfigError
from nemo_rl.models.causal_lm import VALUE_HEAD
from nemo_rl.models.load import Identity
from nemo_rl.models.quantize import FrozenLinear

_SEED = 0
_SAMPLE = 256
"""Numbers of every weight that tell one base model from another."""


class LoRALinear(FrozenLinear):
    """A frozen linear layer with an adapter; dropout acts within `Adapters.dropout` alone."""

    def __init__(self, layer: nn.Linear, config: LoRAConfig, generator: torch.Generator) -> None:
        """Take over weight and bias of `layer`; A is drawn from `generator`."""
        super().__init__(layer)
        self.scale = config.alpha / config.dim
        self._dropout, self._drops_inputs = config.dropout, config.dropout_position == "pre"
        a, b = torch.empty(config.dim, layer.in_features), torch.zeros(layer.out_features, config.dim)
        if config.lora_A_init == "xavier":
            nn.init.xavier_normal_(a, generator=generator)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.lora_A, self.lora_B = _linear(a, layer.weight.device), _linear(b, layer.weight.device)
        self.eval()

    def forward(self, input: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs], in the dtype of the input."""
        a, b = self.lora_A.weight.to(input.dtype), self.lora_B.weight.to(input.dtype)
        if self._drops_inputs:
            return super().forward(input) + F.linear(F.linear(self._drop(input), a), b) * self.scale
        return super().forward(input) + self._drop(F.linear(F.linear(input, a), b) * self.scale)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self._dropout, self.training)

    @torch.no_grad()
    def whole(self) -> Tensor:
        """W + (alpha / dim) B A, [outputs, inputs], added in float32 and rounded to the dtype of W."""
        return (super().whole().float() + self.lora_B.weight @ self.lora_A.weight * self.scale).to(self.dtype)


def _linear(weight: Tensor, device: torch.device) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.to(device))
    return layer


@dataclass(frozen=True, slots=True)
class Adapters:
    """The adapters of a model.

    Attributes:
        config: how they were made.
        layers: the adapted layers by name.
        identity: which frozen weights they belong to, and their scale, which no shape tells.
    """

    config: LoRAConfig
    layers: Mapping[str, LoRALinear]
    identity: Identity

    @contextmanager
    def dropout(self, seed: int) -> Generator[None]:
        """Let dropout act, equal for equal seeds; the random numbers of others are left alone."""
        if not self.config.dropout:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                for layer in self.layers.values():
                    layer.train()
                yield
            finally:
                for layer in self.layers.values():
                    layer.eval()


def add_adapters(module: PreTrainedModel, config: LoRAConfig, device: torch.device) -> Adapters:
    """Freeze a model, compress it if asked to, put adapters into its trunk and move it to `device`.

    The LM head is frozen too. A head that scores (`score`) is new to the model, so it is trained whole.

    Args:
        module: a loaded model, on any device.
        config: which layers, and how.
        device: where the model is to be; it never has to hold weights that are about to be compressed.

    Raises:
        ConfigError: a name means no layer that can have an adapter, or no layer is left.
        ModelError: a weight cannot be compressed as asked.
    """
    trunk, prefix = module.base_model, f"{module.base_model_prefix}."
    linears = [prefix + name for name, layer in trunk.named_modules() if isinstance(layer, nn.Linear)]
    _check_names(module, config, linears)
    for name, parameter in module.named_parameters():
        is_new = name.startswith("score.")
        parameter.requires_grad_(is_new)
        if is_new:
            parameter.data = parameter.data.float()  # as all that is trained beside frozen weights
    identity = {"base weights": _fingerprint(module), "LoRA alpha": config.alpha, "quantized": config.quantize}
    generator = torch.Generator().manual_seed(_SEED)
    layers: dict[str, LoRALinear] = {}
    for name in linears:
        layer = cast(nn.Linear, module.get_submodule(name))
        if config.quantize != "none":
            layer = FrozenLinear(layer.to(device))
            layer.compress(config.quantize)
        if config.adapts(name):
            layer = layers[name] = LoRALinear(layer, config, generator)
        module.set_submodule(name, layer)
    nn.Module.to(module, device)
    return Adapters(config, layers, identity)


def whole_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Stream the weights that a model computes with, by Hugging Face name, tied ones once.

    Adapters are added to the weights they stand beside, compressed weights are restored, and a value head is left out.
    """
    frozen = {name: layer for name, layer in module.named_modules() if isinstance(layer, FrozenLinear)}
    for name, parameter in module.named_parameters():
        owner, _, kind = name.rpartition(".")
        if owner in frozen and kind == "weight":
            yield name, frozen[owner].whole()
        elif not (
            (owner in frozen and kind == "scales")
            or owner.endswith((".lora_A", ".lora_B"))
            or name.startswith(VALUE_HEAD)
        ):
            yield name, parameter.detach()


def _check_names(module: PreTrainedModel, config: LoRAConfig, linears: list[str]) -> None:
    everything = [name for name, _ in module.named_modules()]
    for pattern in (*config.target_modules, *config.exclude_modules):
        is_target, is_there = pattern in config.target_modules, any(is_named(name, pattern) for name in everything)
        if any(is_named(name, pattern) for name in linears) or (is_there and not is_target):
            continue
        if is_there:
            raise ConfigError(
                f"lora_cfg: {pattern} is no linear layer of the model's trunk, and only those get adapters (embeddings "
                "and the head, which many models tie, keep their weights): leave it out"
            )
        ends = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
        close = difflib.get_close_matches(pattern.rpartition(".")[2], ends, n=3) or ends
        raise ConfigError(f"lora_cfg: the model has no linear layer {pattern}; did you mean {', '.join(close)}?")
    if not any(map(config.adapts, linears)):
        raise ConfigError("lora_cfg leaves no linear layer to adapt: name fewer in exclude_modules")


def _fingerprint(module: nn.Module) -> int:
    """A checksum of the first numbers of every weight, equal in bfloat16 and float32."""
    checksum = 0
    for _, parameter in module.named_parameters():
        sample = parameter.detach().flatten()[:_SAMPLE].to("cpu", torch.bfloat16)
        checksum = zlib.crc32(sample.contiguous().view(torch.uint8).numpy().tobytes(), checksum)
    return checksum
