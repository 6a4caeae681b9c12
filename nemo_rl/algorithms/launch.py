"""GRPO from a validated configuration to a finished run: build the parts, resume, train, measure, export, sum up."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_rl.algorithms.grpo import train_grpo
from nemo_rl.algorithms.outcome import Outcome, finish
from nemo_rl.algorithms.run import Run
from nemo_rl.algorithms.sampling import RolloutSource
from nemo_rl.algorithms.start import load_model, start
from nemo_rl.config.load import LoadedConfig
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.config.schema.data import ArithmeticDataConfig
from nemo_rl.data.datasets.arithmetic import best_prompts
from nemo_rl.data.datasets.registry import build_dataset, load_tasks
from nemo_rl.data.datasets.streams import Source, held
from nemo_rl.data.lengths import UNCACHED, LengthCache, LengthFilter
from nemo_rl.data.loader import TaskLoader, one_pass
from nemo_rl.data.processors import TaskProcessor, read_prompt_format
from nemo_rl.data.types import SamplingParams, Task
from nemo_rl.environments.registry import build_environments
from nemo_rl.errors import ConfigError, DataError
from nemo_rl.interfaces import Environment, Sampler
from nemo_rl.models.load import end_tokens
from nemo_rl.workers.handles import ColocatedGenerator, Policy
from nemo_rl.workers.policy import PolicyWorker


@dataclass(frozen=True, slots=True)
class Problems:
    """The data of a run, ready for the sampler; `base_test` are the test problems in every candidate prompt."""

    loader: TaskLoader
    validation: tuple[Task, ...]
    test: tuple[Task, ...]
    base_test: Mapping[str, tuple[Task, ...]]


def launch_grpo(loaded: LoadedConfig[GRPOConfig], command: Sequence[str] = ()) -> Outcome:
    """Run GRPO from start, or from the latest checkpoint, to its end.

    Args:
        loaded: the configuration.
        command: what started this, for the advice on how to go on; without it that names the configuration it writes.

    Raises:
        NemoRLError: something the user can correct, or a failure during the run; checkpoints stay intact.
    """
    config = loaded.config
    _check_can_sample(config)
    begun = start(config)
    if begun.earlier is not None:
        return begun.earlier
    with begun.loading() as stack:
        with begun.phase("load"):
            model = load_model(config.policy)
            problems = load_problems(config, model.tokenizer, begun.lengths)
            environments = build_environments(config.env)
            runner = stack.enter_context(asyncio.Runner())
            stack.callback(_close_all, runner, environments)
            with_reference = config.loss_fn.reference_policy_kl_penalty > 0
            worker = begun.worker(stack, PolicyWorker, model, with_reference=with_reference)
            policy = Policy(worker)
            info = begun.checkpoints.resume(policy, problems.loader)
            policy.publish(info.step)
        generator = ColocatedGenerator(worker)
        sampling = sampling_params(config, end_tokens(model.source, model.tokenizer))
        rollouts = rollout_source(
            config, model.tokenizer, sampling, generator, environments, problems.validation, runner
        )
        with begun.run(info) as run:
            if info.step == 0:
                measure_before(config, run, rollouts, problems)
            train_grpo(config, run, policy, rollouts, problems.loader)
            score = partial(rollouts.score, problems.test) if problems.test else None
            return finish(config, run, policy, begun.timer, score=score, first_step=info.step, command=command)


def measure_before(config: GRPOConfig, run: Run, source: RolloutSource, problems: Problems) -> None:
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
    run.begin(source.validate)


def load_problems(
    config: GRPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    lengths: LengthCache = UNCACHED,
) -> Problems:
    """Build the data sets and apply the chat template to what is small enough to be checked now.

    Args:
        config: of the run.
        tokenizer: whose chat template is applied.
        lengths: keeps the token counts of `data.too_long: filter`.

    Raises:
        DataError: data are missing or malformed, a set is empty, or a prompt is too long.
    """
    data = config.data
    prompt_format = read_prompt_format(data.prompt, data.prompt_file, data.system_prompt_file)
    processor = TaskProcessor(tokenizer, prompt_format, config.max_prompt_tokens, data.too_long)
    test = None if data.test is None else build_dataset(data.test, "test")
    train, validation = load_tasks(data, seed=config.grpo.seed, held_out=test)
    if data.too_long == "filter":
        shorter = LengthFilter(config.max_prompt_tokens, tokenizer, lengths, data.num_workers)
        train = shorter.fitting(held(train, "too_long=filter cannot measure"), processor.length, (prompt_format,))
    loader = TaskLoader(
        train,
        config.grpo.num_prompts_per_step,
        processor,
        shuffle=data.shuffle,
        seed=config.grpo.seed,
        num_workers=data.num_workers,
    )

    def tasks(dataset: Source[Task] | None, process: TaskProcessor, limit: int | None = None) -> tuple[Task, ...]:
        if dataset is None:
            return ()
        usable = tuple(islice(one_pass(dataset, process), limit))
        if not usable:
            raise DataError("all prompts of a validation or test set are too long; raise data.max_input_seq_length")
        return usable

    base: dict[str, tuple[Task, ...]] = {}
    if config.grpo.report_base_model and test is not None and isinstance(data.test, ArithmeticDataConfig):
        others = {name: form for name, form in best_prompts().items() if form != processor.prompt_format}
        for name, form in others.items():
            base[name] = tasks(test, replace(processor, prompt_format=form, max_input_length=None))
    return Problems(loader, tasks(validation, processor, config.grpo.max_val_samples), tasks(test, processor), base)


def rollout_source(
    config: GRPOConfig,
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
        group_size=config.grpo.num_generations_per_prompt,
        seed=config.grpo.seed,
        max_failed_share=config.grpo.max_failed_group_share,
        deadline_seconds=config.grpo.max_rollout_seconds,
        validation=validation,
        runner=runner,
    )


def sampling_params(config: GRPOConfig, end_tokens: Sequence[int]) -> SamplingParams:
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


def _check_can_sample(config: GRPOConfig) -> None:
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
