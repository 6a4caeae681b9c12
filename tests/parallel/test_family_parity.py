"""Every family trains over tensor + sequence parallel and over context parallel ranks what it trains in one process."""

from pathlib import Path

import pytest

from nemo_rl.distributed.mesh import ParallelSizes
from ranks import run_ranks
from tiny_mesh import Job, compare, train, train_rank
from tiny_models import FAMILIES, tiny_model

JOB = Job("grpo", share_prefixes=True, max_tokens=1024)
WITHOUT_PLAN = {"gpt_oss"}
"""Transformers has no plan for their layers."""

TENSOR = ParallelSizes(tensor=2)
CONTEXT = ParallelSizes(context=2)


ALWAYS = ("qwen3", "gemma2", "phi", "mixtral", "deepseek_v3")
"""A norm of heads, soft caps, biases and one norm for two blocks, experts, attention without a plan."""


@pytest.mark.parametrize(
    "family", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.nightly) for name in FAMILIES]
)
def test_a_divided_model_of_any_family_is_the_whole_one(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    alone = train(JOB, tmp_path)
    wrong: list[str] = []
    for sizes, settings in ((TENSOR, {"sequence_parallel": True}), (CONTEXT, {})):
        if sizes is TENSOR and family in WITHOUT_PLAN:
            continue
        ranks = run_ranks(train_rank, 2, sizes, [JOB], tmp_path, settings)
        wrong += [f"{sizes}: {line}" for line in compare(JOB, sizes, [rank[0] for rank in ranks], alone)]
    assert not wrong, "\n".join(wrong[:20])
