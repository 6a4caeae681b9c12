"""The teachers of a run: found and checked at the door, started in workers of their own, asked about batches."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from nemo_rl.algorithms.start import Model, check_devices, load_model, start_worker
from nemo_rl.config.schema.distillation import TaughtRunConfig
from nemo_rl.config.schema.policy import ModelConfig, TrainedPolicyConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.errors import ConfigError
from nemo_rl.interfaces import Future, WorkerHandle
from nemo_rl.models.load import vocabulary_size
from nemo_rl.workers.handles import Policy
from nemo_rl.workers.teacher import TeacherWorker

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Teaching:
    """Who teaches, known before anything heavy is loaded.

    Attributes:
        models: the teachers; sections that are alike are one teacher.
        place: of each section's teacher in `models`, by the section's dotted name.
        vocab_size: tokens that the student and all teachers have.
    """

    models: tuple[Model[ModelConfig], ...]
    place: Mapping[str, int]
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Teachers:
    """Scores batches with teachers in workers of their own, which follow `interfaces.TeacherBackend`.

    Attributes:
        workers: of the teachers.
        place: see `Teaching`.
        topk: how many tokens of a distribution travel; None sends the hidden states, of which the student's worker
            makes logits with the head that it holds.
    """

    workers: tuple[WorkerHandle, ...]
    place: Mapping[str, int]
    topk: int | None

    def introduce(self, policy: Policy) -> None:
        """Give the student's worker the heads, if it is to make the teachers' logits."""
        if self.topk is None:
            policy.hold_teachers([worker.call("head").result() for worker in self.workers])

    def assign(self, batch: TokenBatch, environments: Sequence[str]) -> TokenBatch:
        """Add the sequence column `teacher`, from the environment of each sequence.

        Raises:
            ConfigError: there is no teacher for an environment.
        """
        return batch.with_sequence_columns(teacher=torch.tensor([self._place(name) for name in environments]))

    def _place(self, environment: str) -> int:
        place = self.place.get("teacher", self.place.get(f"teachers.{environment}"))
        if place is None:
            raise ConfigError(
                f"a task belongs to environment {environment!r}, for which teachers has none: add "
                f"teachers.{environment}, or set teacher for all tasks"
            )
        return place

    def score(self, batch: TokenBatch) -> TokenBatch:
        """Add what the teachers say about every loss token, as `DistillationObjective` reads it.

        A batch without the column `teacher` belongs to the first one.
        """
        owners = batch.sequence_columns.get("teacher", torch.zeros_like(batch.group_ids))
        batch = batch.with_sequence_columns(teacher=owners)
        asked = []
        for index, worker in enumerate(self.workers):
            sequences = (owners == index).nonzero()[:, 0]
            if len(sequences):
                part = _bare(batch.select(sequences))
                asked.append((batch.token_index(sequences), self._ask(worker, part)))
        answers = [(rows, future.result()) for rows, future in asked]
        if self.topk is None:
            return batch.with_columns(teacher_hidden=_placed(batch.num_tokens, answers))
        logprobs, ids = ([(rows, answer[i]) for rows, answer in answers] for i in (0, 1))
        return batch.with_columns(
            teacher_logprobs=_placed(batch.num_tokens, logprobs), teacher_ids=_placed(batch.num_tokens, ids)
        )

    def _ask(self, worker: WorkerHandle, batch: TokenBatch) -> Future:
        if self.topk is None:
            return worker.call("last_hidden", batch)
        return worker.call("topk_logprobs", batch, self.topk)


def _bare(batch: TokenBatch) -> TokenBatch:
    """No more than a teacher reads."""
    return replace(batch, token_columns={"loss_mask": batch.token_columns["loss_mask"]}, sequence_columns={})


def _placed(num_tokens: int, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Put rows [n, w] of several teachers where they belong: [N, W] with the widest W, 0 beyond a narrower one's."""
    dtype = reduce(torch.promote_types, [values.dtype for _, values in parts])
    whole = torch.zeros(num_tokens, max(values.shape[1] for _, values in parts), dtype=dtype)
    for rows, values in parts:
        whole[rows, : values.shape[1]] = values.to(dtype)
    return whole


def find_teachers(config: TaughtRunConfig) -> Teaching:
    """Find the teachers of a run and compare their vocabularies with the student's; loads tokenizers alone.

    Raises:
        ConfigError: a vocabulary is another one, or has fewer than `topk_logits_k` tokens, or there is no such device.
        ModelError: a model is not there.
    """
    student = load_model(config.policy)
    sizes, models, place = [vocabulary_size(student.source)], dict[ModelConfig, Model[ModelConfig]](), dict[str, int]()
    for name, section in config.teacher_sections.items():
        if section not in models:
            check_devices(config.cluster, section.device, section=name)
            models[section] = load_model(section)
            _check_tokens(config.policy, student, section, models[section], name)
            sizes.append(vocabulary_size(models[section].source))
        place[name] = list(models).index(section)
    vocab_size, topk = min(sizes), config.loop.topk_logits_k
    if topk is not None and topk > vocab_size:
        raise ConfigError(
            f"{config.algorithm}.topk_logits_k = {topk} is more than the vocabulary of {vocab_size} tokens; lower it, "
            "or set it to null for all of them"
        )
    if len(set(sizes)) > 1:
        _log.info("the models pad one vocabulary to %s logits; the first %d are compared", sizes, vocab_size)
    return Teaching(tuple(models.values()), place, vocab_size)


def _check_tokens(
    policy: TrainedPolicyConfig,
    student: Model[TrainedPolicyConfig],
    section: ModelConfig,
    teacher: Model[ModelConfig],
    name: str,
) -> None:
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if ours == theirs:
        return
    differing = min(index for _, index in ours.items() ^ theirs.items())
    raise ConfigError(
        f"{name}.model_name = {section.model_name} and policy.model_name = {policy.model_name} have different "
        f"vocabularies ({len(theirs)} and {len(ours)} tokens, the first that differs is {differing}), and a teacher "
        "scores the student's own tokens; choose models of one tokenizer"
    )


def start_teachers(config: TaughtRunConfig, stack: ExitStack, teaching: Teaching) -> Teachers:
    """Start a worker for each teacher, to live as long as the stack.

    Raises:
        ModelError: a teacher cannot be loaded.
    """
    workers = tuple(
        start_worker(
            config,
            stack,
            TeacherWorker,
            model,
            temperature=config.loss_fn.temperature,
            vocab_size=teaching.vocab_size,
        )
        for model in teaching.models
    )
    return Teachers(workers, teaching.place, config.loop.topk_logits_k)
