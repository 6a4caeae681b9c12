"""A worker that scores by arithmetic, so that a test can tell which rank was given what."""

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.types import Completion, GenerationRequest
from nemo_rl.distributed.mesh import RankPlace
from nemo_rl.errors import BackendError
from nemo_rl.metrics import Histogram, Max, Mean, Metrics, Sum


class PlainRank:
    """Meets the others while it is built, as the rank of a model does."""

    def __init__(self, place: RankPlace, offset: float) -> None:
        self._mesh, self._offset = place.join("cpu"), offset

    def train(self, batch: TokenBatch, objective: str) -> Metrics:
        assert objective == "an objective"
        total = torch.tensor(float(batch.num_tokens))
        dist.all_reduce(total, group=self._mesh.sequences["data"].get_group())
        return {
            "tokens": Sum(batch.num_tokens),
            "grad_norm": Mean(total.item()),
            "sequences": Histogram((float(batch.num_sequences),)),
            "first_token": Mean(float(batch.token_ids.sum()), batch.num_tokens),
            "largest": Max(batch.num_tokens),
        }

    def logprobs(self, batch: TokenBatch) -> Tensor:
        return batch.token_ids.float() + self._offset

    def topk_logprobs(self, batch: TokenBatch, k: int) -> tuple[Tensor, Tensor]:
        ids = batch.token_ids[:, None].repeat(1, k).int()
        return ids.float() * 0.5, ids

    def last_hidden(self, batch: TokenBatch) -> Tensor:
        """What it does not know the width of where no token carries loss."""
        width = 3 if batch.token_columns["loss_mask"].any() else 0
        return batch.token_ids[:, None].repeat(1, width).to(torch.bfloat16)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        rank = torch.tensor([float(self._mesh.rank)])
        return [Completion(request.prompt_ids, rank, "stop", request.seed) for request in requests]

    def generation_metrics(self) -> Metrics:
        return {"generation/sampled_tokens": Sum(self._mesh.rank + 1)}

    def peak_memory_bytes(self) -> int:
        return 100 * (self._mesh.rank + 1)

    def take_peak_memory(self) -> int:
        return 10 * (self._mesh.rank + 1)

    def describe(self) -> Mapping[str, Any]:
        return {"rank": self._mesh.rank, "most": self._mesh.most(self._mesh.rank)}

    def save(self, folder: Path, *, in_background: bool = False) -> None:
        (folder / str(self._mesh.rank)).touch()

    def finish_save(self, *, wait: bool = True) -> bool:
        return wait or self._mesh.rank == 0

    def threads(self) -> tuple[str | None, int]:
        return os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()

    def fail(self, rank: int, seconds: float) -> None:
        """One rank raises, the other takes its time."""
        if self._mesh.rank == rank:
            raise BackendError("the gradient norm is nan")
        time.sleep(seconds)

    def die(self, rank: int) -> int:
        """One rank is killed while the other waits for it."""
        if self._mesh.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._mesh.most(0)
