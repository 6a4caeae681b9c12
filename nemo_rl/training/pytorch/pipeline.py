"""Pipeline parallelism: ranks hold different layers, and micro-batches run through them under one of torch's schedules.

The layers are divided into stages, contiguous and of about equal number. A rank keeps the layers of its stages in the
model at their places, so that every parameter keeps its name; the others are passed over. The first stage embeds, the
last one scores. Streams of a step are padded to one length, because what passes between ranks has one shape.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from nemo_rl.data.packing import Stream
from nemo_rl.data.padding import pad_stream
from nemo_rl.errors import ConfigError
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.models.scalar_model import ScalarModel

type Schedule = Literal["GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble"]

SPLITS_BACKWARD: frozenset[str] = frozenset({"InterleavedZeroBubble", "ZBVZeroBubble"})
"""Schedules that compute the gradients of activations first and those of weights later (Qi et al. 2023,
https://arxiv.org/abs/2401.10241); sharded weights do not follow."""

_FAMILIES = frozenset(
    {"llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "phi3", "smollm3", "gemma3_text", "deepseek_v3"}
)
"""Families whose trunk does nothing between embedding, layers and norm."""


@dataclass(frozen=True, slots=True)
class Part:
    """A micro-batch on its way through the stages.

    Attributes:
        stream: as the model sees it.
        finish: called in the last stage with the last hidden states [S, H]; returns the loss [] where one is asked for.
    """

    stream: Stream
    finish: Callable[[Tensor], Tensor | None]


def stages_of(rank: int, num_ranks: int, schedule: str, per_rank: int) -> list[int]:
    """Which stages a rank holds, in rising order: every `num_ranks`-th, or for `ZBVZeroBubble` down and up again."""
    if schedule == "ZBVZeroBubble":
        return [rank, 2 * num_ranks - 1 - rank]
    return list(range(rank, num_ranks * per_rank, num_ranks))


def layers_of(stage: int, num_stages: int, num_layers: int) -> range:
    """Which layers a stage holds; the first stages have one more where they do not divide evenly."""
    size, rest = divmod(num_layers, num_stages)
    start = stage * size + min(stage, rest)
    return range(start, start + size + (stage < rest))


class _PassedOver(nn.Module):
    """In the place of a layer that another rank holds."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(original, "attention_type", None)  # some trunks choose a mask by it

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


class Stage(nn.Module):
    """A run of layers with what stands before the first and behind the last of the model."""

    def __init__(self, model: CausalLM | ScalarModel, index: int, num_stages: int, layers: Sequence[int]) -> None:
        """Take the layers of a model by their numbers; parameters are shared with it."""
        super().__init__()
        self.index, self.is_first, self.is_last = index, index == 0, index == num_stages - 1
        trunk = copy.copy(model.trunk)
        trunk._modules = dict(model.trunk._modules)
        all_layers = cast(nn.ModuleList, model.trunk.layers)
        trunk.layers = nn.ModuleList(
            layer if number in layers else _PassedOver(layer) for number, layer in enumerate(all_layers)
        )
        if not self.is_last:
            trunk.norm = nn.Identity()
        self.trunk = trunk
        self.model: list[CausalLM | ScalarModel] = [replace(model, trunk=trunk)]  # in a list: not a second owner
        self.parts: Sequence[Part] = ()

    def forward(self, received: Tensor, *, number: Tensor) -> Tensor:
        """Run micro-batch `number` int64 [1] on what the stage before gives: hidden states, or the loss in the end."""
        part, model = self.parts[int(number)], self.model[0]

        def run() -> Tensor:
            hidden = model.stream_hidden(part.stream, None if self.is_first else received)
            if not self.is_last:
                return hidden[None]
            loss = part.finish(hidden)
            return hidden.new_zeros(()) if loss is None else loss

        return model.runner.run(run)


class Pipeline:
    """The stages of this rank, and the schedule under which micro-batches run through all of them."""

    def __init__(
        self, model: CausalLM | ScalarModel, mesh: DeviceMesh, schedule: str, per_rank: int, dtype: torch.dtype
    ) -> None:
        """Make the stages of a model that `keep_stages` has cut down.

        Args:
            model: with the layers of this rank.
            mesh: the ranks of the pipeline.
            schedule: in torch's words.
            per_rank: stages of a rank.
            dtype: of the hidden states that pass between stages.
        """
        self._mesh, self._schedule, self._dtype = mesh, schedule, dtype
        self._num_stages = mesh.size() * per_rank
        self._hidden_size = int(model.module.config.get_text_config().hidden_size)
        self._device, self._multiple = model.device, model.runner.multiple
        num_layers = len(cast(nn.ModuleList, model.trunk.layers))
        own = stages_of(mesh.get_local_rank(), mesh.size(), schedule, per_rank)
        self._stages = [Stage(model, i, self._num_stages, layers_of(i, self._num_stages, num_layers)) for i in own]

    @property
    def is_last(self) -> bool:
        """Whether this rank holds the last stage, which alone has results."""
        return self._stages[-1].is_last

    def count(self, num_parts: int) -> int:
        """How many micro-batches must run at least so that these can, for the schedule to be possible."""
        ranks = self._mesh.size()
        least = max(num_parts, self._num_stages)
        return least if self._schedule in ("GPipe", "1F1B") else -(-least // ranks) * ranks

    def train(self, parts: Sequence[Part]) -> None:
        """Run forward and backward for all of them; the gradients are added to those that are there."""
        parts, width = self._aligned(parts)
        numbers = torch.arange(len(parts), device=self._device)
        stages = [self._torch_stage(stage, width) for stage in self._stages]
        kind = get_schedule_class(self._schedule)
        given: Any = stages[0] if issubclass(kind, PipelineScheduleSingle) else stages
        schedule = kind(given, len(parts), loss_fn=lambda loss, _: loss, scale_grads=False)
        for stage in self._stages:
            stage.parts = parts
        args = (numbers,) if self._stages[0].is_first else ()
        target = torch.zeros(len(parts), device=self._device) if self.is_last else None
        schedule.step(*args, target=target, return_outputs=False, number=numbers)
        self._forget()

    @torch.no_grad()
    def score(self, parts: Sequence[Part]) -> None:
        """Run forward for all of them."""
        parts, width = self._aligned(parts)
        for stage in self._stages:
            stage.parts = parts
        for number in range(len(parts)):
            for stage in self._stages:
                self._forward(stage, number, width)
        self._forget()

    def _forward(self, stage: Stage, number: int, width: int) -> None:
        group, ranks = self._mesh.get_group(), self._mesh.mesh.flatten().tolist()
        holder = {
            index: ranks[rank]
            for rank in range(len(ranks))
            for index in stages_of(rank, len(ranks), self._schedule, len(self._stages))
        }
        received = torch.empty(0, device=self._device)
        if not stage.is_first:
            source = holder[stage.index - 1]
            if source == dist.get_rank():
                received = self._handed_over
            else:
                received = torch.empty(1, width, self._hidden_size, dtype=self._dtype, device=self._device)
                dist.recv(received, source, group)
        output = stage(received, number=torch.tensor([number]))
        if not stage.is_last:
            target = holder[stage.index + 1]
            if target == dist.get_rank():
                self._handed_over = output
            else:
                dist.send(output.contiguous(), target, group)

    def _aligned(self, parts: Sequence[Part]) -> tuple[list[Part], int]:
        """The parts with streams of one length, and the tokens of it that a rank holds."""
        longest = max(len(part.stream.input_ids) for part in parts)
        longest += -longest % self._multiple
        return [replace(part, stream=pad_stream(part.stream, longest)) for part in parts], longest // self._multiple

    def _torch_stage(self, stage: Stage, width: int) -> PipelineStage:
        hidden = torch.empty(1, width, self._hidden_size, dtype=self._dtype, device="meta")
        number, loss = torch.zeros(1, dtype=torch.int64, device="meta"), torch.zeros((), device="meta")
        return PipelineStage(
            stage,
            stage.index,
            self._num_stages,
            self._device,
            input_args=number if stage.is_first else hidden.requires_grad_(),
            output_args=loss.requires_grad_() if stage.is_last else hidden.detach().requires_grad_(),
            group=self._mesh.get_group(),
        )

    def _forget(self) -> None:
        for stage in self._stages:
            stage.parts = ()


def keep_stages[M: (CausalLM, ScalarModel)](model: M, mesh: DeviceMesh, schedule: str, per_rank: int) -> M:
    """Cut a whole model down to what this rank of a pipeline holds; parameters keep their names.

    Args:
        model: whole.
        mesh: the ranks of the pipeline.
        schedule: in torch's words.
        per_rank: stages of a rank.

    Raises:
        ConfigError: the model cannot be divided that way.
    """
    trunk, module = model.trunk, model.module
    layers = cast(nn.ModuleList, trunk.layers)
    num_stages = mesh.size() * per_rank
    family = module.config.get_text_config().model_type
    if family not in _FAMILIES:
        raise ConfigError(
            f"the trunk of {family} cannot be divided into stages; set policy.dtensor_cfg.pipeline_parallel_size to 1"
        )
    if len(layers) < num_stages:
        raise ConfigError(
            f"{len(layers)} layers do not fill {num_stages} pipeline stages; lower pipeline_parallel_size or "
            "pipeline_stages_per_rank"
        )
    own = stages_of(mesh.get_local_rank(), mesh.size(), schedule, per_rank)
    kept = {layer for stage in own for layer in layers_of(stage, num_stages, len(layers))}
    for number, layer in enumerate(layers):
        if number not in kept:
            layers[number] = _PassedOver(layer)
    has_head = num_stages - 1 in own
    if not has_head:
        trunk.norm = nn.Identity()
        model = _without_head(model)
    if 0 not in own and not (has_head and _is_tied(model)):
        trunk.embed_tokens = nn.Identity()
    return model


def _is_tied(model: CausalLM | ScalarModel) -> bool:
    return isinstance(model, CausalLM) and model.head.weight is model.module.get_input_embeddings().weight


def _without_head[M: (CausalLM, ScalarModel)](model: M) -> M:
    """The model without the memory of its head, which another rank holds."""
    head = model.head if isinstance(model, CausalLM) else model.score
    empty = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    for name, child in list(model.module.named_children()):
        if child is head:
            setattr(model.module, name, nn.Identity())
    if isinstance(model, CausalLM):
        return replace(model, head=empty)
    return replace(model, score=empty)
