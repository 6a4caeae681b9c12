"""A mesh knows its ranks' places, and ranks meet through the driver's store."""

import pytest
import torch
import torch.distributed as dist

from nemo_rl.distributed.mesh import Mesh, ParallelSizes, RankPlace, meeting
from nemo_rl.errors import ConfigError
from ranks import run_ranks  # pyright: ignore[reportImplicitRelativeImport]


def test_shard_takes_the_ranks_that_the_other_axes_leave() -> None:
    sizes = ParallelSizes.filling(8, pipeline=2, tensor=2, expert=2)
    assert (sizes.shard, sizes.data, sizes.world_size) == (2, 2, 8)
    assert str(sizes) == "pipeline 2 x shard 2 x tensor 2 x expert 2"
    assert [sizes.data_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [rank for rank in range(8) if sizes.speaks(rank)] == [4, 6]


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"6 rank.* cannot be divided into .* tensor 4 = 4"):
        ParallelSizes.filling(6, tensor=4)
    with pytest.raises(ConfigError, match=r"expert_parallel_size 3 does not divide the 2 rank"):
        ParallelSizes.filling(4, tensor=2, expert=3)


def coordinates(rank: int, sizes: ParallelSizes) -> tuple[list[int], ...]:
    mesh = Mesh(sizes, torch.device("cpu"))
    groups = (mesh.tensor, mesh.context, mesh.weights, mesh.expert)
    assert mesh.most(rank) == sizes.world_size - 1
    return tuple(sorted(group.mesh.flatten().tolist()) for group in groups)


def test_every_axis_has_its_ranks() -> None:
    found = run_ranks(coordinates, 8, ParallelSizes(shard=2, context=2, tensor=2, expert=2))
    assert found[5] == ([4, 5], [5, 7], [1, 3, 5, 7], [5, 7])
    found = run_ranks(coordinates, 4, ParallelSizes(replicate=2, shard=2))
    assert found[2][2] == [0, 1, 2, 3]


def joined(rank: int, places: list[RankPlace]) -> tuple[int, int]:
    dist.destroy_process_group()
    mesh = places[rank].join("cpu")
    return mesh.rank, mesh.most(rank * 10)


def test_ranks_meet_through_the_driver() -> None:
    with meeting(ParallelSizes(shard=3)) as places:
        assert run_ranks(joined, 3, places) == [(0, 20), (1, 20), (2, 20)]
