"""`TokenBatch`: sequences of any length side by side, without padding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import safetensors.torch
import torch
from torch import Tensor

from nemo_rl.data.transfer import moved
from nemo_rl.data.types import Example, Preference, Rollout, RolloutGroup
from nemo_rl.errors import DataError


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """B sequences of N tokens in total, jagged.

    Every method is pure: it returns new batches or tensors on the device of this one. A batch may hold no sequence
    (a rank without work), and a sequence may hold no token (after `at`).

    Attributes:
        token_ids: int64 [N].
        cu_seqlens: int64 [B+1], sequence i is `token_ids[cu_seqlens[i]:cu_seqlens[i+1]]`.
        group_ids: int64 [B], equal for sequences of one group; sequences of a group are neighbours.
        token_columns: named per-token tensors [N] (`loss_mask` bool, `loss_weights`, `advantages`, `rollout_logprobs`,
            `old_logprobs`, `reference_logprobs`: float32), or [N, ...] where a token has several values (a teacher's
            `teacher_logprobs` [N, k], `teacher_hidden` [N, H]).
        sequence_columns: named per-sequence tensors [B] (`rewards`: float32, `truncated`: bool).

    Raises:
        DataError: the shapes, dtypes or devices do not fit together, or a group is torn apart.
    """

    token_ids: Tensor
    cu_seqlens: Tensor
    group_ids: Tensor
    token_columns: Mapping[str, Tensor] = field(default_factory=dict)
    sequence_columns: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse tensors that do not fit together."""
        own = {"token_ids": self.token_ids, "cu_seqlens": self.cu_seqlens, "group_ids": self.group_ids}
        for name, tensor in own.items():
            if tensor.dtype != torch.int64 or tensor.dim() != 1:
                raise DataError(f"TokenBatch.{name} is {_describe(tensor)}; it must be int64 with one dimension")
        device = self.token_ids.device
        if device.type == "cpu":
            self._check_values()
        for name, column in self.token_columns.items():
            if column.shape[:1] != (self.num_tokens,) or column.device != device:
                raise DataError(
                    f"TokenBatch token column {name!r} is {_describe(column)}; "
                    f"it must have {self.num_tokens} rows, one a token, on {device}"
                )
        for name, column in self.sequence_columns.items():
            if column.shape != (self.num_sequences,) or column.device != device:
                raise DataError(
                    f"TokenBatch sequence column {name!r} is {_describe(column)}; "
                    f"it must be one-dimensional with {self.num_sequences} values on {device}"
                )
        loss_mask = self.token_columns.get("loss_mask")
        if loss_mask is not None and loss_mask.dtype != torch.bool:
            raise DataError(f"TokenBatch token column 'loss_mask' is {_describe(loss_mask)}; it must be bool")

    def _check_values(self) -> None:
        """Look at the numbers; not on a GPU, which would have to stop for it and is given what a CPU has checked."""
        if not len(self.cu_seqlens) or self.cu_seqlens[0] != 0 or self.cu_seqlens[-1] != len(self.token_ids):
            raise DataError(f"TokenBatch.cu_seqlens must run from 0 to the {len(self.token_ids)} tokens of the batch")
        if (self.lengths < 0).any():
            raise DataError("TokenBatch.cu_seqlens decreases; it must be the running total of the sequence lengths")
        if len(self.group_ids) != self.num_sequences:
            raise DataError(f"TokenBatch has {len(self.group_ids)} group_ids for {self.num_sequences} sequences")
        if len(self.group_ids.unique_consecutive()) != len(self.group_ids.unique()):
            raise DataError("TokenBatch.group_ids tears a group apart; sequences of a group must be neighbours")

    @classmethod
    def from_rollouts(cls, groups: Sequence[RolloutGroup]) -> Self:
        """Lay the rollouts of all groups side by side, in order; the group at position g gets group id g.

        Token columns: `loss_mask`, `rollout_logprobs`. Sequence columns: `rewards`, `truncated` (token budget ran out).

        Raises:
            DataError: no rollout at all, or the columns of a rollout differ in length.
        """
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        if not rollouts:
            raise DataError("a TokenBatch needs at least one rollout, and none was given")
        for group in groups:
            for rollout in group.rollouts:
                _check_rollout(rollout, group.task.index)
        lengths = torch.tensor([len(rollout.token_ids) for rollout in rollouts])
        group_sizes = torch.tensor([len(group.rollouts) for group in groups])
        return cls(
            token_ids=torch.cat([rollout.token_ids for rollout in rollouts]),
            cu_seqlens=_running_total(lengths),
            group_ids=torch.arange(len(groups)).repeat_interleave(group_sizes),
            token_columns={
                "loss_mask": torch.cat([rollout.loss_mask for rollout in rollouts]),
                "rollout_logprobs": torch.cat([rollout.rollout_logprobs for rollout in rollouts]).float(),
            },
            sequence_columns={
                "rewards": torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float32),
                "truncated": torch.tensor([rollout.stop_reason == "length" for rollout in rollouts]),
            },
        )

    @classmethod
    def from_examples(cls, examples: Sequence[Example]) -> Self:
        """Lay examples side by side, in order, each as a group of its own.

        Token columns: `loss_mask`. Sequence columns: `chosen` bool, if every example is judged desirable or not.

        Raises:
            DataError: no example at all, the columns of one differ in length, or some are judged and others are not.
        """
        batch = cls._side_by_side(examples, torch.arange(len(examples)))
        judged = [example.desirable for example in examples if example.desirable is not None]
        if not judged:
            return batch
        if len(judged) < len(examples):
            raise DataError(f"only {len(judged)} of {len(examples)} examples are judged; label all of them, or none")
        return batch.with_sequence_columns(chosen=torch.tensor(judged))

    @classmethod
    def from_preferences(cls, preferences: Sequence[Preference]) -> Self:
        """Lay pairs side by side, in order, each as a group: first the chosen sequence, then the rejected one.

        Token columns: `loss_mask`. Sequence columns: `chosen` bool, `margins` float32 (the pair's, at both sequences).

        Raises:
            DataError: no pair at all, or the columns of a sequence differ in length.
        """
        sequences = [example for pair in preferences for example in (pair.chosen, pair.rejected)]
        margins = torch.tensor([pair.margin for pair in preferences], dtype=torch.float32)
        return cls._side_by_side(sequences, torch.arange(len(preferences)).repeat_interleave(2)).with_sequence_columns(
            chosen=torch.tensor([True, False]).repeat(len(preferences)), margins=margins.repeat_interleave(2)
        )

    @classmethod
    def _side_by_side(cls, examples: Sequence[Example], group_ids: Tensor) -> Self:
        if not examples:
            raise DataError("a TokenBatch needs at least one example, and none was given")
        for example in examples:
            if len(example.token_ids) != len(example.loss_mask):
                raise DataError(
                    f"example {example.index} has {len(example.token_ids)} token_ids and {len(example.loss_mask)} "
                    "loss_mask values; it needs one of each per token"
                )
        return cls(
            token_ids=torch.cat([example.token_ids for example in examples]),
            cu_seqlens=_running_total(torch.tensor([len(example.token_ids) for example in examples])),
            group_ids=group_ids,
            token_columns={"loss_mask": torch.cat([example.loss_mask for example in examples])},
        )

    @classmethod
    def concat(cls, batches: Sequence[Self]) -> Self:
        """Put batches one after the other; all must have the same columns.

        Group ids are kept, so a group that `split` divided comes together again; unrelated batches need distinct ids.

        Raises:
            DataError: no batch was given, or their columns differ.
        """
        if not batches:
            raise DataError("TokenBatch.concat needs at least one batch, and none was given")
        first = batches[0]
        for batch in batches:
            for known, given in (
                (first.token_columns.keys(), batch.token_columns.keys()),
                (first.sequence_columns.keys(), batch.sequence_columns.keys()),
            ):
                if known != given:
                    raise DataError(f"TokenBatch.concat got different columns: {sorted(known)} and {sorted(given)}")
        return cls(
            token_ids=torch.cat([batch.token_ids for batch in batches]),
            cu_seqlens=_running_total(torch.cat([batch.lengths for batch in batches])),
            group_ids=torch.cat([batch.group_ids for batch in batches]),
            token_columns={
                name: torch.cat([batch.token_columns[name] for batch in batches]) for name in first.token_columns
            },
            sequence_columns={
                name: torch.cat([batch.sequence_columns[name] for batch in batches]) for name in first.sequence_columns
            },
        )

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        """B."""
        return len(self.cu_seqlens) - 1

    @property
    def lengths(self) -> Tensor:
        """int64 [B], tokens of each sequence."""
        return self.cu_seqlens.diff()

    def sequence_ids(self) -> Tensor:
        """int64 [N], the sequence that each token belongs to."""
        return self.per_token(torch.arange(self.num_sequences, device=self.token_ids.device))

    def per_token(self, sequence_column: Tensor) -> Tensor:
        """Give every token the value of its sequence: [B] -> [N]."""
        return sequence_column.repeat_interleave(self.lengths, output_size=self.num_tokens)

    def token_index(self, sequence_indices: Tensor | Sequence[int]) -> Tensor:
        """int64 [n], where the tokens of these sequences lie in this batch, sequence after sequence.

        `result[batch.token_index(i)] = part` puts the per-token results of `batch.select(i)` back in place.
        """
        indices = torch.as_tensor(sequence_indices, dtype=torch.int64, device=self.token_ids.device)
        lengths = self.lengths[indices]
        cu_seqlens = _running_total(lengths)
        shift = (self.cu_seqlens[indices] - cu_seqlens[:-1]).repeat_interleave(lengths)
        return torch.arange(len(shift), device=shift.device) + shift

    def select(self, sequence_indices: Tensor | Sequence[int]) -> Self:
        """Take these sequences, in this order; sequences of a group must stay neighbours."""
        indices = torch.as_tensor(sequence_indices, dtype=torch.int64, device=self.token_ids.device)
        tokens = self.token_index(indices)
        return type(self)(
            token_ids=self.token_ids[tokens],
            cu_seqlens=_running_total(self.lengths[indices]),
            group_ids=self.group_ids[indices],
            token_columns={name: column[tokens] for name, column in self.token_columns.items()},
            sequence_columns={name: column[indices] for name, column in self.sequence_columns.items()},
        )

    def at(self, token_index: Tensor) -> Self:
        """Cut every sequence down to some of its tokens: the view of a batch that a loss sees.

        All B sequences stay (perhaps without a token), so sequence columns keep their meaning.

        Args:
            token_index: int64 [M], positions in this batch, sequence after sequence; any order within a sequence.

        Raises:
            DataError: the positions jump back to an earlier sequence.
        """
        owners = self.sequence_ids()[token_index]
        if (owners.diff() < 0).any():
            raise DataError("TokenBatch.at got tokens out of sequence order; sort token_index by sequence first")
        return replace(
            self,
            token_ids=self.token_ids[token_index],
            cu_seqlens=_running_total(owners.bincount(minlength=self.num_sequences)),
            token_columns={name: column[token_index] for name, column in self.token_columns.items()},
        )

    def split(self, num_parts: int) -> list[Self]:
        """Cut into `num_parts` consecutive parts of about equally many groups (of sequences, if groups are too few)."""
        _check_positive("num_parts", num_parts)
        units = self._units(num_parts)
        parts = torch.arange(len(units)).tensor_split(num_parts)
        return [self.select(torch.cat([_NONE, *(units[unit] for unit in part)])) for part in parts]

    def minibatches(self, size: int) -> list[Self]:
        """Cut into consecutive parts of at most `size` sequences; only a group larger than `size` is divided."""
        _check_positive("size", size)
        parts: list[list[Tensor]] = []
        room = 0
        for unit in (chunk for group in self._groups() for chunk in group.split(size)):
            if len(unit) > room:
                parts.append([])
                room = size
            parts[-1].append(unit)
            room -= len(unit)
        return [self.select(torch.cat(part)) for part in parts]

    def with_columns(self, **columns: Tensor) -> Self:
        """Add or replace per-token columns [N] or [N, ...]."""
        return replace(self, token_columns={**self.token_columns, **columns})

    def with_sequence_columns(self, **columns: Tensor) -> Self:
        """Add or replace per-sequence columns [B]."""
        return replace(self, sequence_columns={**self.sequence_columns, **columns})

    def to(self, device: torch.device | str) -> Self:
        """Move every tensor to a device."""
        return type(self)(
            token_ids=moved(self.token_ids, device),
            cu_seqlens=moved(self.cu_seqlens, device),
            group_ids=moved(self.group_ids, device),
            token_columns={name: moved(column, device) for name, column in self.token_columns.items()},
            sequence_columns={name: moved(column, device) for name, column in self.sequence_columns.items()},
        )

    def to_bytes(self) -> bytes:
        """Write as safetensors; equal batches give equal bytes."""
        tensors = {"token_ids": self.token_ids, "cu_seqlens": self.cu_seqlens, "group_ids": self.group_ids}
        tensors |= {f"token.{name}": column for name, column in self.token_columns.items()}
        tensors |= {f"sequence.{name}": column for name, column in self.sequence_columns.items()}
        return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` wrote.

        Raises:
            DataError: the bytes are truncated or something else.
        """
        try:
            tensors = safetensors.torch.load(data)
            return cls(
                token_ids=tensors["token_ids"],
                cu_seqlens=tensors["cu_seqlens"],
                group_ids=tensors["group_ids"],
                token_columns=_under("token.", tensors),
                sequence_columns=_under("sequence.", tensors),
            )
        except (safetensors.SafetensorError, KeyError) as error:
            raise DataError(f"these {len(data)} bytes hold no TokenBatch ({error}); write them again") from error

    def _groups(self) -> list[Tensor]:
        """The sequence indices of each group."""
        counts = self.group_ids.unique_consecutive(return_counts=True)[1]
        return list(torch.arange(self.num_sequences).split(counts.tolist())) if self.num_sequences else []

    def _units(self, num_parts: int) -> list[Tensor]:
        """What is dealt whole to `num_parts` parts: groups, or single sequences when groups are too few."""
        groups = self._groups()
        return groups if len(groups) >= num_parts else list(torch.arange(self.num_sequences).split(1))


_NONE = torch.empty(0, dtype=torch.int64)


def _running_total(lengths: Tensor) -> Tensor:
    """Lengths [B] -> offsets [B+1]."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise DataError(f"TokenBatch was asked for {name}={value}; it must be at least 1")


def _check_rollout(rollout: Rollout, task_index: int) -> None:
    sizes = [len(rollout.token_ids), len(rollout.loss_mask), len(rollout.rollout_logprobs)]
    if len(set(sizes)) > 1:
        raise DataError(
            f"a rollout of task {task_index} has {sizes[0]} token_ids, {sizes[1]} loss_mask and {sizes[2]} "
            "rollout_logprobs values; its environment or sampler must give one of each per token"
        )


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
