"""Measure how much of a GPU's arithmetic a training step uses: model FLOPs utilisation (MFU), ours and by hand.

The model has the shape of Qwen2.5-1.5B and random weights. All sides train the same module in bfloat16 on the same
sequences of one length, with the same float32 master weights, the same fused AdamW and clipping, and take turns; so
what differs is forward, loss and backward.

- by hand: Transformers with `sdpa` attention (causal, no mask: PyTorch's flash kernel), whole logits, `cross_entropy`.
- ours: `PyTorchBackend.train`; `compiled`: the same with `policy.compile`.
- `--trl`: TRL's `SFTTrainer` on the same sequences, alone and after the others, with weights and moments in
  bfloat16, which is cheaper.

FLOPs of a token, forward: 2 a weight of every matrix, and in each layer 4 a hidden unit and attended token; backward
twice as many. The peak is that of an H100 or H200 SXM in dense bfloat16.

    uv run --group bench benchmarks/mfu.py [--compile] [--trl] [--output FILE]
"""

# pyright: reportPrivateUsage=none
import argparse
import gc
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bare_loop import bare_backward, equal_sequences, rows
from measure import machine, parse_arguments, print_machine, seconds_of, take_turns
from model_folder import write_model
from torch import nn
from transformers import PreTrainedModel, Qwen2Config
from transformers.utils.logging import disable_progress_bar

from nemo_rl.config.schema.policy import TrainedPolicyConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.models.attention import NAME
from nemo_rl.models.compiled import compile_layers
from nemo_rl.models.load import load_tokenizer
from nemo_rl.objectives.supervised import SupervisedObjective
from nemo_rl.training.pytorch.backend import PyTorchBackend

PEAK = 989e12


@dataclass(frozen=True, slots=True)
class Work:
    """One optimizer step: sequences of a length, so many to a micro-batch, so many micro-batches."""

    length: int
    per_micro_batch: int
    micro_batches: int

    @property
    def tokens(self) -> int:
        """Tokens that enter the model: the last of a sequence predicts nothing."""
        return (self.length - 1) * self.per_micro_batch * self.micro_batches


def shape(scale: float) -> Qwen2Config:
    """The shape of Qwen2.5-1.5B, or of a smaller model by a scale below 1."""
    heads = max(2, round(6 * scale) * 2)
    return Qwen2Config(
        vocab_size=max(512, round(151936 * scale)),
        hidden_size=heads * 128,
        intermediate_size=max(64, round(8960 * scale)),
        num_hidden_layers=max(2, round(28 * scale)),
        num_attention_heads=heads,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )


def flops_per_token(module: PreTrainedModel, length: int) -> float:
    """Useful FLOPs of training on one token of a sequence of that length."""
    config = module.config
    matrices = sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
    attention = 4 * (length / 2) * config.hidden_size * config.num_hidden_layers
    return 3 * (2 * matrices + attention)


def make_backend(folder: Path, work: Work, device: str) -> PyTorchBackend:
    """Our side."""
    settings: dict[str, Any] = {
        "model_name": str(folder),
        "train_global_batch_size": work.per_micro_batch * work.micro_batches,
        "max_total_sequence_length": work.length,
        "train_mb_tokens": work.per_micro_batch * (work.length - 1),
        "precision": "bfloat16",
        "device": device,
        "optimizer": {"name": "torch.optim.AdamW", "kwargs": {"lr": 1e-6}},
    }
    return PyTorchBackend(TrainedPolicyConfig.model_validate(settings), str(folder), load_tokenizer(str(folder)))


def make_sides(
    backend: PyTorchBackend, batch: TokenBatch, work: Work, options: argparse.Namespace
) -> dict[str, Callable[[], None]]:
    """The steps that are compared, all on the weights of one backend."""
    module = backend.model.module
    parts = rows(batch, work.per_micro_batch, options.device)
    layers = [part for part in module.modules() if type(part).__name__.endswith("DecoderLayer")]
    compiled: list[Any] = []

    def by_hand() -> None:
        module.set_attn_implementation("sdpa")
        bare_backward(module, parts)
        backend._update()
        backend._optimizer.zero_grad()
        module.set_attn_implementation(NAME)

    def ours() -> None:
        backend.train(batch, SupervisedObjective())

    def ours_compiled() -> None:
        if not compiled:
            compile_layers(backend.model.trunk)
            compiled.extend(layer._compiled_call_impl for layer in layers)
        for layer, call in zip(layers, compiled, strict=True):
            layer._compiled_call_impl = call
        ours()
        for layer in layers:
            layer._compiled_call_impl = None

    return {"by hand": by_hand, "ours": ours} | ({"compiled": ours_compiled} if options.compile else {})


def measure(sides: Mapping[str, Callable[[], None]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Warm the sides up and let them take turns."""
    for name, run in sides.items():
        first, second = (seconds_of(run, options.device) for _ in range(2))
        print(f"warm-up of {name}: {first:.1f} s, {second:.1f} s", flush=True)
    return take_turns(sides, options.repetitions, options.device)


def time_trl(folder: Path, batch: TokenBatch, work: Work, options: argparse.Namespace) -> list[float]:
    """Seconds of TRL's steps, after two to warm up; none if TRL is not installed."""
    try:
        from trl_side import trl_steps
    except ImportError as error:
        print(f"TRL is left out: {error}", flush=True)
        return []
    sequences = batch.token_ids.view(batch.num_sequences, -1)
    return trl_steps(folder, sequences, work.per_micro_batch, work.micro_batches, options.repetitions + 2)[2:]


def report(found: dict[str, list[float]], work: Work, flops: float, options: argparse.Namespace) -> None:
    """Print a line a side, and write everything as JSON."""
    medians = {name: statistics.median(times) for name, times in found.items()}
    results: dict[str, dict[str, float]] = {}
    print(f"{'side':<12} {'ms/step':>9} {'tokens/s':>10} {'TFLOP/s':>8} {'MFU':>7} {'by hand / it':>13}")
    for name, median in medians.items():
        speed = work.tokens / median
        ratio = medians["by hand"] / median
        mfu = speed * flops / PEAK
        results[name] = {"seconds": median, "tokens_per_second": speed, "mfu": mfu, "speedup": ratio}
        print(
            f"{name:<12} {1e3 * median:>9.1f} {speed:>10.0f} {speed * flops / 1e12:>8.1f} {mfu:>7.1%} {ratio:>12.3f}x"
        )
    if options.device == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    if options.output is not None:
        written = {"machine": machine(), "tokens": work.tokens, "flops_per_token": flops}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(written | {"results": results, "runs": found}, indent=2) + "\n")


def main() -> None:
    """Measure all sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--compile", action="store_true", help="also with compiled layers")
    parser.add_argument("--trl", action="store_true", help="also TRL's SFTTrainer")
    parser.add_argument("--model-scale", type=float, default=1.0, help="1 is Qwen2.5-1.5B (default: %(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a micro-batch (default: %(default)s)")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parse_arguments(parser, repetitions=10)
    disable_progress_bar()
    print_machine()
    work = Work(options.length + 1, max(1, options.tokens // options.length), options.micro_batches)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = shape(options.model_scale)
        write_model(folder, config, torch.bfloat16, options.device)
        backend = make_backend(folder, work, options.device)
        flops = flops_per_token(backend.model.module, work.length - 1)
        print(f"{backend.model.num_parameters:,} parameters, {flops / 1e9:.2f} GFLOP a token, {work}", flush=True)
        batch = equal_sequences(work.per_micro_batch * work.micro_batches, work.length, config.vocab_size)
        sides = make_sides(backend, batch, work, options)
        found = measure(sides, options)
        report(found, work, flops, options)
        if options.trl:
            del backend, sides
            gc.collect()
            torch.cuda.empty_cache()
            if times := time_trl(folder, batch, work, options):
                report(found | {"TRL": times}, work, flops, options)


if __name__ == "__main__":
    main()
