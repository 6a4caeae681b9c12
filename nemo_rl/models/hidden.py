"""Hidden states as a head asks for them: by the stream position that predicts, wherever the tokens are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from nemo_rl.data.transfer import moved
from nemo_rl.objectives.logprobs import select_hidden

type Score = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From hidden states [m, H] and targets int64 [m] to two float32 [m], of which the first has a gradient."""


class Hidden(Protocol):
    """The last hidden states of a stream.

    Attributes:
        states: [S, H], of the tokens that are here.
    """

    @property
    def states(self) -> Tensor: ...
    def rows(self, predictor: Tensor) -> Tensor:
        """The states of stream positions int64 [M], with gradient: [M, H]."""
        ...

    def scores(self, predictor: Tensor, target: Tensor, score: Score) -> tuple[Tensor, Tensor]:
        """Score `target` int64 [M] by the states of these positions: two [M]."""
        ...


@dataclass(frozen=True, slots=True)
class WholeHidden:
    """All tokens are here."""

    states: Tensor

    def rows(self, predictor: Tensor) -> Tensor:
        return select_hidden(self.states, moved(predictor, self.states.device))

    def scores(self, predictor: Tensor, target: Tensor, score: Score) -> tuple[Tensor, Tensor]:
        return score(self.rows(predictor), moved(target, self.states.device))
