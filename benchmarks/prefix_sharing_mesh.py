"""Compare a training step on rollouts that share prompts with the same step without sharing, over FSDP2 x CP.

Both sides are the backend on four ranks (two share data and weights, two divide the tokens of every sequence), gloo on
a CPU, with the same packed rollouts, weights and budget; one computes every prompt once. CPU seconds of all ranks
count, optimizer step and collective calls included. Losses are compared before anything is timed.

The model is random: 8 layers of 256. Cases are prompt/response/group x prompts.

    uv run --group bench benchmarks/prefix_sharing_mesh.py [--quick] [--out FILE]
"""

import argparse
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from measure import Comparison, parse_arguments, print_header, print_machine, take_turns, write_results
from model_folder import write_model
from prefix_sharing import Shape, make_batch
from transformers import LlamaConfig

from nemo_rl.algorithms.ranks import dealer, start_ranks
from nemo_rl.config.schema.policy import TrainedPolicyConfig
from nemo_rl.distributed.local import LocalExecutor
from nemo_rl.distributed.mesh import ParallelSizes
from nemo_rl.interfaces import Resources
from nemo_rl.metrics import scalars
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.workers.handles import Learner
from nemo_rl.workers.train import TrainWorker

SIZES = ParallelSizes(shard=2, context=2)
SHAPES = (Shape(256, 64, 8, 4, target=2.0), Shape(512, 32, 8, 4, target=3.0), Shape(64, 128, 8, 4, target=1.0))
QUICK = (Shape(32, 16, 4, 2, target=0.0),)
VOCABULARY = 4096


def start(stack: ExitStack, executor: LocalExecutor, source: str, *, share_prefixes: bool) -> Learner:
    """Start the ranks of one side."""
    config = TrainedPolicyConfig.model_validate(
        {
            "model_name": source,
            "train_global_batch_size": 32,
            "max_total_sequence_length": 1024,
            "train_mb_tokens": 4096,
            "precision": "float32",
            "device": "cpu",
            "num_threads": 1,
            "share_prefixes": share_prefixes,
            "optimizer": {"name": "torch.optim.AdamW", "kwargs": {"lr": 1e-5}},
            "dtensor_cfg": {"context_parallel_size": SIZES.context},
        }
    )
    arguments = {"config": config, "source": source}
    resources, deal = Resources(), dealer(config)
    return Learner(start_ranks(executor, stack, TrainWorker, arguments, sizes=SIZES, deal=deal, resources=resources))


def main() -> None:
    """Compare all shapes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = parse_arguments(parser, repetitions=3)
    print_machine()
    model = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    objective = ClippedPolicyObjective(on_policy=True)
    comparisons: list[Comparison] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        write_model(folder, model, torch.float32, "cpu")
        executor = stack.enter_context(LocalExecutor())
        shared, apart = (start(stack, executor, str(folder), share_prefixes=shares) for shares in (True, False))
        print_header(f"float32, {SIZES}, CPU seconds a step", "apart", "shared")
        for shape in QUICK if options.quick else SHAPES:
            batch = make_batch(shape, VOCABULARY, varied=True)
            losses = [scalars(side.train(batch, objective))["loss"] for side in (shared, apart)]
            sides = {"apart": partial(apart.train, batch, objective), "shared": partial(shared.train, batch, objective)}
            seconds = take_turns(sides, options.repetitions, "cpu")
            comparison = Comparison(
                name=str(shape),
                theirs=seconds["apart"],
                ours=seconds["shared"],
                target=shape.target,
                extra={"losses differ by": abs(losses[0] - losses[1])},
            )
            comparison.print()
            comparisons.append(comparison)
    write_results(options.out, comparisons)


if __name__ == "__main__":
    main()
