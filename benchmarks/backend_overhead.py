"""Compare a step of the training backend with the same step written by hand in plain PyTorch, in CPU seconds.

Both sides train equal float32 models on the same sequences of one length, so that plain rows need no padding and
nothing is shared: what differs is what the library adds. By hand: Transformers with `sdpa` attention, whole logits and
`cross_entropy`, the same fused AdamW, the gradient clipped to 1. Ours: `PyTorchBackend.train`, which also computes what
it logs (entropies among it) and never holds whole logits. Before anything is timed, losses and weights after the
warm-up step are compared.

    uv run --group bench benchmarks/backend_overhead.py [--out FILE]
"""

import argparse
import tempfile
from pathlib import Path

import torch
from bare_loop import bare_backward, equal_sequences, rows
from measure import Comparison, parse_arguments, print_header, print_machine, take_turns, write_results
from model_folder import write_model
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.utils.logging import disable_progress_bar

from nemo_rl.config.schema.policy import TrainedPolicyConfig
from nemo_rl.models.load import load_tokenizer
from nemo_rl.objectives.supervised import SupervisedObjective
from nemo_rl.training.pytorch.backend import PyTorchBackend

RATE = 1e-4
TARGET = 1 / 1.05
"""Ours may cost 5% more."""


def compare(folder: Path, sequences: int, length: int, repetitions: int) -> Comparison:
    """Check that both sides take the same step, and time it."""
    optimizer = {"name": "torch.optim.AdamW", "kwargs": {"lr": RATE}}
    settings = {"model_name": str(folder), "train_global_batch_size": sequences, "max_total_sequence_length": length}
    config = TrainedPolicyConfig.model_validate(
        settings | {"precision": "float32", "device": "cpu", "train_mb_tokens": 1 << 20, "optimizer": optimizer}
    )
    backend = PyTorchBackend(config, str(folder), load_tokenizer(str(folder)))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    adam = torch.optim.AdamW(plain.parameters(), lr=RATE, fused=True)
    batch = equal_sequences(sequences, length, plain.config.vocab_size)
    parts = rows(batch, sequences, "cpu")

    def by_hand() -> float:
        loss = bare_backward(plain, parts)
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        return float(loss)

    def ours() -> float:
        return backend.train(batch, SupervisedObjective())["loss"].value

    losses = by_hand(), ours()
    pairs = zip(plain.parameters(), backend.model.module.parameters(), strict=True)
    apart = max(float((one - other).detach().abs().max()) for one, other in pairs) / RATE
    seconds = take_turns({"theirs": by_hand, "ours": ours}, repetitions)
    return Comparison(
        name=f"{sequences} x {length} tokens",
        theirs=seconds["theirs"],
        ours=seconds["ours"],
        target=TARGET,
        extra={"losses differ by": abs(losses[0] - losses[1]), "weights by steps": apart},
    )


def main() -> None:
    """Compare and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = parse_arguments(parser)
    disable_progress_bar()
    print_machine()
    width, layers, shapes = (32, 2, [(2, 32)]) if options.quick else (256, 4, [(8, 256), (32, 64)])
    config = Qwen2Config(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    print_header("case", "by hand", "ours")
    results: list[Comparison] = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), config, torch.float32, "cpu")
        for sequences, length in shapes:
            results.append(compare(Path(folder), sequences, length, options.repetitions))
            results[-1].print()
    write_results(options.out, results)


if __name__ == "__main__":
    main()
