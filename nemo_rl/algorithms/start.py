"""The beginning of every run: its folder and what shows its progress, its model, its worker, and where it left off."""

import logging
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from nemo_rl.algorithms.checkpoints import Checkpoints, TrainingInfo
from nemo_rl.algorithms.ending import end_of
from nemo_rl.algorithms.outcome import Outcome, earlier_outcome
from nemo_rl.algorithms.ranks import check_places, dealer, parallel_sizes, start_ranks
from nemo_rl.algorithms.run import Run
from nemo_rl.atomic import write_text_atomically
from nemo_rl.config.load import dump_config
from nemo_rl.config.schema.cluster import ClusterConfig
from nemo_rl.config.schema.policy import ModelConfig, TrainedPolicyConfig
from nemo_rl.config.schema.run import RunConfig
from nemo_rl.data.lengths import LengthCache
from nemo_rl.distributed.cache import cache_dir
from nemo_rl.distributed.executor import make_executor
from nemo_rl.errors import ConfigError
from nemo_rl.interfaces import Resources, WorkerHandle
from nemo_rl.models.load import load_tokenizer, quiet_libraries, resolve_model
from nemo_rl.observe.console import Console
from nemo_rl.observe.logger import RolloutWriter, RunLogger
from nemo_rl.observe.sinks import build_sinks
from nemo_rl.observe.summary import PhaseTimer
from nemo_rl.training.pytorch.backend import build_optimization


@dataclass(frozen=True, slots=True)
class Model[P: ModelConfig]:
    """What a worker loads: `source` (a folder or a hub name) and its section; and the tokenizer of both."""

    source: str
    policy: P
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Start:
    """A run whose folder is open, before anything heavy is loaded.

    Attributes:
        config: of the run.
        timer: counts from here.
        checkpoints: in the run's folder.
        console: shows the run.
        earlier: where the run ended, if an earlier start of it got to its end: nothing is left to do.
    """

    config: RunConfig
    timer: PhaseTimer
    checkpoints: Checkpoints
    console: Console
    earlier: Outcome | None

    @contextmanager
    def loading(self) -> Generator[ExitStack]:
        """Show the run and its log records, for as long as what it enters into the stack lives."""
        with ExitStack() as stack:
            stack.enter_context(self.console)
            stack.enter_context(_logging_through(self.console))
            yield stack

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Count and show the time of a phase."""
        with self.timer.phase(name), self.console.phase(name):
            yield

    @property
    def lengths(self) -> LengthCache:
        """Keeps token counts from one run to the next."""
        return LengthCache(cache_dir() / "token_lengths", self.console.track)

    def worker(
        self, stack: ExitStack, kind: Callable[..., Any], model: Model[Any], **arguments: object
    ) -> WorkerHandle:
        """Start a worker of a model, with the resources it needs and further arguments of its kind."""
        return start_worker(self.config, stack, kind, model, **arguments)

    def run(self, info: TrainingInfo) -> Run:
        """Open the records of the run, which goes on after `info`.

        Raises:
            ConfigError: the folder of the logs cannot be written.
        """
        logger = _open_logger(self.config, self.checkpoints, info.step)
        return Run(
            self.config,
            checkpoints=self.checkpoints,
            logger=logger,
            console=self.console,
            timer=self.timer,
            info=info,
        )


def start(config: RunConfig) -> Start:
    """Check that the run can be done here and open its folder.

    Raises:
        ConfigError: there is no optimizer or device for it.
        CheckpointError: the folder cannot be written, or holds a run that must not be continued.
    """
    check_can_run(config)
    timer = PhaseTimer()
    checkpoints = Checkpoints(config.checkpointing, dump_config(config))
    checkpoints.open_folder()
    latest = checkpoints.latest()
    console = Console(
        total_steps=config.loop.max_num_steps,
        first_step=latest.step,
        sample_period=config.logger.print_sample_period,
    )
    earlier = earlier_outcome(checkpoints.folder, latest.step)
    end = end_of(config.loop, latest)
    if earlier is not None and end is not None:
        console.note(
            f"{checkpoints.folder} holds this run, finished after step {latest.step}: {end}; raise "
            f"{config.algorithm}.max_num_steps (or max_num_epochs, or early_stopping.patience) to go on, or choose "
            "another checkpointing.checkpoint_dir to start afresh"
        )
    else:
        earlier = None
    return Start(config, timer, checkpoints, console, earlier)


def start_worker(
    config: RunConfig, stack: ExitStack, kind: Callable[..., Any], model: Model[Any], **arguments: object
) -> WorkerHandle:
    """Start a worker of a model; the models of a run take turns, so they share its cores and its GPUs.

    One that is trained is spread over the ranks of the cluster, any other has one process. Weights that are kept on the
    CPU while others are computed with are shards, be it of one rank.
    """
    cluster, share, policy = config.cluster, 1 / config.num_models, model.policy
    executor = stack.enter_context(
        make_executor(cluster.executor, startup_timeout_seconds=cluster.startup_timeout_seconds)
    )
    spread = policy if isinstance(policy, TrainedPolicyConfig) else None
    if spread is not None and cluster.num_ranks == 1 and not spread.dtensor_cfg.cpu_offload:
        spread = None
    if spread is not None:
        num_threads = max(1, (policy.num_threads or 1) // cluster.ranks_on_a_node)
        policy = spread = spread.model_copy(update={"num_threads": num_threads})
    num_cpus = max(share, int(share * (policy.num_threads or 1)))  # Ray counts above 1 in whole ones
    resources = Resources(num_cpus=float(num_cpus), num_gpus=share if cluster.gpus_per_node > 0 else 0.0)
    if spread is None:
        return executor.start(kind, policy, model.source, resources=resources, **arguments)
    return start_ranks(
        executor,
        stack,
        kind,
        {"config": spread, "source": model.source, **arguments},
        sizes=parallel_sizes(spread, cluster),
        deal=dealer(spread),
        resources=resources,
    )


def load_model[P: ModelConfig](policy: P) -> Model[P]:
    """Find the model and load its tokenizer.

    Raises:
        ConfigError: the model or its tokenizer is not there.
    """
    source = resolve_model(policy.model_name, cache_dir())
    policy = worker_policy(policy, source)
    return Model(source, policy, load_tokenizer(policy.tokenizer.name or source, policy.tokenizer.chat_template))


def worker_policy[P: ModelConfig](policy: P, source: str) -> P:
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


def check_can_run(config: RunConfig) -> None:
    """Refuse what there is no optimizer or device for.

    Raises:
        ConfigError: with what to set instead.
    """
    check_trainable(config.policy, config.cluster, section="policy")


def check_trainable(model: TrainedPolicyConfig, cluster: ClusterConfig, *, section: str) -> None:
    """Refuse a model, configured in `section`, that there is no optimizer or device for.

    Raises:
        ConfigError: with what to set instead.
    """
    build_optimization(model, [nn.Parameter(torch.zeros(1))])  # a wrong name or argument, before the model
    check_devices(cluster, model.device, section=section)
    check_places(model, cluster, section=section)


def check_devices(cluster: ClusterConfig, device: str, *, section: str) -> None:
    """Refuse devices that are not there; with Ray, the cluster says which it has.

    Args:
        cluster: the section of that name.
        device: that a model asks for.
        section: of the configuration, whose key `device` says so.

    Raises:
        ConfigError: with what to set instead.
    """
    if cluster.executor != "local" or torch.cuda.is_available():
        return
    if device == "cuda":
        raise ConfigError(f"{section}.device is cuda and torch finds no GPU here; set it to auto or cpu")
    if cluster.gpus_per_node > 0:
        raise ConfigError(f"cluster.gpus_per_node is {cluster.gpus_per_node} and torch finds no GPU here; set it to 0")


def _open_logger(config: RunConfig, checkpoints: Checkpoints, step: int) -> RunLogger:
    """Write the resolved configuration and open the records of a run, which goes on after `step`."""
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
