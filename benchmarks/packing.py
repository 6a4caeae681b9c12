"""Compare the algorithms that fill micro-batches, and a packed training step with a padded one.

Lengths are log-normal with sigma 1, the budget is 4 times their mean.

The algorithms get the same sequences, without groups and in groups of 8, behind prompts of an eighth of an answer:

- `fill` is computed tokens per token of budget, where a sequence beyond the budget counts as a full micro-batch;
- `at least` is the number of micro-batches that no algorithm can go below; `twice` the share of tokens that are
  computed again because a group had to be cut;
- `CPU ms` is what cutting a batch costs, in which every group is laid out, and what packing alone costs, of its
  sequences one by one.

Then a step, forward and backward of the on-policy GRPO loss without an optimizer; gradients are compared before
anything is timed:

- padded: four rows to a micro-batch (the budget in rows of mean length) in the order of the batch, padded to the
  longest of the four, through plain Transformers with `sdpa` attention and a mask; the LM head reads what carries loss.
- packed: `train_step` on the same sequences, weights and loss.

    uv run --group bench benchmarks/packing.py [--out FILE]
"""

import argparse
import statistics
import time
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from measure import Comparison, parse_arguments, print_header, print_machine, take_turns, write_results
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.bins import PACKERS
from nemo_rl.data.cost import useful_tokens
from nemo_rl.data.micro_batches import cut
from nemo_rl.data.packing import build_stream
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.objectives.weights import loss_weights
from nemo_rl.training.step import Scorer, train_step

VOCABULARY = 512
ROWS = 4
TARGET = 2.0
GRADIENT_LIMIT = 1e-5


def make_batch(num_sequences: int, group_size: int, prompt: int, response: int, seed: int = 0) -> TokenBatch:
    """Groups of answers with random tokens and log-normal lengths of this mean, behind prompts of a set length."""
    generator = torch.Generator().manual_seed(seed)
    answers = torch.randn(num_sequences, generator=generator).sub(0.5).exp().mul(response).ceil().long()
    rows: list[Tensor] = []
    start = torch.empty(0, dtype=torch.int64)
    for i, answer in enumerate(answers.tolist()):
        if i % group_size == 0:
            start = torch.randint(VOCABULARY, (prompt,), generator=generator)
        rows.append(torch.cat([start, torch.randint(VOCABULARY, (answer,), generator=generator)]))
    mask = torch.cat([torch.arange(len(row)) >= prompt for row in rows])
    cu_seqlens = F.pad(torch.tensor([len(row) for row in rows]).cumsum(0), (1, 0))
    batch = TokenBatch(torch.cat(rows), cu_seqlens, torch.arange(num_sequences) // group_size, {"loss_mask": mask})
    return batch.with_columns(
        advantages=batch.per_token(torch.randn(num_sequences, generator=generator)),
        loss_weights=loss_weights(mask, cu_seqlens),
    )


def tiny_model() -> PreTrainedModel:
    """Four layers of width 128 with random weights, the same ones every time."""
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1 << 14,
    )
    return cast(PreTrainedModel, AutoModelForCausalLM.from_config(sizes, attn_implementation="sdpa").eval())


def budget_of(batch: TokenBatch) -> int:
    """Four times the mean length."""
    return ROWS * batch.num_tokens // batch.num_sequences


def print_algorithms(batches: Mapping[str, TokenBatch], repetitions: int) -> None:
    """Print how each algorithm fills micro-batches, and the CPU milliseconds of cutting the batch."""
    print(
        f"{'':<44} {'fill':>7} {'micro-batches':>14} {'at least':>9} {'twice':>7} {'CPU ms':>8} {'packing alone':>14}"
    )
    for case, batch in batches.items():
        budget, useful = budget_of(batch), useful_tokens(batch)
        for name, pack in PACKERS.items():
            parts = cut(batch, max_tokens=budget, algorithm=name)
            sizes = [len(build_stream(batch.select(part)).input_ids) for part in parts]
            filled = sum(min(size, budget) for size in sizes)
            whole, alone = [], []
            for _ in range(repetitions):
                start = time.process_time()
                cut(batch, max_tokens=budget, algorithm=name)
                middle = time.process_time()
                pack(batch.lengths.tolist(), budget)
                whole.append(middle - start)
                alone.append(time.process_time() - middle)
            print(
                f"{case + ' ' + name:<44} {filled / budget / len(parts):>7.3f} {len(parts):>14} "
                f"{-(-filled // budget):>9} {sum(sizes) / useful - 1:>7.2%} {1000 * statistics.median(whole):>8.1f} "
                f"{1000 * statistics.median(alone):>14.2f}"
            )


def padded_step(model: PreTrainedModel, batch: TokenBatch) -> None:
    """Leave the gradients of the on-policy loss in the model."""
    model.zero_grad()
    head = cast(nn.Linear, model.get_output_embeddings())
    for indices in torch.arange(batch.num_sequences).split(ROWS):
        part = batch.select(indices)
        lengths = part.lengths.tolist()
        columns = (part.token_ids, *(part.token_columns[name] for name in ("loss_mask", "advantages", "loss_weights")))
        ids, asked, advantages, weights = (
            nn.utils.rnn.pad_sequence(list(column.split(lengths)), batch_first=True) for column in columns
        )
        real = (torch.arange(ids.shape[1]) < part.lengths[:, None]).long()
        hidden = model.base_model(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state
        asked = asked[:, 1:]
        logprobs = -F.cross_entropy(head(hidden[:, :-1][asked]), ids[:, 1:][asked], reduction="none")
        loss = -advantages[:, 1:][asked] * (logprobs - logprobs.detach()).exp()
        (weights[:, 1:][asked] * loss).sum().backward()


def packed_step(scorer: Scorer, batch: TokenBatch, budget: int) -> None:
    """Leave the gradients of the on-policy loss in the model."""
    scorer.model.module.zero_grad()
    train_step(scorer, batch, ClippedPolicyObjective(on_policy=True), max_tokens=budget, update=dict)


def compare(case: str, batch: TokenBatch, plain: PreTrainedModel, scorer: Scorer, repetitions: int) -> Comparison:
    """Check one batch, which warms both sides up, and time it."""
    budget = budget_of(batch)
    sides = {
        "padded": lambda: padded_step(plain, batch),
        "packed": lambda: packed_step(scorer, batch, budget),
    }
    for run in sides.values():
        run()
    pairs = list(zip(plain.parameters(), scorer.model.module.parameters(), strict=True))
    grads = [(a.grad, b.grad) for a, b in pairs if a.grad is not None and b.grad is not None]
    apart = sum(float((a - b).norm()) ** 2 for a, b in grads) / sum(float(a.norm()) ** 2 for a, _ in grads)
    seconds = take_turns(sides, repetitions)
    return Comparison(
        name=case,
        theirs=seconds["padded"],
        ours=seconds["packed"],
        target=TARGET,
        extra={"gradients differ by": apart**0.5},
    )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = parse_arguments(parser)
    print_machine()
    count, response = (32, 32) if options.quick else (1024, 256)
    batches = {
        "alone": make_batch(count, 1, response // 8, response),
        "groups of 8": make_batch(count, 8, response // 8, response),
    }
    print_algorithms(batches, options.repetitions)

    plain, ours = tiny_model(), tiny_model()
    scorer = Scorer(CausalLM.wrap(ours))
    print()
    print_header("CPU seconds a step", "padded", "packed")
    count, response = (8, 16) if options.quick else (64, 128)
    comparisons = [
        compare(name, make_batch(count, size, response // 8, response), plain, scorer, options.repetitions)
        for name, size in (("alone", 1), ("groups of 8", 8))
    ]
    for comparison in comparisons:
        comparison.print()
    worst = max(comparison.extra["gradients differ by"] for comparison in comparisons)
    verdict = "ok" if worst <= GRADIENT_LIMIT else "MISSED"
    print(f"gradients differ by {worst:.2g} at most, limit {GRADIENT_LIMIT:g}: {verdict}")
    write_results(options.out, comparisons)


if __name__ == "__main__":
    main()
