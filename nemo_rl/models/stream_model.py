"""`StreamModel`: the trunk of a Transformers model that runs on streams, whatever head stands on it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nemo_rl.data.packing import Stream
from nemo_rl.data.transfer import moved
from nemo_rl.models.attention import AttentionPlan, TreeAttention, use_plans
from nemo_rl.models.hidden import Hidden, WholeHidden
from nemo_rl.models.rows import run_rows

_log = logging.getLogger(__name__)


class Runner(Protocol):
    """Runs a model wherever its weights and tokens are.

    Attributes:
        parts: ranks among which the tokens of a stream are divided between the layers; their number is a multiple.
        copies: ranks that compute the same loss, each of which calls backward on its share of it.
    """

    @property
    def parts(self) -> int: ...
    @property
    def copies(self) -> int: ...
    def run[T](self, function: Callable[[], T]) -> T:
        """Call a function within which the weights can be read, and from whose result gradients flow to them."""
        ...

    def read(self, model: "StreamModel", stream: Stream, received: Tensor | None) -> Hidden:
        """Run the trunk of a model; see `StreamModel.read`."""
        ...


@dataclass(frozen=True, slots=True)
class InProcess:
    """Runs a model whose weights are all here, and all tokens of a stream."""

    parts: int = 1
    copies: int = 1

    def run[T](self, function: Callable[[], T]) -> T:
        """Call it."""
        return function()

    def read(self, model: "StreamModel", stream: Stream, received: Tensor | None) -> Hidden:
        """Run the trunk here."""
        return WholeHidden(model.stream_hidden(stream, received))


@dataclass(frozen=True, slots=True)
class StreamModel:
    """A model on streams.

    Attributes:
        module: the whole Transformers model.
        takes_plans: its attention is replaced by attention plans; if not, every sequence is a padded row of its own.
        trunk: the model without its head.
        runner: calls whatever reads the weights.
    """

    module: PreTrainedModel
    takes_plans: bool
    trunk: nn.Module
    runner: Runner = field(default_factory=InProcess, kw_only=True)

    @property
    def device(self) -> torch.device:
        return next(self.trunk.parameters()).device

    @property
    def num_parameters(self) -> int:
        """Parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def vocab_size(self) -> int:
        """Logits that the language model has, or would have."""
        return self.module.config.get_text_config().vocab_size

    def read(self, stream: Stream, received: Tensor | None = None) -> Hidden:
        """Run the trunk over a micro-batch, wherever its tokens are; arguments as in `stream_hidden`."""
        return self.runner.read(self, stream, received)

    def stream_hidden(self, stream: Stream, received: Tensor | None = None) -> Tensor:
        """Run the trunk over a micro-batch: last hidden states [S, H], all of them here.

        Args:
            stream: the micro-batch.
            received: [1, S, H] that earlier layers on another rank made of it; None begins with the tokens.
        """
        device = self.device
        input_ids = moved(stream.input_ids, device)
        if not self.takes_plans:
            return run_rows(self.trunk, input_ids, stream.tree)
        plan = TreeAttention(stream.tree, device)
        return self.hidden(input_ids, moved(stream.position_ids, device), plan, received)

    def hidden(
        self, input_ids: Tensor, position_ids: Tensor, plan: AttentionPlan, received: Tensor | None = None
    ) -> Tensor:
        """Run the trunk along a plan, which the model must take: int64 [S], int64 [S] -> last hidden states [S, H]."""
        begin = {"input_ids": input_ids[None]} if received is None else {"inputs_embeds": received}
        output = self.trunk(**begin, position_ids=position_ids[None], use_cache=False, attention_plan=plan)
        return cast(Tensor, output.last_hidden_state)[0]


def take_plans(module: PreTrainedModel) -> bool:
    """Let attention plans replace the model's attention, and say so once if it cannot be."""
    takes_plans = use_plans(module)
    if not takes_plans:
        _log.warning(
            "%s does not mix tokens by plain attention alone, so it trains on padded rows and shares no prefixes",
            type(module).__name__,
        )
    return takes_plans
