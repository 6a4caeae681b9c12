"""Passes through the model: one micro-batch after the other, or several at once in the stages of a pipeline."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nemo_rl.data.packing import Stream
from nemo_rl.models.hidden import Hidden
from nemo_rl.models.stream_model import StreamModel


@dataclass(frozen=True, slots=True)
class Pass:
    """A micro-batch on its way through the model.

    Attributes:
        stream: as the model sees it.
        finish: from the last hidden states to what is asked for: the loss [] in training.
        trunk_learns: whether gradients flow through the hidden states.
        within: what the layers are run in.
    """

    stream: Stream
    finish: Callable[[Hidden], Any]
    trunk_learns: bool = True
    within: Callable[[], AbstractContextManager[None]] = nullcontext


class Passes(Protocol):
    """Runs micro-batches through a model, wherever its layers are."""

    def count(self, num_passes: int) -> int:
        """How many must be run so that this many can."""
        ...

    def train(self, passes: Iterable[Pass]) -> int:
        """Run forward and backward, adding to the gradients that are there; returns how many were run."""
        ...

    def score(self, passes: Iterable[Pass]) -> Iterator[Any]:
        """Run forward without gradient and give what `finish` gives, in order, where the last layers are."""
        ...


@dataclass(frozen=True, slots=True)
class InOrder:
    """One micro-batch in memory at a time.

    Attributes:
        model: all of its layers are on this rank.
        autocast: dtype to compute in when the weights are float32, or None.
    """

    model: StreamModel
    autocast: torch.dtype | None = None

    def count(self, num_passes: int) -> int:
        """As many as there are."""
        return num_passes

    def train(self, passes: Iterable[Pass]) -> int:
        """Forward and backward, one after the other."""
        number = 0
        for number, one in enumerate(passes, 1):  # noqa: B007
            (self._run(one) / self.model.runner.copies).backward()
        return number

    def score(self, passes: Iterable[Pass]) -> Iterator[Any]:
        """Forward only, each when it is asked for."""
        for one in passes:
            with torch.no_grad():  # not around the yield, where it would hold for the caller too
                found = self._run(one)
            yield found

    def _run(self, one: Pass) -> Any:
        def run() -> Any:
            learns = torch.set_grad_enabled(one.trunk_learns and grad)
            with arithmetic(self.model, self.autocast), learns, one.within():
                hidden = self.model.read(one.stream)
            return one.finish(hidden)

        grad = torch.is_grad_enabled()
        return self.model.runner.run(run)


def arithmetic(model: StreamModel, autocast: torch.dtype | None) -> torch.autocast:
    """The context to compute in."""
    return torch.autocast(model.device.type, autocast, enabled=autocast is not None)
