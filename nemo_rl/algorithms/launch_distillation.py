"""On-policy distillation from a validated configuration to a finished run."""

from collections.abc import Sequence
from contextlib import ExitStack

from nemo_rl.algorithms.distillation import distillation_objective, train_distillation
from nemo_rl.algorithms.launch import Loop, SampledParts, launch_sampled
from nemo_rl.algorithms.outcome import Outcome
from nemo_rl.algorithms.run import Run
from nemo_rl.algorithms.start import Model, Start
from nemo_rl.algorithms.teachers import find_teachers, start_teachers
from nemo_rl.config.load import LoadedConfig
from nemo_rl.config.schema.distillation import DistillationConfig
from nemo_rl.config.schema.policy import PolicyConfig


def launch_distillation(loaded: LoadedConfig[DistillationConfig], command: Sequence[str] = ()) -> Outcome:
    """Distil from start, or from the latest checkpoint, to the end of the run; see `launch_sampled`.

    Raises:
        ConfigError: besides, a teacher's vocabulary is not the student's; before anything heavy is loaded.
    """
    config = loaded.config
    teaching = find_teachers(config)
    objective = distillation_objective(config, teaching.vocab_size)

    def build(begun: Start, stack: ExitStack, model: Model[PolicyConfig]) -> Loop:
        del begun, model
        teachers = start_teachers(config, stack, teaching)

        def loop(run: Run, parts: SampledParts) -> None:
            teachers.introduce(parts.policy)
            train_distillation(config, run, parts.policy, parts.rollouts, parts.loader, teachers, objective)

        return loop

    return launch_sampled(config, build, command)
