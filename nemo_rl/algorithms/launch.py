"""A run that samples, from a validated configuration to its end: build the parts, resume, train, measure, sum up."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_rl.algorithms.grpo import train_grpo
from nemo_rl.algorithms.judges import reward_model_starter
from nemo_rl.algorithms.outcome import Outcome, finish
from nemo_rl.algorithms.problems import Problems, load_problems
from nemo_rl.algorithms.run import Run
from nemo_rl.algorithms.sampling import RolloutSource
from nemo_rl.algorithms.start import Model, Start, load_model, start
from nemo_rl.config.load import LoadedConfig
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.config.schema.policy import PolicyConfig
from nemo_rl.config.schema.sampled import SampledRunConfig
from nemo_rl.data.loader import TaskLoader
from nemo_rl.data.types import SamplingParams, Task
from nemo_rl.environments.registry import build_environments
from nemo_rl.errors import ConfigError
from nemo_rl.interfaces import Environment, Sampler
from nemo_rl.models.load import end_tokens
from nemo_rl.workers.handles import ColocatedGenerator, Policy
from nemo_rl.workers.policy import PolicyHead, PolicyWorker


@dataclass(frozen=True, slots=True)
class SampledParts:
    """What a loop that samples works with.

    Attributes:
        policy: is trained.
        rollouts: samples from it and has the answers judged.
        loader: draws the problems.
    """

    policy: Policy
    rollouts: RolloutSource
    loader: TaskLoader


type Loop = Callable[[Run, SampledParts], None]
type BuildLoop = Callable[[Start, ExitStack, Model[PolicyConfig]], Loop]
"""Starts what a loop needs besides the policy, to live as long as the stack, and returns the loop."""


def launch_grpo(loaded: LoadedConfig[GRPOConfig], command: Sequence[str] = ()) -> Outcome:
    """Run GRPO from start, or from the latest checkpoint, to its end; see `launch_sampled`."""
    config = loaded.config

    def build(begun: Start, stack: ExitStack, model: Model[PolicyConfig]) -> Loop:
        del begun, stack, model
        return lambda run, parts: train_grpo(config, run, parts.policy, parts.rollouts, parts.loader)

    return launch_sampled(config, build, command, with_reference=config.loss_fn.reference_policy_kl_penalty > 0)


def launch_sampled(
    config: SampledRunConfig,
    build: BuildLoop,
    command: Sequence[str],
    *,
    head: PolicyHead = "language",
    with_reference: bool = False,
) -> Outcome:
    """Build the parts of a run, resume, measure, train, measure again, export and sum up.

    Args:
        config: of the run.
        build: makes the loop.
        command: what started this, for the advice on how to go on; without it that names the configuration it writes.
        head: what stands on the policy's trunk.
        with_reference: keep the starting weights, to compare with.

    Raises:
        NemoRLError: something the user can correct, or a failure during the run; checkpoints stay intact.
    """
    _check_can_sample(config)
    begun = start(config)
    if begun.earlier is not None:
        return begun.earlier
    with begun.loading() as stack:
        with begun.phase("load"):
            model = load_model(config.policy)
            problems = load_problems(config, model.tokenizer, begun.lengths)
            environments = build_environments(config.env, reward_model_starter(config.cluster, stack))
            runner = stack.enter_context(asyncio.Runner())
            stack.callback(_close_all, runner, environments)
            worker = begun.worker(stack, PolicyWorker, model, head=head, with_reference=with_reference)
            policy = Policy(worker)
            begun.timer.watch(policy.take_peak_memory)
            loop = build(begun, stack, model)
            info = begun.checkpoints.resume(policy, problems.loader)
            policy.publish(info.step)
        generator = ColocatedGenerator(worker)
        sampling = sampling_params(config, end_tokens(model.source, model.tokenizer))
        rollouts = rollout_source(
            config, model.tokenizer, sampling, generator, environments, problems.validation, runner
        )
        with begun.run(info) as run:
            if info.step == 0:
                measure_before(run, rollouts, problems)
            loop(run, SampledParts(policy, rollouts, problems.loader))
            score = partial(rollouts.score, problems.test) if problems.test else None
            return finish(config, run, policy, begun.timer, score=score, first_step=info.step, command=command)


def measure_before(run: Run, source: RolloutSource, problems: Problems) -> None:
    """Measure what the base model can do, so that the run can be compared with it; resumed runs remember it."""
    sets = {"test": problems.test, **{f"base/{name}": tasks for name, tasks in problems.base_test.items()}}
    with run.phase("evaluate"):
        scores = {name: source.score(tasks) for name, tasks in sets.items() if tasks}
    before = {f"{name}/{figure}": value for name, score in scores.items() for figure, value in score.items()}
    run.info = replace(run.info, before=before)
    for name, value in before.items():
        run.log_outcome(f"before/{name}", value)
    for figure in ("accuracy", "reward"):
        if found := {name.removeprefix("base/"): score[figure] for name, score in scores.items() if figure in score}:
            by_prompt = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
            run.console.note(f"greedy {figure} before training, by prompt: {by_prompt}")
            break


def rollout_source(
    config: SampledRunConfig,
    tokenizer: PreTrainedTokenizerBase,
    sampling: SamplingParams,
    generator: Sampler,
    environments: Mapping[str, Environment],
    validation: tuple[Task, ...],
    runner: asyncio.Runner,
) -> RolloutSource:
    """Put together what collects the rollouts of a run; everything but the parts comes from the configuration."""
    return RolloutSource(
        generator=generator,
        environments=environments,
        decode=_decoder(tokenizer),
        sampling=sampling,
        group_size=config.loop.num_generations_per_prompt,
        seed=config.loop.seed,
        max_failed_share=config.loop.max_failed_group_share,
        deadline_seconds=config.loop.max_rollout_seconds,
        validation=validation,
        runner=runner,
    )


def sampling_params(config: SampledRunConfig, end_tokens: Sequence[int]) -> SamplingParams:
    """Everything about sampling, explicitly: the end tokens of the model and the stops of the configuration."""
    generation = config.policy.generation
    return SamplingParams(
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k or 0,
        min_p=generation.min_p,
        stop_token_ids=(*end_tokens, *(generation.stop_token_ids or ())),
        stop_strings=tuple(generation.stop_strings or ()),
    )


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Tensor], str]:
    return lambda token_ids: cast(str, tokenizer.decode(token_ids, skip_special_tokens=True))


def _check_can_sample(config: SampledRunConfig) -> None:
    """Refuse what there is no generation backend for."""
    generation = config.policy.generation
    if generation.backend != "hf":
        raise ConfigError(
            f"policy.generation.backend is {generation.backend}, which this version plans (--dry-run) but does not "
            "run; set it to hf"
        )
    if not generation.colocated.enabled:
        raise ConfigError(
            "the hf backend samples in the policy's process; set policy.generation.colocated.enabled=true"
        )


def _close_all(runner: asyncio.Runner, environments: Mapping[str, Environment]) -> None:
    async def close() -> None:
        await asyncio.gather(*(environment.close() for environment in environments.values()))

    runner.run(close())
