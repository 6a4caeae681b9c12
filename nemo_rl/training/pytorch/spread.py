"""What differs between a model on one rank and one that is spread over several."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_rl.distributed.mesh import Mesh
from nemo_rl.models.local import local_part
from nemo_rl.training.pytorch.pipeline import Pipeline
from nemo_rl.training.pytorch.shards import clip_grad_norm, whole


class Spread(Protocol):
    """Where the weights of a model are.

    Attributes:
        is_shared: several ranks hold them, and all of them take part in every call.
        agree, anywhere: see `nemo_rl.training.step.Scorer`.
        pipeline: runs the model if its layers are on several ranks.
        num_parameters: of the whole model; 0 if this rank can count them.
    """

    @property
    def is_shared(self) -> bool: ...
    @property
    def agree(self) -> Callable[[int], int] | None: ...
    @property
    def anywhere(self) -> Callable[[bool], bool] | None: ...
    @property
    def pipeline(self) -> Pipeline | None: ...
    @property
    def num_parameters(self) -> int: ...
    def clip(self, named: Mapping[str, nn.Parameter], max_norm: float | None) -> float:
        """Clip the gradients of all ranks to a total norm; returns the norm before."""
        ...

    def stream(self, named: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of all ranks by name, each whole and once, without gradient."""
        ...


class Alone:
    """All weights are here."""

    is_shared = False
    agree = None
    anywhere = None
    num_parameters = 0
    pipeline = None

    def clip(self, named: Mapping[str, nn.Parameter], max_norm: float | None) -> float:
        return clip_grad_norm(named.values(), max_norm)

    def stream(self, named: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor.detach()) for name, tensor in named)


class OverMesh:
    """The ranks of a mesh hold them."""

    is_shared = True

    def __init__(self, mesh: Mesh, pipeline: Pipeline | None, tied: str | None, num_parameters: int) -> None:
        """Take the mesh.

        Args:
            mesh: the ranks.
            pipeline: the stages, if there are several.
            num_parameters: of the whole model.
            tied: name of an embedding that is the head as well, and that the first and the last stage hold therefore.
        """
        self.pipeline = pipeline
        self.agree = mesh.most
        self.anywhere = mesh.anywhere
        self.num_parameters = num_parameters
        self._mesh = mesh
        self._stages = mesh.pipeline.mesh.flatten().tolist()
        self._tied = tied if len(self._stages) > 1 else None

    def clip(self, named: Mapping[str, nn.Parameter], max_norm: float | None) -> float:
        if self.pipeline is None:
            return clip_grad_norm(named.values(), max_norm)
        twice = self._add_tied(named)
        group = self._mesh.pipeline.get_group()

        def combine(square: Tensor) -> Tensor:
            dist.all_reduce(square, group=group)
            return square

        return clip_grad_norm(named.values(), max_norm, combine, counted_elsewhere=twice)

    def _add_tied(self, named: Mapping[str, nn.Parameter]) -> nn.Parameter | None:
        """Add up the gradients of an embedding that two stages hold; returns the last stage's, which is the same."""
        first, last, own = self._stages[0], self._stages[-1], dist.get_rank()
        if self._tied is None or own not in (first, last) or self._tied not in named:
            return None
        if self.pipeline is not None and self.pipeline.holds_both_ends:
            return None
        parameter = named[self._tied]
        assert parameter.grad is not None
        mine = local_part(parameter.grad)
        theirs, peer = torch.empty_like(mine), last if own == first else first
        ops = [dist.P2POp(dist.isend, mine.contiguous(), peer), dist.P2POp(dist.irecv, theirs, peer)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        mine.add_(theirs)
        return parameter if own == last else None

    def stream(self, named: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        if len(self._stages) == 1:
            yield from ((name, whole(tensor)) for name, tensor in named)
            return
        group, own = self._mesh.pipeline.get_group(), dict(named)
        seen: set[str] = set()
        for rank in self._stages:
            here = rank == dist.get_rank()
            listed: list[Any] = [[(name, t.shape, t.dtype) for name, t in own.items()] if here else None]
            dist.broadcast_object_list(listed, rank, group)
            for name, shape, dtype in listed[0]:
                if name in seen:
                    continue
                seen.add(name)
                device = self._mesh.device  # where the stages talk, even if their weights rest on the CPU
                full = whole(own[name]).to(device) if here else torch.empty(shape, dtype=dtype, device=device)
                full = full.contiguous()
                dist.broadcast(full, rank, group)
                yield name, full
