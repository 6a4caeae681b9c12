"""Pipeline parallelism: ranks hold different layers, and micro-batches run through them under one of torch's schedules.

The layers are divided into stages, contiguous and of about equal number. A rank keeps the layers of its stages in the
model at their places, so that every parameter keeps its name; the others are passed over. The first stage embeds, the
last one scores. Streams of a step are padded to one length, because what passes between ranks has one shape.
"""

import copy
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from nemo_rl.data.padding import pad_stream
from nemo_rl.errors import BackendError, ConfigError, NemoRLError
from nemo_rl.models.causal_lm import VALUE_HEAD, CausalLM
from nemo_rl.models.precision import Precision
from nemo_rl.models.scalar_model import ScalarModel
from nemo_rl.training.passes import Pass, arithmetic

type Schedule = Literal["GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble"]

_FAMILIES = frozenset(
    {"llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "phi3", "smollm3", "gemma3_text", "deepseek_v3"}
)
"""Families whose trunk does nothing between embedding, layers and norm."""


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

    def __init__(
        self,
        model: CausalLM | ScalarModel,
        index: int,
        num_stages: int,
        layers: Sequence[int],
        autocast: torch.dtype | None,
    ) -> None:
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
        if self.is_last:  # where torch's schedules look for parameters
            self.heads = nn.ModuleList(child for child in model.module.children() if child is not model.trunk)
        self.model: list[CausalLM | ScalarModel] = [replace(model, trunk=trunk)]  # in a list: not a second owner
        self.autocast = autocast
        self.passes: Sequence[Pass] = ()
        self.found: list[Any] = []

    def forward(self, received: Tensor, *, number: Tensor) -> Tensor:
        """Run micro-batch `number` int64 [1] on what the stage before gives: hidden states, or the loss in the end."""
        one, model = self.passes[int(number)], self.model[0]

        def run() -> Tensor:
            with arithmetic(model, self.autocast), one.within():
                hidden = model.read(one.stream, None if self.is_first else received)
            if not self.is_last:
                return hidden.states[None].clone()  # torch's schedules detach it in place, which a view forbids
            found = one.finish(hidden)
            if isinstance(found, Tensor):
                return found / model.runner.copies
            self.found.append(found)
            return received.new_zeros(())

        return model.runner.run(run)


class Pipeline:
    """The stages of this rank, and the schedule under which micro-batches run through all of them."""

    def __init__(
        self, model: CausalLM | ScalarModel, mesh: DeviceMesh, schedule: str, per_rank: int, precision: Precision
    ) -> None:
        """Make the stages of a model that `keep_stages` has cut down.

        Args:
            model: with the layers of this rank.
            mesh: the ranks of the pipeline.
            schedule: in torch's words.
            per_rank: stages of a rank.
            precision: of the model; the hidden states that pass between stages are in its weights' dtype.
        """
        self._mesh, self._schedule, self._dtype = mesh, schedule, precision.weights
        self._num_stages = mesh.size() * per_rank
        self._hidden_size = int(model.module.config.get_text_config().hidden_size)
        self._model, self._parts = model, model.runner.parts
        num_layers = len(cast(nn.ModuleList, model.trunk.layers))
        self._stages = [
            Stage(model, i, self._num_stages, layers_of(i, self._num_stages, num_layers), precision.autocast)
            for i in stages_of(mesh.get_local_rank(), mesh.size(), schedule, per_rank)
        ]

    @property
    def _device(self) -> torch.device:
        return self._model.device  # an empty model has none until it is filled

    @property
    def holds_both_ends(self) -> bool:
        """Whether the first and the last stage are on one rank."""
        return self._stages[0].is_first and self._stages[-1].is_last

    def count(self, num_passes: int) -> int:
        """How many micro-batches must be run for the schedule to be possible."""
        if not num_passes:
            return 0
        ranks = self._mesh.size()
        least = max(num_passes, self._num_stages)
        return least if self._schedule in ("GPipe", "1F1B") else -(-least // ranks) * ranks

    def train(self, passes: Iterable[Pass]) -> int:
        """Run forward and backward for all of them under the schedule."""
        given, width = self._aligned(passes)
        if not given:
            return 0
        if not all(one.trunk_learns for one in given):
            raise BackendError(
                "a head cannot be trained alone on a trunk in pipeline stages; set policy.dtensor_cfg."
                "pipeline_parallel_size to 1"
            )
        numbers = torch.arange(len(given), device=self._device)
        stages = [self._torch_stage(stage, width) for stage in self._stages]
        kind = get_schedule_class(self._schedule)
        these: Any = stages[0] if issubclass(kind, PipelineScheduleSingle) else stages
        schedule = kind(these, len(given), loss_fn=lambda loss, _: loss, scale_grads=False)
        with self._running(given):
            args = (numbers,) if self._stages[0].is_first else ()
            target = torch.zeros(len(given), device=self._device) if self._stages[-1].is_last else None
            schedule.step(*args, target=target, return_outputs=False, number=numbers)
        return len(given)

    def score(self, passes: Iterable[Pass]) -> Iterator[Any]:
        """Run forward for all of them; only the rank of the last stage has something to give."""
        given, width = self._aligned(passes)
        with self._running(given), torch.no_grad():
            for number in range(len(given)):
                handed_over = torch.empty(0, device=self._device)
                for stage in self._stages:
                    handed_over = self._forward(stage, number, width, handed_over)
            found = self._stages[-1].found
        return iter(found)

    def _forward(self, stage: Stage, number: int, width: int, handed_over: Tensor) -> Tensor:
        """Run one micro-batch through one stage of this rank, with what comes from another rank or this one before."""
        group, own = self._mesh.get_group(), self._mesh.get_local_rank()
        received = handed_over
        if not stage.is_first and (source := self._holder(stage.index - 1)) != own:
            received = torch.empty(1, width, self._hidden_size, dtype=self._dtype, device=self._device)
            dist.recv(received, group=group, group_src=source)
        output = stage(received, number=torch.tensor([number]))
        if not stage.is_last and (target := self._holder(stage.index + 1)) != own:
            dist.send(output.contiguous(), group=group, group_dst=target)
        return output

    def _holder(self, stage: int) -> int:
        """The rank within the pipeline that holds a stage."""
        size, per_rank = self._mesh.size(), len(self._stages)
        return next(rank for rank in range(size) if stage in stages_of(rank, size, self._schedule, per_rank))

    def _aligned(self, passes: Iterable[Pass]) -> tuple[list[Pass], int]:
        """All of them, with streams of one length, and the tokens of it that pass between ranks."""
        given = list(passes)
        longest = max((len(one.stream.input_ids) for one in given), default=0)
        longest += -longest % self._parts
        return [replace(one, stream=pad_stream(one.stream, longest)) for one in given], longest // self._parts

    @contextmanager
    def _running(self, passes: Sequence[Pass]) -> Generator[None]:
        for stage in self._stages:
            stage.passes, stage.found = passes, []
        try:
            yield
        except RuntimeError as error:  # torch's schedules wrap what a stage raises
            if isinstance(error.__cause__, NemoRLError):
                raise error.__cause__ from None
            raise
        finally:
            for stage in self._stages:
                stage.passes = ()

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


def keep_stages(
    model: CausalLM | ScalarModel, mesh: DeviceMesh, schedule: str, per_rank: int
) -> CausalLM | ScalarModel:
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
    if 0 not in own and not (has_head and tied_embedding(model)):
        trunk.embed_tokens = nn.Identity()
    return model


def tied_embedding(model: CausalLM | ScalarModel) -> str | None:
    """Name of the embedding's weight if it is the head's as well."""
    embedding = model.module.get_input_embeddings()
    if not isinstance(model, CausalLM) or model.head.weight is not embedding.weight:
        return None
    return next(name for name, parameter in model.module.named_parameters() if parameter is embedding.weight)


def _without_head(model: CausalLM | ScalarModel) -> CausalLM | ScalarModel:
    """The model without the memory of its head, which another rank holds."""
    head = model.head if isinstance(model, CausalLM) else model.score
    empty = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    for name, child in list(model.module.named_children()):
        if child is head:
            setattr(model.module, name, nn.Identity())
    if isinstance(model, CausalLM):
        if model.value_head is not None:
            setattr(model.module, VALUE_HEAD, nn.Identity())
        return replace(model, head=empty, value_head=None)
    return replace(model, score=empty)
