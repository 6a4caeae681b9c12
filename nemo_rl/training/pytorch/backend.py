"""The `pytorch` training backend: any Hugging Face causal language model in one process."""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from nemo_rl.config.schema.policy import MilestonesConfig, PolicyConfig, SchedulerConfig, TrainedPolicyConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.distributed.mesh import Mesh
from nemo_rl.errors import BackendError
from nemo_rl.interfaces import Objective
from nemo_rl.metrics import Max, Mean, Metrics
from nemo_rl.models.compiled import compile_layers
from nemo_rl.models.load import model_identity
from nemo_rl.models.lora import whole_weights
from nemo_rl.models.peft_format import adapter_config, adapter_weights, save_adapter
from nemo_rl.models.precision import precision_of
from nemo_rl.objectives.logprobs import LogitHead
from nemo_rl.objectives.truncation import WHOLE, Truncation
from nemo_rl.training.pytorch.checkpoint import TrainingState, export_hf, load_state
from nemo_rl.training.pytorch.host_memory import FrozenWeights, HostRest
from nemo_rl.training.pytorch.loading import Head, balance_of, load_model
from nemo_rl.training.pytorch.optim import MasterWeights, advance, build_optimizer, build_scheduler
from nemo_rl.training.pytorch.recompute import recompute_layers
from nemo_rl.training.pytorch.routing import selection_biases
from nemo_rl.training.pytorch.saving import Saver
from nemo_rl.training.pytorch.spread import Spread
from nemo_rl.training.step import Scorer, evaluate_step, score_tokens, train_step


def _stage(link: SchedulerConfig | MilestonesConfig) -> Mapping[str, Any]:
    """One link of `policy.scheduler` as `build_scheduler` takes it."""
    if isinstance(link, MilestonesConfig):
        return {"milestones": link.milestones}
    return {"name": link.name, "kwargs": link.kwargs}


def build_optimization(
    config: TrainedPolicyConfig, parameters: Iterable[nn.Parameter]
) -> tuple[Optimizer, LRScheduler]:
    """Construct the optimizer and the learning-rate schedule of the `policy` section over float32 parameters.

    Raises:
        ConfigError: an import path or an argument is wrong.
    """
    optimizer = build_optimizer(parameters, config.optimizer.name, config.optimizer.kwargs)
    return optimizer, build_scheduler(optimizer, [_stage(link) for link in config.scheduler])


class PyTorchBackend:
    """Holds the policy, its float32 master weights, the optimizer and the schedule (see `TrainingBackend`)."""

    def __init__(
        self,
        config: TrainedPolicyConfig,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        head: Head = "language",
        with_reference: bool = False,
        mesh: Mesh | None = None,
    ) -> None:
        """Load the model.

        Args:
            config: the `policy` section; with `generation`, the distribution trained is the one sampled from.
            source: model folder or hub name (`nemo_rl.models.load.resolve_model`).
            tokenizer: saved with every checkpoint and export.
            head: what stands on the trunk.
            with_reference: keep a frozen copy of the starting weights, of those that are trained.
            mesh: the ranks that the model is spread over, all of which make a backend; None is this process alone.
        """
        self._spread: Spread
        self.model, self._adapters, self._spread = load_model(config, source, head, tokenizer, mesh)
        recompute_layers(self.model.trunk, config.dtensor_cfg.activation_checkpointing)
        module = self.model.module
        self.precision = precision_of(config.precision, self.model.device)
        self._config = config
        self._source = source
        self._tokenizer = tokenizer
        if config.compile:
            compile_layers(self.model.trunk)
        self._masters = MasterWeights(module)
        self._optimizer, self._scheduler = build_optimization(config, self._masters.parameters)
        self._optimizer_steps = 0
        self._saver = Saver()
        self._balance = balance_of(config.moe, mesh)
        self._biases = selection_biases(module) if config.moe.bias_update_rate else {}
        self._rest = HostRest()
        self._reference = self._frozen() if with_reference else None
        sampling = config.generation if isinstance(config, PolicyConfig) else None
        self._scorer = Scorer(
            self.model,
            temperature=sampling.temperature if sampling else 1.0,
            chunk_size=config.head_rows(self.model.vocab_size, on_gpu=self.model.device.type == "cuda"),
            share_prefixes=config.share_prefixes,
            min_shared=config.min_shared_prefix,
            packing=config.sequence_packing.algorithm,
            agree=self._spread.agree,
            anywhere=self._spread.anywhere,
            pipeline=self._spread.pipeline,
            autocast=self.precision.autocast,
            truncation=Truncation(sampling.top_p, sampling.top_k or 0, sampling.min_p) if sampling else WHOLE,
        )

    def train(self, batch: TokenBatch, objective: Objective) -> Metrics:
        """One optimizer step on the whole batch."""
        self.on_device()
        max_tokens = self._config.train_mb_tokens
        dropout = self._adapters.dropout(seed=self._optimizer_steps) if self._adapters else nullcontext()
        try:
            with dropout:
                return train_step(
                    self._scorer, batch, objective, max_tokens=max_tokens, update=self._update, balance=self._balance
                )
        finally:
            self._optimizer.zero_grad()  # also those of a step that failed halfway

    def evaluate(self, batch: TokenBatch, objective: Objective) -> Metrics:
        """The loss of a batch and its metrics; no weight changes."""
        self.make_room()
        return evaluate_step(self._scorer, batch, objective, max_tokens=self._config.train_mb_tokens)

    def hold_teachers(self, heads: Sequence[LogitHead]) -> None:
        """Keep the heads of teachers, on this device, for objectives that compare whole vocabularies."""
        self._scorer = replace(self._scorer, teachers=tuple(head.to(self._scorer.device) for head in heads))

    def _update(self) -> Metrics:
        norm = self._spread.clip(self._masters.named, self._config.max_grad_norm)
        rate = float(self._optimizer.param_groups[0]["lr"])
        if not norm < float("inf"):
            raise BackendError(
                f"the gradient norm is {norm}; lower the learning rate or look at the rollouts of this step"
            )
        self._optimizer_steps += 1  # from here on the weights are others, even if this fails halfway
        self._optimizer.step()
        advance(self._scheduler)
        self._masters.publish()
        return {"grad_norm": Mean(norm), "grad_norm_max": Max(norm), "learning_rate": Mean(rate)}

    def logprobs(self, batch: TokenBatch) -> Tensor:
        """float32 [N]: log-probabilities under the current weights where `loss_mask` is true, 0 elsewhere."""
        self.make_room()
        return score_tokens(self._scorer, batch, max_tokens=self._config.logprob_mb_tokens)

    def values(self, batch: TokenBatch) -> Tensor:
        """float32 [N]: the value before each token where `loss_mask` is true, 0 elsewhere.

        Raises:
            BackendError: the model has no head for it.
        """
        self.make_room()
        return score_tokens(self._scorer, batch, max_tokens=self._config.logprob_mb_tokens, reads="values")

    def offload(self) -> None:
        """Move to the CPU what only an optimizer step reads: its state, and masters the model does not compute with."""
        moments = (value for state in self._optimizer.state.values() for value in state.values())
        self._rest.put([*self._masters.copies, *(value for value in moments if isinstance(value, Tensor))])

    def on_device(self) -> None:
        """Bring back what `offload` moved; `train` does so by itself."""
        self._rest.fetch()

    def make_room(self) -> None:
        """Before work that is not training: `offload`, where the configuration asks for it."""
        if self._config.offload_optimizer_for_logprob:
            self.offload()

    def _frozen(self) -> FrozenWeights:
        """What is trained, as it is now: sharded weights as they are cast for computing, which takes less memory."""
        is_spread = self._spread.is_shared
        dtype = self.precision.weights if is_spread and not self._adapters else None
        return FrozenWeights(self._trained(), dtype, rests=self._config.reference_on_cpu, swaps=not is_spread)

    @contextmanager
    def reference(self) -> Generator[None]:
        """Put the frozen starting weights in place of the current ones.

        Raises:
            BackendError: no reference was kept (the loss compares with none).
        """
        if self._reference is None:
            raise BackendError("no reference weights were kept; set loss_fn.reference_policy_kl_penalty above 0")
        with self._reference.in_place():
            yield

    def _trained(self) -> list[nn.Parameter]:
        """All weights, or the adapters and new heads alone."""
        return [parameter for parameter in self.model.module.parameters() if parameter.requires_grad]

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Stream the weights that the model computes with, by Hugging Face name, tied ones once; on all ranks."""
        for name, weight in self._spread.stream(whole_weights(self.model.module)):
            yield name, weight.to(self.precision.weights)

    def named_adapter_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Stream the adapters by PEFT's names, on all ranks at once; nothing without adapters."""
        if self._adapters:
            yield from self._spread.stream(adapter_weights(self.model.module))

    def _state(self) -> TrainingState:
        identity = {**model_identity(self.model.module.config), **(self._adapters.identity if self._adapters else {})}
        weights = {**self._masters.named, **self._biases}
        return TrainingState(weights, self._optimizer, self._scheduler, identity, self._spread.is_shared)

    def save(self, folder: Path, *, in_background: bool = False) -> None:
        """Write trained weights, optimizer, schedule and tokenizer; bitwise restored by `load`.

        `in_background`, return as soon as they are copied; the folder is whole once `finish_save` says so.
        """
        self._saver.save(folder, self._state(), self._tokenizer, in_background=in_background)

    def finish_save(self, *, wait: bool = True) -> bool:
        """Whether what `save` began is written; raises what it failed with. With `wait`, return when it is."""
        return self._saver.finish(wait=wait)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, once, before the first step; the reference weights stay those of the start."""
        self.on_device()
        load_state(folder, self._state())
        self._masters.publish()
        self._optimizer_steps = self._scheduler.last_epoch

    def export(self, folder: Path) -> None:
        """Write a Hugging Face model folder in bfloat16, or float32 if the model computes in it.

        Adapters are added to the weights, and stand in `adapter/` by themselves in PEFT's format.
        """
        module, masters = self.model.module, self._masters.named
        dtype = torch.float32 if self.precision.name == "float32" else torch.bfloat16
        weights = ((name, masters.get(name, weight)) for name, weight in whole_weights(module))
        adapter = dict(self.named_adapter_weights())  # before anything can fail on the rank that writes
        export_hf(module, self._tokenizer, folder, dtype, weights, self._spread)
        if self._adapters and (not self._spread.is_shared or dist.get_rank() == 0):
            save_adapter(folder / "adapter", adapter, adapter_config(module, self._adapters, self._source))

    def describe(self) -> Mapping[str, Any]:
        """Parameters, device, precision, and how many optimizer steps were begun."""
        return {
            "model": type(self.model.module).__name__,
            "parameters": self._spread.num_parameters or self.model.num_parameters,
            "trained_parameters": sum(parameter.numel() for parameter in self._trained()),
            "device": str(self._scorer.device),
            "precision": self.precision.name,
            "optimizer_steps": self._optimizer_steps,
        }
