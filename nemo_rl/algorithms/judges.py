"""Models that judge: how a run starts the workers of its reward models."""

from contextlib import ExitStack

import torch

from nemo_rl.algorithms.start import check_devices
from nemo_rl.config.schema.cluster import ClusterConfig
from nemo_rl.config.schema.environments import RewardModelEnvironmentConfig
from nemo_rl.distributed.cache import cache_dir
from nemo_rl.distributed.executor import make_executor
from nemo_rl.environments.registry import StartRewardModel
from nemo_rl.errors import ConfigError
from nemo_rl.interfaces import Resources, WorkerHandle
from nemo_rl.models.load import resolve_model
from nemo_rl.workers.reward_model import RewardModelWorker


def reward_model_starter(cluster: ClusterConfig, stack: ExitStack) -> StartRewardModel:
    """Make what starts the worker of a reward-model environment, to live as long as the stack at most."""

    def start(name: str, spec: RewardModelEnvironmentConfig) -> WorkerHandle:
        _check_device(name, spec, cluster)
        source = resolve_model(spec.model_name, cache_dir())
        tokenizer = spec.tokenizer.name
        executor = stack.enter_context(
            make_executor(cluster.executor, startup_timeout_seconds=cluster.startup_timeout_seconds)
        )
        return executor.start(
            RewardModelWorker,
            source,
            tokenizer=source if tokenizer is None else resolve_model(tokenizer, cache_dir(), part="tokenizer"),
            chat_template=spec.tokenizer.chat_template,
            max_model_len=spec.max_model_len,
            max_batch_tokens=spec.max_batch_tokens,
            precision=spec.precision,
            device=spec.device,
            num_threads=spec.num_threads or torch.get_num_threads(),  # Ray would allow one
            resources=Resources(num_cpus=float(spec.num_threads or 1), num_gpus=spec.num_gpus),
        )

    return start


def _check_device(name: str, spec: RewardModelEnvironmentConfig, cluster: ClusterConfig) -> None:
    check_devices(cluster, spec.device, section=f"env.{name}")
    if spec.device == "cuda" and cluster.executor == "ray" and spec.num_gpus == 0:
        raise ConfigError(
            f"env.{name}.device is cuda and env.{name}.num_gpus = 0 asks Ray for none; set the second to 1, or to the "
            "share of a GPU that the model needs"
        )
