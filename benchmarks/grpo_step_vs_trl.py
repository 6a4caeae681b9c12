"""Compare a whole GRPO step (sample, score, train) with TRL's `GRPOTrainer`.

Both sides run in this process and take turns: TRL trains, and after each of its optimizer steps a callback runs one of
ours on the same problems. How the two were made equal:

- SmolLM2-135M-Instruct, the same chat-templated prompts in the same order (about 40 tokens), 8 prompts x 8 answers of
  at most 16 tokens, temperature 1, no top-p or top-k, the same end token and the same reward (the last number).
- One AdamW step a batch: learning rate 1e-5 and constant, no weight decay, the fused implementation, gradient norm
  clipped to 1. No KL term, hence no reference model; clipping at 0.2; the loss is a mean over tokens.
- Both compute all rollouts: ours does not leave out groups whose rewards are all equal, as it does by default
  (`--skip-uniform-groups` lets it).
- Precision `bfloat16_autocast`: float32 weights, arithmetic in bfloat16, on both sides; TRL's default. `bfloat16`:
  bfloat16 weights on both sides; ours (its default) steps float32 master copies, while TRL steps the bfloat16 weights
  themselves, which is cheaper and loses most of every update. `as shipped` is TRL's default against ours.
- TRL generates with Transformers, without gradient checkpointing (its default, about 20% slower), without logging, and
  trains on `--trl-rows` rows at a time (64: all; fewer take less memory).

Costs are CPU milliseconds for each sampled token. Peak memory is that of a process that runs one side alone.

    uv run --group bench benchmarks/grpo_step_vs_trl.py [--precision bfloat16_autocast bfloat16] [--out FILE]
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, cast

import torch
from datasets import Dataset
from measure import (
    Comparison,
    cpu_seconds,
    parse_arguments,
    peak_memory_of,
    print_header,
    print_machine,
    write_results,
)
from transformers import PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from nemo_rl.algorithms.grpo import grpo_objective
from nemo_rl.algorithms.launch import sampling_params
from nemo_rl.algorithms.policy_batch import minibatches, policy_batch, with_advantages
from nemo_rl.algorithms.problems import load_problems
from nemo_rl.algorithms.sampling import RolloutSource
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.data.types import Task
from nemo_rl.distributed.cache import cache_dir
from nemo_rl.distributed.executor import make_executor
from nemo_rl.environments.answers import last_number
from nemo_rl.environments.registry import build_environments
from nemo_rl.models.load import end_tokens, load_tokenizer, resolve_model
from nemo_rl.workers.handles import ColocatedGenerator, Policy
from nemo_rl.workers.policy import PolicyWorker

TARGET = 4.0
WARM_UP = 1
GIBIBYTE = 2**30


@dataclass(frozen=True, slots=True)
class Cost:
    """What one step took: CPU and wall seconds, sampled tokens."""

    cpu: float
    wall: float
    tokens: int

    @property
    def per_token(self) -> float:
        """CPU milliseconds for each sampled token."""
        return 1000 * self.cpu / self.tokens


@dataclass(slots=True)
class Stopwatch:
    """Collects the cost of the steps of one side; the first ones warm up and do not count."""

    costs: list[Cost] = field(default_factory=list)
    _cpu: float = 0.0
    _wall: float = 0.0
    _steps: int = 0

    def start(self) -> None:
        self._cpu, self._wall = cpu_seconds(), time.perf_counter()

    def stop(self, tokens: int) -> None:
        cost = Cost(cpu_seconds() - self._cpu, time.perf_counter() - self._wall, tokens)
        self._steps += 1
        if self._steps > WARM_UP:
            self.costs.append(cost)


def make_config(precision: str, options: argparse.Namespace) -> GRPOConfig:
    """The default recipe in one precision, small if `--quick`."""
    overrides = [
        f"policy.precision={precision}",
        f"grpo.skip_uniform_groups={str(options.skip_uniform_groups).lower()}",
        "grpo.report_base_model=false",
        "grpo.num_prompts_per_step=8",
        "policy.optimizer.kwargs.lr=1.0e-5",
        "policy.scheduler=[]",
    ]
    if options.quick:
        overrides += ["grpo.num_prompts_per_step=2", "grpo.num_generations_per_prompt=2"]
        overrides += ["policy.generation.max_new_tokens=4"]
    return load_config(None, overrides, GRPOConfig).config


def make_tasks(config: GRPOConfig, steps: int) -> list[list[Task]]:
    """The problems of all steps."""
    source = resolve_model(config.policy.model_name, cache_dir())
    loader = load_problems(config, load_tokenizer(source)).loader
    return [next(loader) for _ in range(steps)]


class OurTrainer:
    """The body of `train_grpo`, one step at a time."""

    def __init__(self, config: GRPOConfig, batches: Sequence[Sequence[Task]], stack: ExitStack) -> None:
        """Start everything that a run starts, on the processes and threads that it would have."""
        source = resolve_model(config.policy.model_name, cache_dir())
        tokenizer = load_tokenizer(source)
        executor = stack.enter_context(make_executor("local"))
        worker = executor.start(PolicyWorker, config.policy, source)
        self._config = config
        self._batches = batches
        self._policy = Policy(worker)
        self._step = 0
        self._objective = grpo_objective(config)
        self._source = RolloutSource(
            generator=ColocatedGenerator(worker),
            environments=build_environments(config.env),
            decode=lambda token_ids: cast(str, tokenizer.decode(token_ids, skip_special_tokens=True)),
            sampling=sampling_params(config, end_tokens(source, tokenizer)),
            group_size=config.grpo.num_generations_per_prompt,
            seed=config.grpo.seed,
            max_failed_share=0.0,
            deadline_seconds=None,
            validation=(),
            runner=stack.enter_context(asyncio.Runner()),
        )

    def step(self) -> int:
        """Train once and return the number of tokens sampled."""
        collected = self._source.groups(self._batches[self._step], self._step + 1)
        longest = self._source.sampling.max_new_tokens
        batch, _ = policy_batch(self._config.grpo, collected.groups, max_new_tokens=longest, version=self._step)
        batch, _ = with_advantages(self._config, batch)
        self._step += 1
        for part in minibatches(self._config, batch):
            self._policy.train(part, self._objective)
        self._policy.publish(self._step)
        return int(collected.metrics["tokens_sampled"].value)


class Turns(TrainerCallback):
    """Measures TRL's steps and runs one of ours after each.

    Attributes:
        theirs: TRL's steps, everything between two callbacks.
        ours: ours.
    """

    def __init__(self, our_step: Callable[[], int] | None) -> None:
        """Take turns with `our_step`; None lets TRL run alone."""
        self.theirs = Stopwatch()
        self.ours = Stopwatch()
        self._our_step = our_step
        self._tokens = 0

    def reward(self, completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        """TRL's reward function, which also counts the sampled tokens."""
        self._tokens += sum(len(ids) for ids in completion_ids)
        texts: list[str] = [messages[-1]["content"] for messages in completions]
        return [
            float(last_number(text) == Fraction(answer))
            for text, answer in zip(texts, columns["ground_truth"], strict=True)
        ]

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.theirs.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.theirs.stop(self._tokens)
        self._tokens = 0
        if self._our_step is not None:
            self.ours.start()
            self.ours.stop(self._our_step())
        self.theirs.start()


def train_trl(config: GRPOConfig, batches: Sequence[Sequence[Task]], turns: Turns, rows: int) -> None:
    """Train with TRL on the same problems, one optimizer step for each batch of them."""
    from trl import GRPOConfig as TRLConfig
    from trl import GRPOTrainer

    source = resolve_model(config.policy.model_name, cache_dir())
    pure = config.policy.precision == "bfloat16"
    problems = [
        {"prompt": list(task.messages), "ground_truth": task.extra["ground_truth"]}
        for batch in batches
        for task in batch
    ]
    rows = min(rows, config.num_rollouts_per_step)
    with tempfile.TemporaryDirectory() as folder:
        settings = TRLConfig(
            output_dir=folder,
            model_init_kwargs={"dtype": torch.bfloat16 if pure else torch.float32},
            bf16=not pure,
            use_cpu=True,
            max_steps=len(batches),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=config.num_rollouts_per_step // rows,
            gradient_checkpointing=False,
            num_generations=config.grpo.num_generations_per_prompt,
            max_completion_length=config.policy.generation.max_new_tokens,
            temperature=1.0,
            beta=0.0,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            shuffle_dataset=False,
            seed=config.grpo.seed,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = GRPOTrainer(
            model=source,
            reward_funcs=cast(Any, turns.reward),
            args=settings,
            train_dataset=Dataset.from_list(problems),
            processing_class=load_tokenizer(source),
            callbacks=[turns],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def run_sides(precision: str, options: argparse.Namespace, only: str | None = None) -> Turns:
    """Run both sides in turns, or one of them alone."""
    config = make_config(precision, options)
    batches = make_tasks(config, WARM_UP + options.repetitions)
    with ExitStack() as stack:
        our_step = None if only == "trl" else OurTrainer(config, batches, stack).step
        turns = Turns(our_step)
        if only != "ours":
            train_trl(config, batches, turns, options.trl_rows)
        elif our_step is not None:
            for _ in batches:
                turns.ours.start()
                turns.ours.stop(our_step())
    return turns


def peaks(precision: str, options: argparse.Namespace) -> dict[str, float]:
    """Peak resident GiB of each side alone."""
    command = [sys.executable, __file__, "--precision", precision, "--repetitions", "1"]
    command += ["--threads", str(options.threads), "--trl-rows", str(options.trl_rows)]
    command += ["--skip-uniform-groups"] * options.skip_uniform_groups
    return {f"GiB {side}": peak_memory_of([*command, "--only", side]) / GIBIBYTE for side in ("trl", "ours")}


def compare(precision: str, options: argparse.Namespace) -> Comparison:
    """Run both sides in turns, then each alone for its memory, and print the row."""
    turns = run_sides(precision, options)
    walls = {
        f"wall s {side}": statistics.median(cost.wall for cost in watch.costs)
        for side, watch in (("trl", turns.theirs), ("ours", turns.ours))
    }
    comparison = Comparison(
        name=precision,
        theirs=[cost.per_token for cost in turns.theirs.costs],
        ours=[cost.per_token for cost in turns.ours.costs],
        target=TARGET,
        extra=walls | ({} if options.quick else peaks(precision, options)),
    )
    comparison.print()
    return comparison


def main() -> None:
    """Compare all precisions and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ["bfloat16_autocast", "bfloat16"]
    parser.add_argument("--precision", nargs="+", choices=choices, default=choices)
    parser.add_argument("--trl-rows", type=int, default=64, help="rows of a TRL micro-batch (default: %(default)s)")
    parser.add_argument("--skip-uniform-groups", action="store_true", help="let ours leave out what cannot train")
    parser.add_argument("--only", choices=["ours", "trl"], help="run one side alone, to look at its memory or profile")
    options = parse_arguments(parser)
    disable_progress_bar()
    if options.only:
        for precision in options.precision:
            run_sides(precision, options, options.only)
        return
    print_machine()
    print_header("CPU milliseconds a sampled token", "TRL", "ours")
    comparisons = {precision: compare(precision, options) for precision in options.precision}
    if len(comparisons) == len(choices):
        theirs, ours = comparisons["bfloat16_autocast"].theirs, comparisons["bfloat16"].ours
        comparisons["as shipped"] = Comparison(name="as shipped", theirs=theirs, ours=ours)
        comparisons["as shipped"].print()
    write_results(options.out, list(comparisons.values()))


if __name__ == "__main__":
    main()
