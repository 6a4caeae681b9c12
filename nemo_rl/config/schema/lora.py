"""Section `lora_cfg`: adapters that are trained instead of the weights."""

from fnmatch import fnmatchcase
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nemo_rl.config.schema.base import PositiveInt, Section, conflict

type Names = Annotated[tuple[str, ...], Field(strict=False)]


class LoRAConfig(Section):
    """Train adapters of low rank beside frozen weights (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    enabled: bool = False
    """Train adapters instead of the weights: a layer becomes W x + alpha / dim * B A x, and only A and B change."""

    target_modules: Names = ()
    """Linear layers that get an adapter, by the end of their names (`q_proj`, `self_attn.q_proj`) or by a pattern of
    the whole name (`*_proj`, `*.layers.0.*`); empty is every linear layer but the head."""

    exclude_modules: Names = ()
    """Linear layers that get none, named in the same way."""

    match_all_linear: bool = False
    """Every linear layer but the head gets an adapter; what an empty `target_modules` means too."""

    dim: PositiveInt = 8
    """Rank of the adapters."""

    alpha: PositiveInt = 32
    """Scale of the adapters: what they add is multiplied by `alpha / dim`."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapters' numbers that is left out in training; for runs that compare no probabilities."""

    dropout_position: Literal["pre", "post"] = "post"
    """Leave out inputs of the adapters (`pre`) or outputs (`post`)."""

    lora_A_init: Literal["xavier", "uniform"] = "xavier"
    """How A starts: normal by Glorot's rule, or uniform by He's as PEFT has it. B starts at zero."""

    quantize: Literal["none", "nf4", "int8"] = "none"
    """Keep the frozen linear layers, the head aside, in 4 bits (`nf4`, QLoRA, https://arxiv.org/abs/2305.14314) or in 8
    (`int8`)."""

    restore_from: str | None = None
    """Folder of an adapter in PEFT's format that the run starts from; the reference policy is the model with it."""

    def adapts(self, name: str) -> bool:
        """Whether a linear layer of the trunk gets an adapter."""
        targets = () if self.match_all_linear else self.target_modules
        chosen = not targets or any(is_named(name, pattern) for pattern in targets)
        return chosen and not any(is_named(name, pattern) for pattern in self.exclude_modules)

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if self.match_all_linear and self.target_modules:
            raise conflict(
                "lora_cfg.match_all_linear and target_modules say different things: keep one of them",
                "match_all_linear",
                "target_modules",
            )
        needing = {"quantize": self.quantize != "none", "restore_from": self.restore_from is not None}
        if not self.enabled and (name := next((name for name, is_set in needing.items() if is_set), None)):
            raise conflict(f"lora_cfg.{name} is for adapters: set lora_cfg.enabled to true", name, "enabled")
        return self


def is_named(name: str, pattern: str) -> bool:
    """Whether a pattern means the module of this dotted name: the whole of it, or its last parts."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
