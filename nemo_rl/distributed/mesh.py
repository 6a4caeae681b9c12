"""The device mesh: how the ranks of one model are arranged, and how they meet.

A rank's place is a point with the axes pipeline, replicate, shard, context and tensor, of which the last runs fastest:
tensor-parallel ranks are neighbours, as they talk most. Replicate and shard together are data parallelism (HSDP: every
replica spreads its weights over its shards). Context-parallel ranks hold different tokens of the same sequences, so for
the weights they are shards too. Expert parallelism takes its ranks from those shards: e neighbours among them divide
the experts of a layer.
"""

import logging
import socket
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Literal, Self

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nemo_rl.errors import ConfigError

_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others in a collective; the driver ends all of them as soon as one has failed."""


@dataclass(frozen=True, slots=True)
class ParallelSizes:
    """How many ranks each axis has.

    Attributes:
        pipeline: stages that hold different layers.
        replicate: copies of the sharded weights.
        shard: parts of the data among which a replica's weights are sharded.
        context: parts of every sequence.
        tensor: parts of every layer.
        expert: parts of the experts; divides `shard * context`.
        folded: the stages run from the first pipeline rank to the last and back, so that the first has the results.
    """

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    folded: bool = False

    @classmethod
    def filling(
        cls,
        num_ranks: int,
        *,
        pipeline: int = 1,
        replicate: int = 1,
        context: int = 1,
        tensor: int = 1,
        expert: int = 1,
        folded: bool = False,
    ) -> Self:
        """Give every rank that the other axes leave to `shard`.

        Raises:
            ConfigError: the axes do not multiply to the ranks, or experts cannot be divided among the shards.
        """
        others = pipeline * replicate * context * tensor
        if num_ranks % others:
            raise ConfigError(
                f"{num_ranks} rank(s) cannot be divided into pipeline {pipeline} x replicate {replicate} x context "
                f"{context} x tensor {tensor} = {others}: make their product a divisor of the ranks"
            )
        shard = num_ranks // others
        if (shard * context) % expert:
            raise ConfigError(
                f"expert_parallel_size {expert} does not divide the {shard * context} rank(s) among which weights are "
                f"sharded ({shard} for data x {context} for context): choose one of their divisors"
            )
        return cls(pipeline, replicate, shard, context, tensor, expert, folded)

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.pipeline * self.data * self.context * self.tensor

    @property
    def data(self) -> int:
        """Ranks that are given different sequences."""
        return self.replicate * self.shard

    def data_rank(self, rank: int) -> int:
        """Which part of a batch a rank is given; ranks that work on the same sequences share one."""
        return rank // (self.context * self.tensor) % self.data

    def speaks(self, rank: int) -> bool:
        """Whether a rank answers for those that share its data: the first of those with the last stage."""
        last_stage = 0 if self.folded else self.pipeline - 1
        return rank // (self.world_size // self.pipeline) == last_stage and rank % (self.context * self.tensor) == 0

    def __str__(self) -> str:
        """Name the axes that are divided: `shard 2 x tensor 2`."""
        counts = {axis.name: getattr(self, axis.name) for axis in fields(self) if axis.name != "folded"}
        divided = [f"{name} {count}" for name, count in counts.items() if count > 1]
        return " x ".join(divided) or "one rank"


class Mesh:
    """The ranks of one model from the point of view of one of them; made by all of them together.

    Attributes:
        sizes: of the axes.
        device: of this rank.
        dense: axes `pipeline`, `replicate`, `shard` (context ranks included) and `tensor`: of most weights.
        sequences: the same ranks with `data` and `context` apart: of the tokens.
        experts: the same ranks with `shard` divided into `expert_shard` and `expert`: of the experts.
    """

    def __init__(self, sizes: ParallelSizes, device: torch.device) -> None:
        """Make the process groups; a process group of all ranks must exist.

        Raises:
            ConfigError: the process group has another number of ranks.
        """
        if dist.get_world_size() != sizes.world_size:
            raise ConfigError(f"{dist.get_world_size()} ranks met for a mesh of {sizes.world_size} ({sizes})")
        self.sizes, self.device = sizes, device
        shards = sizes.shard * sizes.context
        self.dense = self._mesh(pipeline=sizes.pipeline, replicate=sizes.replicate, shard=shards, tensor=sizes.tensor)
        self.sequences = self._mesh(
            pipeline=sizes.pipeline, data=sizes.data, context=sizes.context, tensor=sizes.tensor
        )
        self.experts = self._mesh(
            pipeline=sizes.pipeline,
            replicate=sizes.replicate,
            expert_shard=shards // sizes.expert,
            expert=sizes.expert,
            tensor=sizes.tensor,
        )

    def _mesh(self, **axes: int) -> DeviceMesh:
        return init_device_mesh(self.device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    @property
    def rank(self) -> int:
        """Of this process among all."""
        return dist.get_rank()

    @property
    def weights(self) -> DeviceMesh:
        """What FSDP shards most weights over: `shard`, and `replicate` before it where there are replicas."""
        return self.dense["replicate", "shard"] if self.sizes.replicate > 1 else self.dense["shard"]

    @property
    def expert_weights(self) -> DeviceMesh:
        """What FSDP shards the experts of a rank over."""
        return self.experts["replicate", "expert_shard"] if self.sizes.replicate > 1 else self.experts["expert_shard"]

    @property
    def tensor(self) -> DeviceMesh:
        """The ranks that hold parts of the same layers."""
        return self.dense["tensor"]

    @property
    def context(self) -> DeviceMesh:
        """The ranks that hold parts of the same sequences."""
        return self.sequences["context"]

    @property
    def pipeline(self) -> DeviceMesh:
        """The stages that one micro-batch runs through."""
        return self.dense["pipeline"]

    @property
    def expert(self) -> DeviceMesh:
        """The ranks that hold parts of the same experts."""
        return self.experts["expert"]

    def most(self, count: int) -> int:
        """The largest of the numbers that the ranks give; all of them must ask."""
        shared = torch.tensor(count, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def anywhere(self, is_true: bool) -> bool:
        """Whether something is true on any rank; all of them must ask."""
        return self.most(int(is_true)) > 0


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where a rank stands and where it meets the others; picklable, so that a worker can be told.

    Attributes:
        rank: among all ranks.
        sizes: of the mesh.
        host, port: where the driver keeps the meeting.
    """

    rank: int
    sizes: ParallelSizes
    host: str
    port: int

    def join(self, device_type: Literal["cpu", "cuda"]) -> Mesh:
        """Meet the other ranks; returns when all of them are there.

        On CUDA a rank takes the GPU of its own number among those it can see, or the only one.
        """
        device = torch.device("cpu")
        if device_type == "cuda":
            device = torch.device("cuda", self.rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
        # it warns that a weight spread over two axes is gathered along one after the other
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        store = dist.TCPStore(self.host, self.port, is_master=False, timeout=_TIMEOUT)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
            store=dist.PrefixStore("ranks", store),
            rank=self.rank,
            world_size=self.sizes.world_size,
            timeout=_TIMEOUT,
        )
        return Mesh(self.sizes, device)


@contextmanager
def meeting(sizes: ParallelSizes, host: str = "127.0.0.1") -> Generator[list[RankPlace]]:
    """Hold the meeting of the ranks on this machine, on a free port; leave it when none of them is needed any more.

    Args:
        sizes: of the mesh.
        host: address of this machine as the ranks reach it.

    Yields:
        The place of every rank.
    """
    listener = socket.create_server(("", 0))
    port = int(listener.getsockname()[1])
    store = dist.TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), timeout=_TIMEOUT
    )
    try:
        yield [RankPlace(rank, sizes, host, port) for rank in range(sizes.world_size)]
    finally:
        del store
