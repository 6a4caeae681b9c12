"""An evaluation: problems in, judged answers and a figure with its uncertainty out."""

import asyncio
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedTokenizerBase

from nemo_rl.algorithms.judges import reward_model_starter
from nemo_rl.algorithms.samples import (
    SAMPLES,
    SUMMARY,
    Sample,
    append_samples,
    check_scores,
    metric_title,
    render_block,
    render_estimate,
    samples_of,
    scores_by_prompt,
    write_parquet,
)
from nemo_rl.algorithms.start import check_devices
from nemo_rl.atomic import write_text_atomically
from nemo_rl.config.load import LoadedConfig, dump_config
from nemo_rl.config.schema.cluster import ClusterConfig
from nemo_rl.config.schema.evaluation import EvalConfig, EvalGenerationConfig
from nemo_rl.data.datasets.benchmarks import benchmark_prompt, build_benchmark
from nemo_rl.data.processors import TaskProcessor, read_prompt_format
from nemo_rl.data.types import SamplingParams, Task
from nemo_rl.distributed.cache import cache_dir
from nemo_rl.distributed.executor import make_executor
from nemo_rl.environments.registry import build_environments
from nemo_rl.errors import ConfigError, DataError, RolloutError
from nemo_rl.interfaces import Environment, Resources, WorkerHandle
from nemo_rl.models.load import end_tokens, load_tokenizer, quiet_libraries, resolve_model
from nemo_rl.objectives.estimates import Estimate, mean_estimate
from nemo_rl.observe.console import Console
from nemo_rl.observe.console import Sample as ShownSample
from nemo_rl.observe.summary import PhaseTimer, phase_line
from nemo_rl.rollouts.collect import Collected, collect
from nemo_rl.workers.generation import GenerationWorker
from nemo_rl.workers.handles import ColocatedGenerator

_BATCHES_PER_CALL = 8
"""Batches of answers between two looks at what has come of it; the last ones of a call leave the batch partly empty."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came of an evaluation.

    Attributes:
        estimate: the metric, with its standard error over the problems.
        samples: every judged answer.
        num_dropped: problems whose answers could not be judged, and are in no figure.
        block: the outcome as text.
    """

    estimate: Estimate
    samples: list[Sample]
    num_dropped: int
    block: str


@dataclass(frozen=True, slots=True)
class Problems:
    """The problems of an evaluation, ready for the sampler, and how many were left out because they are too long."""

    tasks: tuple[Task, ...]
    num_too_long: int


def launch_eval(loaded: LoadedConfig[EvalConfig]) -> Evaluation:
    """Sample and judge answers to every problem.

    Answers are written to `eval.save_path` as they come, so that an interrupted evaluation keeps those it has.

    Raises:
        NemoRLError: something the user can correct, or no answer could be judged.
    """
    config = loaded.config
    cluster = _usable_cluster(config)
    folder = _open_folder(config)
    quiet_libraries()
    timer = PhaseTimer()
    with ExitStack() as stack:
        with timer.phase("load"):
            source = resolve_model(config.generation.model_name, cache_dir())
            name = config.tokenizer.name
            tokenizer_source = source if name is None else resolve_model(name, cache_dir(), part="tokenizer")
            tokenizer = load_tokenizer(tokenizer_source, config.tokenizer.chat_template)
            problems = load_problems(config, tokenizer)
            judge = {config.judge: config.environments[config.judge]}
            environments = build_environments(judge, reward_model_starter(cluster, stack))
            runner = stack.enter_context(asyncio.Runner())
            stack.callback(lambda: runner.run(environments[config.judge].close()))
            worker = _start_worker(config.generation, cluster, stack, source, tokenizer_source)
        sampling = sampling_params(config, end_tokens(source, tokenizer))
        samples: list[Sample] = []
        num_dropped = 0
        calls = _calls(config, problems.tasks)
        with Console(total_steps=len(calls)) as console:
            if cluster != config.cluster:
                console.note(_cut_to(cluster, config.cluster))
            console.begin_steps()
            for step, part in enumerate(calls, start=1):
                with timer.phase("answer"), console.phase("answer"):
                    collected = runner.run(_answers(config, part, environments, tokenizer, worker, sampling))
                new = [sample for group in collected.groups for sample in samples_of(group)]
                if folder is not None:
                    append_samples(folder / SAMPLES, new)
                check_scores(config.eval.metric, new, kept=None if folder is None else folder / SAMPLES)
                samples += new
                num_dropped += len(collected.dropped)
                _show(console, step, samples, new, timer)
                if collected.dropped:
                    console.note(f"{len(collected.dropped)} problems not judged: {collected.dropped[0].message}")
    return _finish(config, folder, samples, num_dropped, problems, timer)


def load_problems(config: EvalConfig, tokenizer: PreTrainedTokenizerBase) -> Problems:
    """Build the problems and apply the chat template.

    Raises:
        DataError: the data are missing or malformed, or a prompt is too long.
    """
    data, length = config.data, config.generation.vllm_cfg.max_model_len
    longest = min(data.max_input_seq_length or length, length - 1)  # at least one token of an answer
    default = benchmark_prompt(data)
    prompt_format = read_prompt_format(data.prompt, data.prompt_file, data.system_prompt_file, default=default)
    processor = TaskProcessor(tokenizer, prompt_format, longest, data.too_long)
    dataset = build_benchmark(data, environment=config.judge, seed=config.eval.seed)
    num_problems = min(len(dataset), data.num_samples or len(dataset))
    ready = [processor(dataset[index]) for index in range(num_problems)]
    tasks = tuple(task for task in ready if task is not None)
    if not tasks:
        raise DataError(
            "all prompts are too long; raise generation.vllm_cfg.max_model_len (or data.max_input_seq_length)"
        )
    return Problems(tasks, num_problems - len(tasks))


def sampling_params(config: EvalConfig, end_tokens: Sequence[int]) -> SamplingParams:
    """Everything about sampling, explicitly; the worker cuts the budget to what a prompt leaves."""
    generation = config.generation
    return SamplingParams(
        max_new_tokens=generation.max_new_tokens or generation.vllm_cfg.max_model_len,
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=max(generation.top_k or 0, 0),
        min_p=generation.min_p,
        stop_token_ids=(*end_tokens, *(generation.stop_token_ids or ())),
        stop_strings=tuple(generation.stop_strings or ()),
    )


def _calls(config: EvalConfig, tasks: Sequence[Task]) -> list[tuple[Task, ...]]:
    """Problems that are answered in one call of the sampler."""
    answers = _BATCHES_PER_CALL * config.generation.max_batch_size
    return list(batched(tasks, max(1, answers // config.eval.num_tests_per_prompt)))


async def _answers(
    config: EvalConfig,
    tasks: Sequence[Task],
    environments: dict[str, Environment],
    tokenizer: PreTrainedTokenizerBase,
    worker: WorkerHandle,
    sampling: SamplingParams,
) -> Collected:
    return await collect(
        tasks,
        group_size=config.eval.num_tests_per_prompt,
        generator=ColocatedGenerator(worker),
        environments=environments,
        decode=lambda token_ids: cast(str, tokenizer.decode(token_ids, skip_special_tokens=True)),
        sampling=sampling,
        seed=config.eval.seed,
    )


def _start_worker(
    generation: EvalGenerationConfig, cluster: ClusterConfig, stack: ExitStack, source: str, tokenizer: str
) -> WorkerHandle:
    executor = stack.enter_context(
        make_executor(cluster.executor, startup_timeout_seconds=cluster.startup_timeout_seconds)
    )
    threads = generation.num_threads or torch.get_num_threads()  # Ray would allow one
    return executor.start(
        GenerationWorker,
        source,
        tokenizer=tokenizer,
        max_model_len=generation.vllm_cfg.max_model_len,
        max_batch_size=generation.max_batch_size,
        precision=generation.vllm_cfg.precision,
        device=generation.device,
        num_threads=threads,
        resources=Resources(num_cpus=float(generation.num_threads or 1), num_gpus=float(cluster.gpus_per_node > 0)),
    )


def _cut_to(used: ClusterConfig, asked: ClusterConfig) -> str:
    """Say that the sampler leaves devices alone, or lacks one."""
    wanted = f"cluster.num_nodes = {asked.num_nodes} and cluster.gpus_per_node = {asked.gpus_per_node}"
    lacking = ", the CPU, as torch finds no GPU here" if used.gpus_per_node < min(asked.gpus_per_node, 1) else ""
    return f"{wanted}, and generation.backend = hf samples in one process on one device{lacking}"


def _show(console: Console, step: int, samples: Sequence[Sample], new: Sequence[Sample], timer: PhaseTimer) -> None:
    """One line about what has been judged so far, and now and then an answer."""
    if not samples:
        return
    shown = new[0] if new else None
    tokens = sum(sample.num_tokens for sample in samples)
    console.step(
        step,
        figures={"score": sum(sample.score for sample in samples) / len(samples)},
        tokens_per_second=tokens / max(timer.seconds["answer"], 1e-9),
        sample=shown and ShownSample(shown.problem, shown.reply, shown.ground_truth, shown.score),
    )


def _finish(
    config: EvalConfig,
    folder: Path | None,
    samples: list[Sample],
    num_dropped: int,
    problems: Problems,
    timer: PhaseTimer,
) -> Evaluation:
    """Estimate the metric, write what is kept and say it.

    Raises:
        RolloutError: no answer could be judged.
    """
    if not samples:
        raise RolloutError(
            f"none of the {len(problems.tasks)} problems could be judged; look at the environment {config.judge}"
        )
    measure = config.eval
    scores = scores_by_prompt(measure.metric, measure.k_value, samples)
    estimate = mean_estimate(torch.tensor(list(scores.values()), dtype=torch.float64))
    title = metric_title(measure.metric, measure.k_value, measure.num_tests_per_prompt)
    tokens = sum(sample.num_tokens for sample in samples) / len(samples)
    truncated = sum(sample.stop_reason == "length" for sample in samples) / len(samples)
    rows = {
        title: render_estimate(estimate),
        "answers": f"{measure.num_tests_per_prompt} a problem at temperature {config.generation.temperature:g}, "
        f"{tokens:.0f} tokens on average, {truncated:.1%} cut off by the limit",
        "time": phase_line(timer.seconds, timer.total),
        "samples": "not kept (eval.save_path is null)" if folder is None else str(folder / SAMPLES),
    }
    if num_dropped:
        rows["not judged"] = f"{num_dropped} of {len(problems.tasks)} problems, which are in no figure"
    if problems.num_too_long:
        rows["too long"] = f"{problems.num_too_long} problems, left out"
    if folder is not None:
        write_parquet(folder / "samples.parquet", samples)
        record = {
            "metric": measure.metric,
            "k_value": measure.k_value,
            "num_tests_per_prompt": measure.num_tests_per_prompt,
            "value": estimate.value,
            "standard_error": None if estimate.num_prompts < 2 else estimate.standard_error,
            "num_prompts": estimate.num_prompts,
            "num_dropped": num_dropped,
            "num_too_long": problems.num_too_long,
            "mean_tokens": tokens,
            "share_truncated": truncated,
            "model_name": config.generation.model_name,
            "dataset_name": config.data.dataset_name,
            "seconds_total": timer.total,
        }
        write_text_atomically(folder / SUMMARY, json.dumps(record, indent=2) + "\n")
    block = render_block(f"{config.generation.model_name} on {config.data.dataset_name}", rows)
    return Evaluation(estimate, samples, num_dropped, block)


def _open_folder(config: EvalConfig) -> Path | None:
    """Make room for the samples; those of an earlier evaluation in the same folder go.

    Raises:
        ConfigError: the folder cannot be written.
    """
    if config.eval.save_path is None:
        return None
    folder = Path(config.eval.save_path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (SUMMARY, SAMPLES, "samples.parquet"):
            (folder / name).unlink(missing_ok=True)
        write_text_atomically(folder / "config.yaml", dump_config(config))
    except OSError as error:
        raise ConfigError(f"cannot write {folder} ({error}); set eval.save_path to another folder") from error
    return folder


def _usable_cluster(config: EvalConfig) -> ClusterConfig:
    """What the engine uses of the cluster: `hf` samples in one process, on a GPU if one is asked for and there.

    With Ray, the cluster says which devices it has.

    Raises:
        ConfigError: there is no such engine, or the device that is asked for is not there.
    """
    generation, cluster = config.generation, config.cluster
    if generation.backend != "hf":
        raise ConfigError(
            f"generation.backend is {generation.backend}, which this version plans (--dry-run) but does not run; set "
            "it to hf"
        )
    there = cluster.executor != "local" or torch.cuda.is_available()
    usable = cluster.model_copy(update={"num_nodes": 1, "gpus_per_node": min(cluster.gpus_per_node, int(there))})
    check_devices(usable, generation.device, section="generation")
    return usable
