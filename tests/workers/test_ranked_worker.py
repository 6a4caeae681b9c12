"""The ranks of a model answer like one worker: what is dealt comes back joined, and a failure names its rank."""

import asyncio
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from plain_ranks import PlainRank  # pyright: ignore[reportImplicitRelativeImport]

from nemo_rl.algorithms.ranks import start_ranks
from nemo_rl.data.assignment import assign
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.cost import ComputeCost
from nemo_rl.data.types import GenerationRequest, SamplingParams
from nemo_rl.distributed.local import LocalExecutor
from nemo_rl.distributed.mesh import ParallelSizes
from nemo_rl.errors import BackendError, WorkerDiedError, WorkerError
from nemo_rl.interfaces import Resources
from nemo_rl.metrics import scalars
from nemo_rl.workers.generation import GenerationWorker
from nemo_rl.workers.handles import ColocatedGenerator, Policy
from nemo_rl.workers.ranked import RankedWorker

SAMPLING = SamplingParams(max_new_tokens=6, temperature=0.9)


@contextmanager
def ranks(sizes: ParallelSizes) -> Generator[RankedWorker]:
    with ExitStack() as stack:
        executor = stack.enter_context(LocalExecutor())
        deal = partial(assign, cost=ComputeCost())
        yield start_ranks(executor, stack, PlainRank, {"offset": 0.5}, sizes=sizes, deal=deal, resources=Resources())


@pytest.fixture(scope="module")
def shards() -> Generator[RankedWorker]:
    with ranks(ParallelSizes(shard=2)) as worker:
        yield worker


def batch_of(*groups: list[int]) -> TokenBatch:
    """Groups of sequences of these lengths; the tokens are numbered, and the last sequence has no loss."""
    lengths = torch.tensor([length for group in groups for length in group])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    tokens = torch.arange(int(lengths.sum()))
    group_ids = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group) for group in groups]))
    loss_mask = tokens < cu_seqlens[-2]
    loss_mask[cu_seqlens[:-1]] = False  # nothing predicts a first token
    return TokenBatch(tokens, cu_seqlens, group_ids, {"loss_mask": loss_mask})


def test_scores_come_back_in_the_order_of_the_batch(shards: RankedWorker) -> None:
    batch = batch_of([3, 2], [4], [1], [5, 5, 2])
    tokens = batch.token_ids.float()
    policy = Policy(shards)
    assert torch.equal(policy.logprobs(batch), tokens + 0.5)
    scores, ids = shards.call("topk_logprobs", batch, 2).result(60)
    assert torch.equal(scores, torch.stack([tokens, tokens], 1) * 0.5)
    assert ids.dtype == torch.int32 and torch.equal(ids[:, 1], batch.token_ids.int())
    for one_group in (batch, batch_of([4, 2])):  # the second sequence, alone on its rank, has no loss
        hidden = shards.call("last_hidden", one_group).result(60)
        assert hidden.dtype == torch.bfloat16 and hidden.shape == (one_group.num_tokens, 3)
        lost = one_group.num_sequences == 2
        expected = one_group.token_ids * (one_group.sequence_ids() == 0 if lost else 1)
        assert torch.equal(hidden[:, 2], expected.to(torch.bfloat16))


def test_training_deals_whole_groups_and_means_stay_means(shards: RankedWorker) -> None:
    batch = batch_of([3, 2], [4], [3], [5, 5, 2])
    metrics = Policy(shards).train(batch, "an objective")
    assert sorted(metrics["sequences"].values) == [3, 4]
    assert scalars(metrics) == {
        "tokens": 24,
        "grad_norm": 24,  # known to both
        "sequences": 3.5,
        "first_token": 11.5,
        "largest": 12,
    }
    alone = Policy(shards).train(batch_of([3, 2, 2]), "an objective")  # the other rank takes part without a sequence
    assert sorted(alone["sequences"].values) == [0, 3]
    assert scalars(alone)["grad_norm"] == 7


def test_requests_are_dealt_to_all_ranks_and_answered_in_order(shards: RankedWorker) -> None:
    requests = [GenerationRequest(torch.arange(3), SAMPLING, seed) for seed in range(5)]
    generator = ColocatedGenerator(shards)
    answers = asyncio.run(generator.generate(requests))
    assert [answer.policy_version for answer in answers] == [0, 1, 2, 3, 4]
    assert [int(answer.logprobs) for answer in answers] == [0, 0, 1, 1, 1]
    assert asyncio.run(generator.generate([])) == []
    assert len(asyncio.run(generator.generate(requests[:1]))) == 1
    assert scalars(generator.metrics()) == {"generation/sampled_tokens": 3}


def test_all_ranks_do_what_is_not_dealt(shards: RankedWorker, tmp_path: Path) -> None:
    policy = Policy(shards)
    assert policy.peak_memory_bytes() == 200
    assert policy.describe() == {"rank": 0, "most": 1}  # which all of them had to be asked
    policy.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    threads = max(1, torch.get_num_threads() // 2)
    assert shards.call("threads").result(60) == (str(threads), threads)


def test_one_rank_speaks_for_those_that_share_its_data() -> None:
    batch = batch_of([3, 2], [4])
    with ranks(ParallelSizes(tensor=2)) as worker:
        metrics = Policy(worker).train(batch, "an objective")
        assert scalars(metrics)["tokens"] == 9  # not twice
        assert metrics["sequences"].values == (3,)
        assert torch.equal(Policy(worker).logprobs(batch), batch.token_ids + 0.5)
        with pytest.raises(BackendError, match="the gradient norm is nan") as caught:
            worker.call("fail", 1, 0.5).result(60)
        assert "rank 1 of 2" in caught.value.__notes__
        assert Policy(worker).describe()["most"] == 1  # after a moment both are there again
        worker._patience = 0.5
        with pytest.raises(BackendError):
            worker.call("fail", 0, 60.0).result(60)
        with pytest.raises(WorkerError, match=r"a rank of PlainRank has failed, and 0\.5 s later others still waited"):
            worker.call("describe")
        with pytest.raises(WorkerError, match="was stopped"):
            worker.call("describe")


def test_the_death_of_a_rank_is_told_and_not_that_others_miss_it() -> None:
    with ranks(ParallelSizes(shard=2)) as worker:
        begun = time.monotonic()
        with pytest.raises(WorkerDiedError, match=r"PlainRank\[1\] died during `die`: .* ended by SIGKILL"):
            worker.call("die", 1).result(60)
        assert time.monotonic() - begun < 10
        with pytest.raises(WorkerError):
            Policy(worker).describe()


def test_what_is_sampled_does_not_depend_on_the_number_of_ranks(tiny_llama: Path) -> None:
    arguments = {
        "source": str(tiny_llama),
        "tokenizer": str(tiny_llama),
        "max_model_len": 32,
        "max_batch_size": 64,
        "precision": "float32",
        "num_threads": 1,
    }
    requests = [
        GenerationRequest(torch.arange(3, 9 + group), SAMPLING, 10 * group + seed)
        for group in range(3)
        for seed in range(3)
    ]
    with LocalExecutor() as executor:
        one = executor.start(GenerationWorker, **arguments)
        several = RankedWorker(executor.start_group(GenerationWorker, [arguments] * 2), ParallelSizes(shard=2))
        answers = [asyncio.run(ColocatedGenerator(worker).generate(requests)) for worker in (one, several)]
    tokens, logprobs = (
        [[getattr(a, name).tolist() for a in part] for part in answers] for name in ("token_ids", "logprobs")
    )
    assert tokens[0] == tokens[1]
    assert len({tuple(answer) for answer in tokens[0]}) > 3
    for left, right in zip(*logprobs, strict=True):
        assert left == pytest.approx(right, abs=1e-5)
