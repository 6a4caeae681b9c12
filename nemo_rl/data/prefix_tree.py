"""A prefix tree (a radix tree over token ids), laid out as one stream: what sequences begin with alike stands once.

Each edge of the tree becomes one *segment* of the stream. Plain packing is the same tree without sharing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

type TokenArray = np.ndarray[tuple[int], np.dtype[np.int64]]

_NOTHING: TokenArray = np.arange(0)


@dataclass(slots=True)
class PrefixTree:
    """Sequences as segments of a stream.

    Attributes:
        segments: tokens of each segment, in stream order.
        starts: position of each segment's first token within its sequences.
        paths: stream positions of each segment's ancestors and of itself.
        where: stream positions of each sequence's tokens, by the number of the sequence.
        num_tokens: length of the stream.
    """

    segments: list[TokenArray] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    paths: list[TokenArray] = field(default_factory=list)
    where: dict[int, TokenArray] = field(default_factory=dict)
    num_tokens: int = 0

    @classmethod
    def of(
        cls,
        sequences: Sequence[TokenArray],
        group_ids: Sequence[int] | None = None,
        *,
        share_prefixes: bool = True,
        min_shared: int = 8,
    ) -> Self:
        """Lay sequences out, sharing runs of at least `min_shared` tokens beyond what is shared already.

        What a group has in common may fork from what the groups have in common so late that too little of it is left
        to be shared; then each group gets a tree of its own. So a stream never holds more than the streams of its
        groups.

        Args:
            sequences: int64 [T_i] each, perhaps empty.
            group_ids: of each sequence; None is one group.
            share_prefixes: off, every sequence is a segment of its own.
            min_shared: shortest run worth sharing, in tokens.
        """
        present = {index: sequence for index, sequence in enumerate(sequences) if len(sequence)}
        if not share_prefixes:
            return cls._forest(len(sequences), ({index: sequence} for index, sequence in present.items()), min_shared)
        whole = cls._forest(len(sequences), [present], min_shared)
        groups: dict[int, dict[int, TokenArray]] = {}
        for index, sequence in present.items():
            groups.setdefault(0 if group_ids is None else group_ids[index], {})[index] = sequence
        if len(groups) < 2:
            return whole
        apart = cls._forest(len(sequences), groups.values(), min_shared)
        return min(whole, apart, key=lambda tree: tree.num_tokens)

    @classmethod
    def _forest(cls, num_sequences: int, trees: Iterable[dict[int, TokenArray]], min_shared: int) -> Self:
        layout = cls(where=dict.fromkeys(range(num_sequences), _NOTHING))
        for members in trees:
            layout._add(members, min_shared)
        return layout

    @property
    def num_pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        sizes = ((len(segment), len(path)) for segment, path in zip(self.segments, self.paths, strict=True))
        return sum(own * (seen - own) + own * (own + 1) // 2 for own, seen in sizes)

    def _emit(self, tokens: TokenArray, start: int, ancestors: TokenArray) -> TokenArray:
        """Append a segment; return the stream positions of its ancestors and itself."""
        path = np.concatenate([ancestors, np.arange(self.num_tokens, self.num_tokens + len(tokens))])
        self.segments.append(tokens)
        self.starts.append(start)
        self.paths.append(path)
        self.num_tokens += len(tokens)
        return path

    def _add(self, sequences: dict[int, TokenArray], min_shared: int) -> None:
        """Append the tree of these sequences, depth first."""
        pending = [(sequences, 0, 0, _NOTHING)] if sequences else []
        while pending:
            # the members agree on all tokens before `scan`, of which the stream holds those before `start`, at `path`
            members, start, scan, path = pending.pop()
            end = _common_prefix(list(members.values()), scan)
            ending = [index for index, sequence in members.items() if len(sequence) == end]
            if end > start and (len(members) == len(ending) or end - start >= min_shared):
                path = self._emit(next(iter(members.values()))[start:end], start, path)
                start = end
            if ending:  # at an edge too short to be shared with those that go on, the ones that stop get a copy
                tail = path if start == end else self._emit(members[ending[0]][start:end], start, path)
                self.where.update(dict.fromkeys(ending, tail))
            branches: dict[int, dict[int, TokenArray]] = {}
            for index, sequence in members.items():
                if len(sequence) > end:
                    branches.setdefault(int(sequence[end]), {})[index] = sequence
            pending += [(branch, start, end, path) for branch in reversed(branches.values())]


def _common_prefix(sequences: Sequence[TokenArray], scan: int) -> int:
    """Length to which all sequences agree, given that they agree up to `scan`."""
    first, agreed = sequences[0], min(len(sequence) for sequence in sequences)
    for other in sequences[1:]:
        differs = np.flatnonzero(first[scan:agreed] != other[scan:agreed])
        if differs.size:
            agreed = scan + int(differs[0])
    return agreed
