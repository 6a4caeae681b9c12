"""Compare a training step on rollouts that share prompts with the same rollouts as padded rows.

Both sides run forward and backward of the on-policy GRPO loss on the same rollouts, weights and micro-batch budget of
computed tokens; no optimizer. Before anything is timed their gradients are compared.

- plain: Transformers with `sdpa` attention, an attention mask and right padding to the longest row of the micro-batch;
  the model's forward pass gives logits at every position, and those of the responses enter the loss.
- ours: `train_step`, which lays the same rollouts out as one stream, each prompt once. It also computes what it logs
  (entropies, clip shares), which the plain side does not.
- `trimmed` is the ratio to plain rows whose prompt positions skip the LM head, so it owes nothing but to sharing. Its
  ceiling is the ratio of computed tokens, less what the head costs both sides: 3.0x at 256/64/8.

On a GPU (`--device cuda`, case `gpu`) the model has the shape of Qwen2.5-0.5B and random weights, time is the GPU's.
There a micro-batch of so small a model must be large (`--max-tokens`), or both sides wait for the host.

Tokens are random, so responses of a group share nothing but their prompt. `varied` responses have 50 to 100% of the
longest length. Cases are prompt/response/group x prompts.

    uv run --group bench benchmarks/prefix_sharing.py [--cases targets grid] [--dtype float32] [--out FILE]
    uv run --group bench benchmarks/prefix_sharing.py --device cuda --cases gpu --dtype bfloat16 --max-tokens 16384
"""

import argparse
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
import torch.nn.functional as F
from measure import Comparison, median_ratio, parse_arguments, print_header, print_machine, take_turns, write_results
from model_folder import write_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2Config
from transformers.utils.logging import disable_progress_bar

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.types import Rollout, RolloutGroup, Task
from nemo_rl.distributed.cache import cache_dir
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.models.load import load_causal_lm, resolve_model
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.objectives.weights import loss_weights
from nemo_rl.training.step import Scorer, train_step

MODEL = "embedded:SmolLM2-135M-Instruct"
GRADIENT_LIMIT = 1e-5


@dataclass(frozen=True, slots=True)
class Shape:
    """Rollouts of one step: tokens of a prompt and of the longest response, answers to a prompt, prompts."""

    prompt: int
    response: int
    group: int
    prompts: int
    target: float = 1.0

    def __str__(self) -> str:
        return f"{self.prompt}/{self.response}/{self.group} x {self.prompts}"


TARGETS = (
    Shape(44, 16, 8, 8, target=2.2),
    Shape(256, 64, 8, 2, target=3.0),
    Shape(64, 128, 8, 2, target=1.2),
    Shape(1024, 32, 8, 1, target=8.0),
)
GRID = tuple(
    Shape(prompt, response, group, 2 if group * (prompt + response) <= 800 else 1)
    for prompt in (16, 64, 256)
    for response in (8, 32, 128)
    for group in (2, 8)
)
GPU = (Shape(1024, 128, 16, 2), Shape(512, 512, 8, 2), Shape(256, 1024, 8, 2))
SHAPES = {"targets": TARGETS, "grid": GRID, "gpu": GPU}
QUICK = {"targets": (Shape(44, 16, 4, 2, target=1.0),), "grid": (Shape(16, 8, 2, 1),), "gpu": (Shape(32, 32, 2, 2),)}


@dataclass(frozen=True, slots=True)
class Rows:
    """Padded rollouts: a prompt of P tokens and a response of up to R in every row.

    Attributes:
        input_ids: int64 [B, P + R].
        attention_mask: int64 [B, P + R], 0 on padding.
        advantages: float32 [B, R].
        weights: float32 [B, R], of each token in the loss, 0 on padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    advantages: Tensor
    weights: Tensor


def make_batch(shape: Shape, vocabulary: int, *, varied: bool) -> TokenBatch:
    """Invent rollouts with random tokens, advantages and, if `varied`, lengths."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> Tensor:
        return torch.randint(vocabulary, (count,), generator=generator)

    def rollout(prompt: Tensor) -> Rollout:
        shortest = shape.response // 2 if varied else shape.response
        length = int(torch.randint(shortest, shape.response + 1, (), generator=generator))
        token_ids = torch.cat([prompt, tokens(length)])
        loss_mask = torch.arange(len(token_ids)) >= len(prompt)
        return Rollout(token_ids, loss_mask, torch.zeros(len(token_ids)), {}, "stop", 0)

    prompts = [tokens(shape.prompt) for _ in range(shape.prompts)]
    groups = [
        RolloutGroup(Task((), "none", index=i), tuple(rollout(prompt) for _ in range(shape.group)))
        for i, prompt in enumerate(prompts)
    ]
    batch = TokenBatch.from_rollouts(groups)
    return batch.with_columns(
        advantages=batch.per_token(torch.randn(batch.num_sequences, generator=generator)),
        loss_weights=loss_weights(batch.token_columns["loss_mask"], batch.cu_seqlens),
    )


def padded(batch: TokenBatch, prompt: int, device: str, max_tokens: int) -> list[Rows]:
    """Pad the rollouts on the device, as many rows to a micro-batch as fit into the budget, at least one."""
    parts: list[Rows] = []
    lengths = batch.lengths.tolist()

    def pad(column: Tensor, indices: list[int]) -> Tensor:
        pieces = column.split(lengths)
        return nn.utils.rnn.pad_sequence([pieces[i] for i in indices], batch_first=True).to(device)

    for part in torch.arange(len(lengths)).split(max(1, max_tokens // max(lengths))):
        indices = part.tolist()
        parts.append(
            Rows(
                input_ids=pad(batch.token_ids, indices),
                attention_mask=pad(torch.ones_like(batch.token_ids), indices),
                advantages=pad(batch.token_columns["advantages"], indices)[:, prompt:],
                weights=pad(batch.token_columns["loss_weights"], indices)[:, prompt:],
            )
        )
    return parts


def padded_step(model: PreTrainedModel, parts: list[Rows], prompt: int, *, all_logits: bool) -> None:
    """Leave the gradients of the loss in the model."""
    model.zero_grad()
    head = cast(nn.Linear, model.get_output_embeddings())
    for rows in parts:
        output = model.base_model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False)
        first = 0 if all_logits else prompt - 1
        target = rows.input_ids[:, first + 1 :]
        logits = F.linear(output.last_hidden_state[:, first:-1], head.weight).float()
        logprobs = -F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
        logprobs = logprobs[:, prompt - 1 - first :]
        loss = -rows.advantages * (logprobs - logprobs.detach()).exp()
        (rows.weights * loss).sum().backward()


def our_step(scorer: Scorer, batch: TokenBatch, max_tokens: int) -> None:
    """Leave the gradients of the loss in the model."""
    scorer.model.module.zero_grad()
    train_step(scorer, batch, ClippedPolicyObjective(on_policy=True), max_tokens=max_tokens, update=dict)


def gradients(model: nn.Module) -> Mapping[str, Tensor]:
    """The gradients that a step has left, by parameter."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def difference(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> float:
    """Norm of the difference of two gradients, relative to the norm of the first."""
    apart = sum(float((theirs[name] - ours[name]).norm()) ** 2 for name in theirs.keys() | ours.keys())
    return (apart / sum(float(gradient.norm()) ** 2 for gradient in theirs.values())) ** 0.5


def make_sides(
    shape: Shape, batch: TokenBatch, plain: PreTrainedModel, scorer: Scorer, max_tokens: int
) -> dict[str, Callable[[], None]]:
    """The steps that are compared."""
    parts = padded(batch, shape.prompt, plain.device.type, max_tokens)
    return {
        "trimmed": lambda: padded_step(plain, parts, shape.prompt, all_logits=False),
        "plain": lambda: padded_step(plain, parts, shape.prompt, all_logits=True),
        "ours": lambda: our_step(scorer, batch, max_tokens),
    }


def compare(
    shape: Shape, plain: PreTrainedModel, scorer: Scorer, options: argparse.Namespace, *, varied: bool
) -> Comparison:
    """Check one shape, which warms both sides up, and time it."""
    batch = make_batch(shape, plain.config.vocab_size, varied=varied)
    sides = make_sides(shape, batch, plain, scorer, options.max_tokens)
    for run in sides.values():
        run()
    apart = difference(gradients(plain), gradients(scorer.model.module))
    seconds = take_turns(sides, options.repetitions, plain.device.type)
    trimmed = median_ratio(seconds["trimmed"], seconds["ours"])
    return Comparison(
        name=f"{shape} {'varied' if varied else 'fixed'}",
        theirs=seconds["plain"],
        ours=seconds["ours"],
        target=shape.target,
        extra={"trimmed": trimmed, "gradients differ by": apart},
    )


def random_model() -> Qwen2Config:
    """The shape of Qwen2.5-0.5B."""
    return Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


def main() -> None:
    """Compare all shapes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(SHAPES), default=["targets", "grid"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--max-tokens", type=int, default=4096, help="budget of a micro-batch (default: %(default)s)")
    options = parse_arguments(parser)
    print_machine()
    disable_progress_bar()

    dtype: torch.dtype = getattr(torch, options.dtype)
    with ExitStack() as stack:
        source = Path(stack.enter_context(TemporaryDirectory()))
        if options.device == "cuda":
            write_model(source, random_model(), dtype, "cuda")
        else:
            source = resolve_model(MODEL, cache_dir())
        plain, _ = load_causal_lm(str(source), dtype=dtype, device=options.device, attn_implementation="sdpa")
        ours, _ = load_causal_lm(str(source), dtype=dtype, device=options.device)
    rows = 2**31 // (4 * plain.config.vocab_size) if options.device == "cuda" else 256
    scorer = Scorer(CausalLM.wrap(ours.eval()), chunk_size=rows)
    comparisons: list[Comparison] = []
    shapes = QUICK if options.quick else SHAPES
    print_header(f"{options.dtype}, {options.device} seconds a step", "plain", "ours")
    for case in options.cases:
        for shape in shapes[case]:
            for varied in (False,) if case == "grid" else (False, True):
                comparison = compare(shape, plain, scorer, options, varied=varied)
                comparison.print()
                comparisons.append(comparison)
    worst = max(comparison.extra["gradients differ by"] for comparison in comparisons)
    if dtype == torch.float32:
        verdict = "ok" if worst <= GRADIENT_LIMIT else "MISSED"
        print(f"gradients differ by {worst:.2g} at most, limit {GRADIENT_LIMIT:g}: {verdict}")
    write_results(options.out, comparisons)


if __name__ == "__main__":
    main()
