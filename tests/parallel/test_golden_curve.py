"""The same mesh with the same seed gives the same bits twice, and the losses that are kept in the repository.

`golden_losses.json` holds the losses of ten AdamW steps of GRPO over FSDP2 x TP + SP in float32. A change that moves
them is a change of what users train: look for its reason before writing the file anew with `python
tests/parallel/test_golden_curve.py`.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from nemo_rl.distributed.mesh import Mesh, ParallelSizes
from nemo_rl.metrics import Metrics, merge, scalars
from nemo_rl.training.pytorch.backend import PyTorchBackend
from ranks import run_ranks
from tiny_batches import rollout_batch
from tiny_mesh import OBJECTIVES, own_part, policy_config, size_keys, tokenizer
from tiny_models import tiny_model

GOLDEN = Path(__file__).parent / "golden_losses.json"
SIZES = ParallelSizes(shard=2, tensor=2)


def steps(rank: int, folder: Path) -> tuple[list[Metrics], dict[str, torch.Tensor]]:
    del rank
    config = policy_config(
        folder,
        train_mb_tokens=64,
        optimizer={"name": "torch.optim.AdamW", "kwargs": {"lr": 3e-3}},
        generation={"backend": "hf", "max_new_tokens": 8, "temperature": 0.8},
        dtensor_cfg={**size_keys(SIZES), "sequence_parallel": True},
    )
    mesh = Mesh(SIZES, torch.device("cpu"))
    backend = PyTorchBackend(config, str(folder), tokenizer(), mesh=mesh)
    batch = own_part(rollout_batch(tiny_model("llama"), temperature=0.8), mesh)
    metrics = [backend.train(batch, OBJECTIVES["grpo"]) for _ in range(10)]
    return metrics, dict(backend.named_weights())


def curve(ranks: list[tuple[list[Metrics], dict[str, torch.Tensor]]]) -> list[float]:
    speaking = [metrics for rank, (metrics, _) in enumerate(ranks) if SIZES.speaks(rank)]
    return [scalars(merge(step))["loss"] for step in zip(*speaking, strict=True)]


def test_two_runs_are_bitwise_equal_and_follow_the_golden_curve(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    first, second = (run_ranks(steps, SIZES.world_size, tmp_path) for _ in range(2))
    assert curve(first) == curve(second)
    for one, other in zip(first, second, strict=True):
        for name, weight in one[1].items():
            assert torch.equal(weight, other[1][name]), name
    assert curve(first) == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-4)


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        tiny_model("llama").save_pretrained(temporary)
        GOLDEN.write_text(json.dumps(curve(run_ranks(steps, SIZES.world_size, Path(temporary))), indent=2) + "\n")
