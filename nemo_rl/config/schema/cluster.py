"""Section `cluster`: where the workers run."""

from typing import Literal

from nemo_rl.config.schema.base import NonNegativeInt, PositiveFloat, PositiveInt, Section


class ClusterConfig(Section):
    """Where the workers run and what they may use."""

    executor: Literal["local", "ray"] = "local"
    """`local` runs everything in this process, `ray` starts one actor per worker."""

    gpus_per_node: NonNegativeInt = 0
    """GPUs asked for on every node; 0 is a run without GPUs."""

    num_nodes: PositiveInt = 1
    """Nodes of the cluster."""

    startup_timeout_seconds: PositiveFloat = 120.0
    """How long to wait until all workers stand, in seconds."""
