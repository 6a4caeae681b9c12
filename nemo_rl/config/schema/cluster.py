"""Section `cluster`: where the workers run."""

from typing import Literal

from nemo_rl.config.schema.base import NonNegativeInt, PositiveFloat, PositiveInt, Section


class ClusterConfig(Section):
    """Where the workers run and what they may use."""

    executor: Literal["local", "ray"] = "local"
    """`local` runs everything on this machine, in this process where a model has one rank, `ray` starts one actor per
    worker."""

    gpus_per_node: NonNegativeInt = 0
    """GPUs asked for on every node; 0 is a run without GPUs."""

    num_nodes: PositiveInt = 1
    """Nodes of the cluster."""

    ranks_per_node: PositiveInt | None = None
    """Processes that a model is spread over on every node; None is one for each GPU, or one without GPUs."""

    startup_timeout_seconds: PositiveFloat = 120.0
    """How long to wait until all workers stand, in seconds."""

    @property
    def num_ranks(self) -> int:
        """Processes that a model is spread over."""
        return self.num_nodes * self.ranks_on_a_node

    @property
    def ranks_on_a_node(self) -> int:
        """Those of them on each node."""
        return self.ranks_per_node or max(self.gpus_per_node, 1)
