"""The configuration of distillation: a student learns the next-token distributions of teachers."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from nemo_rl.config.schema.base import PositiveFloat, PositiveInt, Section, Share, conflict
from nemo_rl.config.schema.data import DataSpec, RecordsConfig, TaskMixtureConfig
from nemo_rl.config.schema.policy import ModelConfig
from nemo_rl.config.schema.run import ExampleRunConfig, LoopConfig, RunConfig
from nemo_rl.config.schema.sampled import RolloutLoopConfig, SampledRunConfig


class DistillationLossConfig(Section):
    """The divergence between the teacher's and the student's next-token distributions."""

    kl_type: Literal["forward", "reverse", "mixed"] = "mixed"
    """`forward`: KL(teacher || student), which covers all that the teacher may say; `reverse`: KL(student || teacher),
    which keeps to what it says most."""

    mixed_kl_weight: Share = 0.5
    """For `mixed`: the weight of the forward divergence; the reverse one has the rest."""

    zero_outside_topk: bool = False
    """With top-k: the student keeps its whole vocabulary and pays for what it says outside of the teacher's k tokens;
    if not, both distributions are renormalised over these."""

    temperature: PositiveFloat = 1.0
    """Divides the logits of both models before they are compared, whatever temperature the student samples with."""

    @property
    def forward_weight(self) -> float:
        """Weight of the forward divergence; the reverse one has the rest."""
        return {"forward": 1.0, "reverse": 0.0}.get(self.kl_type, self.mixed_kl_weight)


class TaughtLoopConfig(LoopConfig):
    """Steps, validation and seed of the loop, and how much of the teacher's distribution is compared."""

    topk_logits_k: PositiveInt | None = 64
    """Compare the teacher's k likeliest tokens; None compares the whole vocabulary."""


class DistillationLoopConfig(RolloutLoopConfig, TaughtLoopConfig):
    """Steps, validation and seed of the loop, how much it samples, and how much of the teacher is compared."""

    num_generations_per_prompt: PositiveInt = 1
    """Answers to each problem."""


class TaughtRunConfig(RunConfig):
    """A run that learns from teachers."""

    loss_fn: DistillationLossConfig = DistillationLossConfig()
    """The divergence between the teacher's and the student's next-token distributions."""

    @property
    @abstractmethod
    def loop(self) -> TaughtLoopConfig:
        """The algorithm's own section."""

    @property
    @abstractmethod
    def teacher_sections(self) -> Mapping[str, ModelConfig]:
        """The teachers by the dotted names of their sections."""

    @property
    def num_models(self) -> int:
        """The student and each teacher; sections that are alike mean one teacher."""
        return 1 + len(set(self.teacher_sections.values()))

    @model_validator(mode="after")
    def _outside_exists(self) -> Self:
        if self.loss_fn.zero_outside_topk and self.loop.topk_logits_k is None:
            raise conflict(
                f"loss_fn.zero_outside_topk is about what is outside of the top k, and {self.algorithm}.topk_logits_k ="
                " null compares the whole vocabulary: turn the first off or set the second",
                "loss_fn.zero_outside_topk",
                f"{self.algorithm}.topk_logits_k",
            )
        return self


class DistillationConfig(  # pyright: ignore[reportIncompatibleVariableOverride]  # sections are frozen
    SampledRunConfig, TaughtRunConfig
):
    """A run of on-policy distillation: teachers score what the student samples."""

    default_recipe: ClassVar[str] = "distillation_arithmetic_smollm2"
    algorithm: ClassVar[str] = "distillation"

    distillation: DistillationLoopConfig = DistillationLoopConfig()
    """Steps, validation and seed of the loop, how much it samples, and how much of the teacher is compared."""

    teacher: ModelConfig | None = None
    """The teacher of all tasks."""

    teachers: dict[str, ModelConfig] = Field(default_factory=dict[str, ModelConfig])
    """Instead of `teacher`: a teacher for the tasks of each environment, by the environment's name."""

    @property
    def loop(self) -> DistillationLoopConfig:
        """The section `distillation`."""
        return self.distillation

    @property
    def teacher_sections(self) -> Mapping[str, ModelConfig]:
        """The sections `teacher` or `teachers.NAME`."""
        several = {f"teachers.{name}": section for name, section in self.teachers.items()}
        return several if self.teacher is None else {"teacher": self.teacher}

    @model_validator(mode="after")
    def _one_kind_of_teacher(self) -> Self:
        if (self.teacher is None) == (not self.teachers):
            state = "both" if self.teachers else "neither"
            raise conflict(
                f"{state} of teacher and teachers is set: set teacher for all tasks, or teachers with one for each"
                " environment",
                "teacher",
                "teachers",
            )
        return self

    @model_validator(mode="after")
    def _every_task_has_a_teacher(self) -> Self:
        if self.teacher is None:
            for split, spec in (("train", self.data.train), ("validation", self.data.validation)):
                for environment in environments_of(spec):
                    if environment not in self.teachers:
                        known = ", ".join(self.teachers)
                        raise conflict(
                            f"the tasks of data.{split} belong to environment {environment!r}, for which teachers has"
                            f" none: add teachers.{environment} to {known}, or set teacher for all tasks",
                            f"data.{split}",
                            "teachers",
                        )
        return self


def environments_of(spec: DataSpec | None) -> Iterator[str]:
    """The environments that a description of problems names; a data set of the user's own names them in its tasks."""
    if isinstance(spec, TaskMixtureConfig):
        for part in spec.datasets:
            yield from environments_of(part.data)
    elif isinstance(spec, RecordsConfig):
        yield spec.environment


class OfflineDistillationConfig(  # pyright: ignore[reportIncompatibleVariableOverride]  # sections are frozen
    ExampleRunConfig, TaughtRunConfig
):
    """A run of off-policy distillation: a teacher scores given answers."""

    default_recipe: ClassVar[str] = "offline_distillation_arithmetic_smollm2"
    algorithm: ClassVar[str] = "offline_distillation"

    offline_distillation: TaughtLoopConfig = TaughtLoopConfig()
    """Steps, validation and seed of the loop, and how much of the teacher's distribution is compared."""

    teacher: ModelConfig
    """The teacher."""

    @property
    def loop(self) -> TaughtLoopConfig:
        """The section `offline_distillation`."""
        return self.offline_distillation

    @property
    def teacher_sections(self) -> Mapping[str, ModelConfig]:
        """The section `teacher`."""
        return {"teacher": self.teacher}
