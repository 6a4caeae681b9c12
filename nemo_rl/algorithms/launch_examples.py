"""Training on given answers from a validated configuration to a finished run: SFT, preferences and their kin."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from nemo_rl.algorithms.distillation import distillation_objective, train_off_policy_distillation
from nemo_rl.algorithms.outcome import Outcome, finish
from nemo_rl.algorithms.preference import preference_objective, train_on_judged, train_on_pairs
from nemo_rl.algorithms.reward_model import rm_objective, train_rm
from nemo_rl.algorithms.run import Run
from nemo_rl.algorithms.sft import train_sft
from nemo_rl.algorithms.start import load_model, start
from nemo_rl.algorithms.teachers import find_teachers, start_teachers
from nemo_rl.config.load import LoadedConfig
from nemo_rl.config.schema.distillation import OffPolicyDistillationConfig
from nemo_rl.config.schema.examples import ExampleDataConfig
from nemo_rl.config.schema.preference import DPOConfig
from nemo_rl.config.schema.reward_model import RMConfig
from nemo_rl.config.schema.run import ExampleRunConfig
from nemo_rl.config.schema.sft import SFTConfig
from nemo_rl.data.lengths import UNCACHED, LengthCache
from nemo_rl.data.supervised import Supervision, prepare_examples, prepare_judged, prepare_preferences, prepare_scored
from nemo_rl.data.types import Chat, Example
from nemo_rl.objectives.preference import KTOObjective
from nemo_rl.training.pytorch.loading import Head
from nemo_rl.workers.handles import Policy
from nemo_rl.workers.train import TrainWorker


class Prepare[Item, Ready](Protocol):
    """Makes the data of a run ready; see `prepare_examples`."""

    def __call__(
        self,
        data: ExampleDataConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        max_length: int,
        seed: int,
        max_val_samples: int | None = None,
        lengths: LengthCache = UNCACHED,
    ) -> Supervision[Item, Ready]: ...


def launch_sft(loaded: LoadedConfig[SFTConfig], command: Sequence[str] = ()) -> Outcome:
    """Fine-tune from start, or from the latest checkpoint, to the end of the run; see `_launch`."""
    return _launch(loaded.config, prepare_examples, train_sft, command)


def launch_preference(loaded: LoadedConfig[DPOConfig], command: Sequence[str] = ()) -> Outcome:
    """Train on preferences from start, or from the latest checkpoint, to the end of the run; see `_launch`."""
    config = loaded.config
    objective = preference_objective(config.dpo)
    if isinstance(objective, KTOObjective):
        train = partial(train_on_judged, config, objective=objective)
        return _launch(config, prepare_judged, train, command, with_reference=True)
    train = partial(train_on_pairs, config.dpo, objective=objective)
    return _launch(config, prepare_preferences, train, command, with_reference=objective.needs_reference)


def launch_rm(loaded: LoadedConfig[RMConfig], command: Sequence[str] = ()) -> Outcome:
    """Train a reward model from start, or from the latest checkpoint, to the end of the run; see `_launch`."""
    config = loaded.config
    train = partial(train_rm, objective=rm_objective(config.rm))
    prepare = partial(prepare_scored, margins_wanted=config.rm.margin_scale > 0)
    return _launch(config, prepare, train, command, head="scalar")


def launch_off_policy_distillation(
    loaded: LoadedConfig[OffPolicyDistillationConfig], command: Sequence[str] = ()
) -> Outcome:
    """Distil on given answers from start, or from the latest checkpoint, to the end of the run; see `_launch`.

    Raises:
        ConfigError: besides, the teacher's vocabulary is not the student's; before anything heavy is loaded.
    """
    config = loaded.config
    teaching = find_teachers(config)
    objective = distillation_objective(config, teaching.vocab_size)

    def train(run: Run, policy: Policy, data: Supervision[Chat, Example]) -> None:
        with ExitStack() as stack:
            with run.phase("load"):
                teachers = start_teachers(config, stack, teaching)
                teachers.introduce(policy)
            train_off_policy_distillation(run, policy, data, teachers, objective)

    return _launch(config, prepare_examples, train, command)


def _launch[Item, Ready](
    config: ExampleRunConfig,
    prepare: Prepare[Item, Ready],
    train: Callable[[Run, Policy, Supervision[Item, Ready]], None],
    command: Sequence[str],
    *,
    head: Head = "language",
    with_reference: bool = False,
) -> Outcome:
    """Build the parts of a run, resume, train, export and sum up.

    Args:
        config: of the run.
        prepare: makes the data ready.
        train: the loop.
        command: what started this, for the advice on how to go on; without it that names the configuration it writes.
        head: what stands on the trunk of the model.
        with_reference: keep the starting weights, to compare with.

    Raises:
        NemoRLError: something the user can correct, or a failure during the run; checkpoints stay intact.
    """
    begun = start(config)
    if begun.earlier is not None:
        return begun.earlier
    with begun.loading() as stack:
        with begun.phase("load"):
            model = load_model(config.policy)
            data = prepare(
                config.data,
                model.tokenizer,
                batch_size=config.policy.train_global_batch_size,
                max_length=config.max_sequence_tokens,
                seed=config.loop.seed,
                max_val_samples=config.loop.max_val_samples,
                lengths=begun.lengths,
            )
            policy = Policy(begun.worker(stack, TrainWorker, model, head=head, with_reference=with_reference))
            begun.timer.watch(policy.take_peak_memory)
            info = begun.checkpoints.resume(policy, data.loader)
        with begun.run(info) as run:
            train(run, policy, data)
            return finish(config, run, policy, begun.timer, first_step=info.step, command=command)
