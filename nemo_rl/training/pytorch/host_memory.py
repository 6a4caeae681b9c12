"""Tensors that rest in the memory of the host while the device is busy with others.

They lie in pinned memory, which a GPU reads and writes at the full speed of its bus. On a CPU nothing moves.
"""

import gc
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from nemo_rl.models.local import local_part


class HostRest:
    """Takes tensors off a GPU and brings them back, their values unchanged; what holds them notices nothing."""

    def __init__(self) -> None:
        self._resting: list[tuple[Tensor, torch.device]] = []

    @torch.no_grad()  # under which `local_part` is the very tensor that a spread one consists of
    def put(self, tensors: Iterable[Tensor]) -> None:
        """Move those that are on a GPU to the host, and give the memory back that the allocator holds unused."""
        moving = [part for part in map(local_part, tensors) if part.device.type != "cpu"]
        if not moving:
            return
        for part in moving:
            self._resting.append((part, part.device))
            part.data = on_host(part)
        torch.cuda.synchronize()  # the host may read them from now on
        gc.collect()
        torch.cuda.empty_cache()

    @torch.no_grad()
    def fetch(self) -> None:
        """Bring all of them back to where they were."""
        for part, device in self._resting:
            part.data = part.data.to(device, non_blocking=True)
        self._resting.clear()


def on_host(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy in the memory of the host; from a GPU it is complete when the device has come to it."""
    pinned = tensor.device.type == "cuda"
    host = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, pin_memory=pinned)
    return host.copy_(tensor, non_blocking=pinned)


class FrozenWeights:
    """Weights as they were once, which change places with the current ones for a while.

    They change places tensor by tensor, so that no device ever holds more than one tensor of both.
    """

    @torch.no_grad()
    def __init__(
        self, weights: Sequence[Tensor], dtype: torch.dtype | None = None, *, rests: bool, swaps: bool
    ) -> None:
        """Keep a copy of what the weights are now.

        Args:
            weights: of the model; of those that are spread, this rank's parts.
            dtype: to keep them in, such as that in which the model computes; None is their own.
            rests: keep them on the host.
            swaps: let tensors change their memory instead of its content, where both are on one device: no copy is
                made, which weights do not allow whose memory something else knows (FSDP does).
        """
        self._weights = weights
        self._dtypes = [dtype or weight.dtype for weight in weights]
        self._rests = rests and any(local_part(weight).device.type != "cpu" for weight in weights)
        self._swaps = swaps and not self._rests and dtype is None
        self._kept = [self._copy(local_part(w), kept_as) for w, kept_as in zip(weights, self._dtypes, strict=True)]

    @contextmanager
    def in_place(self) -> Generator[None]:
        """Within it the model has these weights."""
        self._exchange([weight.dtype for weight in self._weights])
        try:
            yield
        finally:
            self._exchange(self._dtypes)

    @torch.no_grad()
    def _exchange(self, dtypes: Sequence[torch.dtype]) -> None:
        """Put those kept in the place of those of the model, and keep these in `dtypes`."""
        for i, (weight, dtype) in enumerate(zip(map(local_part, self._weights), dtypes, strict=True)):
            if self._swaps:
                weight.data, self._kept[i] = self._kept[i], weight.data
                continue
            replaced = self._copy(weight, dtype)
            weight.copy_(self._kept[i], non_blocking=self._rests)
            self._kept[i] = replaced

    def _copy(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return on_host(weight, dtype) if self._rests else weight.to(dtype, copy=True)
