"""From a validated configuration to a finished run: build the parts, resume, train, measure, export, sum up."""

import asyncio
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from nemo_rl.algorithms.checkpoints import Checkpoints
from nemo_rl.algorithms.grpo import train_grpo
from nemo_rl.algorithms.outcome import Outcome, earlier_outcome, finish
from nemo_rl.algorithms.run import Run, is_used_up
from nemo_rl.algorithms.sampling import RolloutSource
from nemo_rl.atomic import write_text_atomically
from nemo_rl.config.load import LoadedConfig, dump_config
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.config.schema.data import ArithmeticDataConfig
from nemo_rl.config.schema.policy import PolicyConfig
from nemo_rl.data.chat import PromptFormat
from nemo_rl.data.datasets.arithmetic import best_prompts
from nemo_rl.data.datasets.registry import build_dataset
from nemo_rl.data.loader import TaskLoader, one_pass
from nemo_rl.data.processors import TaskProcessor
from nemo_rl.data.types import SamplingParams, Task, TaskDataset
from nemo_rl.distributed.cache import cache_dir
from nemo_rl.distributed.executor import make_executor
from nemo_rl.environments.registry import build_environments
from nemo_rl.errors import ConfigError, DataError
from nemo_rl.interfaces import Environment, Executor, Resources, Sampler, WorkerHandle
from nemo_rl.models.load import end_tokens, load_tokenizer, quiet_libraries, resolve_model
from nemo_rl.observe.console import Console
from nemo_rl.observe.logger import RolloutWriter, RunLogger
from nemo_rl.observe.sinks import build_sinks
from nemo_rl.observe.summary import PhaseTimer
from nemo_rl.training.pytorch.backend import build_optimization
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
    _check_can_run(config)
    timer = PhaseTimer()
    checkpoints = Checkpoints(config.checkpointing, dump_config(config))
    checkpoints.open_folder()
    latest = checkpoints.latest()
    console = Console(
        total_steps=config.grpo.max_num_steps,
        first_step=latest.step,
        sample_period=config.logger.print_sample_period,
    )
    earlier = earlier_outcome(checkpoints.folder, latest.step)
    if earlier is not None and is_used_up(config, latest.step, latest.epochs):
        console.note(
            f"{checkpoints.folder} holds this run, finished after step {latest.step}: raise grpo.max_num_steps "
            "(or max_num_epochs) to go on, or choose another checkpointing.checkpoint_dir to start afresh"
        )
        return earlier
    with ExitStack() as stack:
        stack.enter_context(console)
        stack.enter_context(_logging_through(console))
        with timer.phase("load"), console.phase("load"):
            source = resolve_model(config.policy.model_name, cache_dir())
            policy_config = worker_policy(config.policy, source)
            tokenizer = load_tokenizer(policy_config.tokenizer.name or source, policy_config.tokenizer.chat_template)
            problems = load_problems(config, tokenizer)
            environments = build_environments(config.env)
            runner = stack.enter_context(asyncio.Runner())
            stack.callback(_close_all, runner, environments)
            executor = stack.enter_context(
                make_executor(config.cluster.executor, startup_timeout_seconds=config.cluster.startup_timeout_seconds)
            )
            worker = _start_worker(config, executor, policy_config, source)
            policy = Policy(worker)
            info = checkpoints.resume(policy, problems.loader)
            policy.publish(info.step)
        logger = open_logger(config, checkpoints, info.step)
        generator = ColocatedGenerator(worker)
        sampling = sampling_params(config, end_tokens(source, tokenizer))
        rollouts = rollout_source(config, tokenizer, sampling, generator, environments, problems.validation, runner)
        run = Run(config, checkpoints=checkpoints, logger=logger, console=console, timer=timer, info=info)
        with run:
            if info.step == 0:
                measure_before(config, run, rollouts, problems)
            train_grpo(config, run, policy, rollouts, problems.loader)
            return finish(config, run, policy, rollouts, problems.test, timer, first_step=info.step, command=command)


def _start_worker(config: GRPOConfig, executor: Executor, policy: PolicyConfig, source: str) -> WorkerHandle:
    num_cpus, num_gpus = float(config.policy.num_threads or 1), float(config.cluster.gpus_per_node > 0)
    with_reference = config.loss_fn.reference_policy_kl_penalty > 0
    resources = Resources(num_cpus=num_cpus, num_gpus=num_gpus)
    return executor.start(PolicyWorker, policy, source, with_reference=with_reference, resources=resources)


def open_logger(config: GRPOConfig, checkpoints: Checkpoints, step: int) -> RunLogger:
    """Write the resolved configuration and open the records of a run, which goes on after `step`.

    Raises:
        ConfigError: the folder of the logs cannot be written.
    """
    folder = checkpoints.folder
    try:
        write_text_atomically(folder / "config.yaml", checkpoints.config_yaml)
        first_step = step + 1 if step else 0
        sinks = build_sinks(config.logger, folder, first_step=first_step, resolved=config.model_dump(mode="json"))
    except OSError as error:
        where = config.logger.log_dir or folder
        raise ConfigError(
            f"cannot write the logs in {where} ({error}); set logger.log_dir to another folder"
        ) from error
    return RunLogger(sinks, RolloutWriter(folder / "rollouts"))


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
    if config.grpo.val_at_start:
        run.validate(0, source.validate)


def load_problems(config: GRPOConfig, tokenizer: PreTrainedTokenizerBase) -> Problems:
    """Build the data sets and apply the chat template to what is small enough to be checked now.

    Raises:
        DataError: data are missing or malformed, a set is empty, or a prompt is too long.
    """
    data = config.data
    processor = TaskProcessor(tokenizer, _prompt_format(config), config.max_prompt_tokens, data.too_long)
    test = None if data.test is None else build_dataset(data.test, "test")
    validation = None if data.validation is None else build_dataset(data.validation, "validation")
    train = build_dataset(data.train, "train", held_out=test)
    loader = TaskLoader(
        train,
        config.grpo.num_prompts_per_step,
        processor,
        shuffle=data.shuffle,
        seed=config.grpo.seed,
        num_workers=data.num_workers,
    )

    def tasks(dataset: TaskDataset | None, process: TaskProcessor, limit: int | None = None) -> tuple[Task, ...]:
        if dataset is None:
            return ()
        usable = tuple(islice(one_pass(dataset, process), limit))
        if not usable:
            raise DataError("all prompts of a validation or test set are too long; raise data.max_input_seq_length")
        return usable

    base: dict[str, tuple[Task, ...]] = {}
    if config.grpo.report_base_model and test is not None and isinstance(data.test, ArithmeticDataConfig):
        others = {name: form for name, form in best_prompts().items() if form != processor.prompt_format}
        for name, prompt_format in others.items():
            base[name] = tasks(test, replace(processor, prompt_format=prompt_format, max_input_length=None))
    return Problems(loader, tasks(validation, processor, config.grpo.max_val_samples), tasks(test, processor), base)


def _prompt_format(config: GRPOConfig) -> PromptFormat:
    def text(path: str | None, key: str) -> str | None:
        if path is None:
            return None
        try:
            return Path(path).expanduser().read_text()
        except OSError as error:
            raise DataError(f"cannot read data.{key} = {path}: {error.strerror}") from error

    prompt = config.data.prompt or text(config.data.prompt_file, "prompt_file") or "{}"
    return PromptFormat(prompt=prompt, system_prompt=text(config.data.system_prompt_file, "system_prompt_file"))


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


def worker_policy(policy: PolicyConfig, source: str) -> PolicyConfig:
    """The `policy` section as its worker takes it, wherever that is.

    The tokenizer's name is resolved, and the threads are those of this process, because Ray would allow one.
    """
    name = policy.tokenizer.name
    tokenizer = source if name is None else resolve_model(name, cache_dir(), part="tokenizer")
    return policy.model_copy(
        update={
            "tokenizer": policy.tokenizer.model_copy(update={"name": tokenizer}),
            "num_threads": policy.num_threads or torch.get_num_threads(),
        }
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


def _check_can_run(config: GRPOConfig) -> None:
    """Refuse what there is no backend, optimizer or device for; with Ray, the cluster says which devices it has."""
    generation, cluster = config.policy.generation, config.cluster
    if generation.backend != "hf":
        raise ConfigError(
            f"policy.generation.backend is {generation.backend}, which this version plans (--dry-run) but does not "
            "run; set it to hf"
        )
    if not generation.colocated.enabled:
        raise ConfigError(
            "the hf backend samples in the policy's process; set policy.generation.colocated.enabled=true"
        )
    if cluster.num_nodes * cluster.gpus_per_node > 1:
        raise ConfigError(
            f"the policy runs in one process on one device, and cluster asks for {cluster.num_nodes} nodes with "
            f"{cluster.gpus_per_node} GPUs each; set cluster.num_nodes=1 and cluster.gpus_per_node to 0 or 1"
        )
    build_optimization(config.policy, [nn.Parameter(torch.zeros(1))])  # a wrong name or argument, before the model
    if cluster.executor != "local" or torch.cuda.is_available():
        return
    if config.policy.device == "cuda":
        raise ConfigError("policy.device is cuda and torch finds no GPU here; set it to auto or cpu")
    if cluster.gpus_per_node > 0:
        raise ConfigError(f"cluster.gpus_per_node is {cluster.gpus_per_node} and torch finds no GPU here; set it to 0")


def _close_all(runner: asyncio.Runner, environments: Mapping[str, Environment]) -> None:
    async def close() -> None:
        await asyncio.gather(*(environment.close() for environment in environments.values()))

    runner.run(close())


@contextmanager
def _logging_through(console: Console) -> Generator[None]:
    """Show log records above the bar; what libraries write past it would tear it."""
    quiet_libraries()
    root, handler = logging.getLogger(), console.handler()
    package, level = logging.getLogger("nemo_rl"), logging.getLogger("nemo_rl").level
    package.setLevel(logging.INFO)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        package.setLevel(level)
