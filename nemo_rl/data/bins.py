"""Bin packing and number partitioning over integer costs; what the items are is the callers' business.

A packer takes the costs of items and the capacity of a bin, and returns the bins as lists of item numbers, in the order
in which they were opened. An item beyond the capacity gets a bin of its own. Equal input gives equal output.
"""

import heapq
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from nemo_rl.config.schema.policy import PackingAlgorithm

type Packer = Callable[[Sequence[int], int], list[list[int]]]


def concatenative(costs: Sequence[int], capacity: int) -> list[list[int]]:
    """Next fit: keep the order, and open a bin when the next item does not fit into the last one."""
    bins: list[list[int]] = []
    room = 0
    for item, cost in enumerate(costs):
        if not bins or cost > room:
            bins.append([])
            room = capacity
        bins[-1].append(item)
        room -= cost
    return bins


def first_fit_decreasing(costs: Sequence[int], capacity: int) -> list[list[int]]:
    """Largest item first, each into the first bin with room for it.

    At most 11/9 of the fewest bins possible, plus 2/3 (Dosa, "The tight bound of first fit decreasing bin-packing
    algorithm", ESCAPE 2007).
    """
    room = np.full(len(costs), capacity)
    bins: list[list[int]] = [[] for _ in costs]
    for item in _by_decreasing_cost(costs, range(len(costs))):
        taken = min(costs[item], capacity)
        place = int(np.argmax(room >= taken))
        bins[place].append(item)
        room[place] -= taken
    return [items for items in bins if items]


def modified_first_fit_decreasing(costs: Sequence[int], capacity: int) -> list[list[int]]:
    """First fit decreasing that looks after the bins of items above half the capacity before all others.

    Such a bin gets an item above a third, or else two items above a sixth, where some fit. At most 71/60 of the fewest
    bins possible, plus 31/6 (Johnson & Garey, "A 71/60 theorem for bin packing", Journal of Complexity 1, 1985).
    """
    order = _by_decreasing_cost(costs, range(len(costs)))
    large = [i for i in order if 2 * costs[i] > capacity]
    medium = [i for i in order if 2 * costs[i] <= capacity < 3 * costs[i]]
    small = [i for i in order if 3 * costs[i] <= capacity < 6 * costs[i]]
    tiny = [i for i in order if 6 * costs[i] <= capacity]
    bins = [[i] for i in large]
    room = [capacity - costs[i] for i in large]

    def place(item: int, home: int) -> None:
        bins[home].append(item)
        room[home] -= costs[item]

    def take_largest(items: list[int], limit: int) -> int:
        return items.pop(bisect_left(items, -limit, key=lambda i: -costs[i]))

    homes = range(len(large))
    for home in homes:
        if medium and costs[medium[-1]] <= room[home]:
            place(take_largest(medium, room[home]), home)
    for home in reversed(homes):
        alone = len(bins[home]) == 1
        if alone and len(small) > 1 and costs[small[-1]] + costs[small[-2]] <= room[home]:
            place(small.pop(), home)
            place(take_largest(small, room[home]), home)
    rest = medium + small + tiny
    for home in homes:
        while rest and costs[rest[-1]] <= room[home]:
            place(take_largest(rest, room[home]), home)
    return bins + [[rest[i] for i in items] for items in first_fit_decreasing([costs[i] for i in rest], capacity)]


PACKERS: Mapping[PackingAlgorithm, Packer] = MappingProxyType(
    {
        "concatenative": concatenative,
        "first_fit_decreasing": first_fit_decreasing,
        "modified_first_fit_decreasing": modified_first_fit_decreasing,
    }
)
"""By the name that the configuration has for each."""


def balance(costs: Sequence[int], num_parts: int) -> list[list[int]]:
    """Divide items into parts of about equal cost by the largest differencing method.

    Every item begins as a division of its own, with one part taken and the others empty. The two divisions whose parts
    differ most become one, the costly parts of either with the cheap parts of the other, until one is left (Karmarkar &
    Karp, "The differencing method of set partitioning", 1982). A part stays empty only if there are fewer items than
    parts.

    Returns:
        The item numbers of each part in increasing order, the costliest part first.
    """
    divisions = [
        (-cost, item, [(cost, [item]), *((0, list[int]()) for _ in range(num_parts - 1))])
        for item, cost in enumerate(costs)
    ]
    heapq.heapify(divisions)
    while len(divisions) > 1:
        (_, number, one), (_, _, other) = heapq.heappop(divisions), heapq.heappop(divisions)
        parts = [_together(a, b) for a, b in zip(one, reversed(other), strict=True)]
        parts.sort(key=lambda part: (-part[0], -len(part[1])))  # an empty part is the last of those that cost nothing
        heapq.heappush(divisions, (parts[-1][0] - parts[0][0], number, parts))
    return [sorted(items) for _, items in divisions[0][2]] if divisions else [[] for _ in range(num_parts)]


def _together(one: tuple[int, list[int]], other: tuple[int, list[int]]) -> tuple[int, list[int]]:
    """Two parts as one; the longer list grows, so that an item moves seldom."""
    long, short = sorted((one[1], other[1]), key=len, reverse=True)
    long.extend(short)
    return one[0] + other[0], long


def _by_decreasing_cost(costs: Sequence[int], items: Sequence[int]) -> list[int]:
    return sorted(items, key=lambda item: -costs[item])
