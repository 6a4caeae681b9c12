"""Does GRPO reach an accuracy with fewer sampled tokens than PPO? `uv run --group dev benchmarks/grpo_vs_ppo.py`.

Both sides run their packaged recipe on sums with SmolLM2-135M-Instruct, from the same weights, with the same problems
in the same order, as many answers a step, the same optimizer, schedule, clipping and number of optimizer steps. What is
left is what the algorithms are: GRPO compares an answer with the others to its problem, PPO each token with a critic on
the policy's trunk. `README.md` says which settings were chosen for which side. Greedy validation accuracy is drawn over
the sampled tokens, which both sides pay for; the mean of the seeds, and their lowest and highest.

Each run is a folder of its own that resumes: `--only grpo:1 ppo:1` does these two, a later call goes on with what is
missing, and figures and picture are made once all of them are done.
"""

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypedDict

from matplotlib.figure import Figure
from measure import machine
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nemo_rl.cli import main as nemo_rl
from nemo_rl.distributed.cache import cache_dir
from nemo_rl.models.load import resolve_model
from nemo_rl.observe.logger import read_metrics

ALGORITHMS = {"grpo": "tab:blue", "ppo": "tab:orange"}
THRESHOLDS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
CLAIM = 3.2
"""GRPO is said to converge so many times faster than PPO."""
PROMPTS, ANSWERS = 16, 8
"""Of a step, on both sides."""
GRID = 200
"""Points of a drawn curve."""


class Row(TypedDict):
    """One step of a run: tokens sampled up to its end, mean reward of its answers, accuracy if it was validated."""

    step: int
    tokens: float
    reward: float | None
    accuracy: float | None


type Point = tuple[float, float]
"""Tokens sampled, and the accuracy then."""


def run(algorithm: str, seed: int, options: argparse.Namespace) -> Path:
    """Train one side with one seed to its end, from where it left off, and return its folder.

    Raises:
        SystemExit: the run was interrupted or failed.
    """
    folder = options.runs / f"{algorithm}_{seed}"
    settings = [
        f"{algorithm}.seed={seed}",
        f"{algorithm}.max_num_steps={options.steps}",
        f"{algorithm}.num_prompts_per_step={PROMPTS}",
        f"{algorithm}.num_generations_per_prompt={ANSWERS}",
        f"{algorithm}.val_period={options.val_period}",
        f"{algorithm}.val_at_start=true",
        f"{algorithm}.val_at_end=true",
        f"{algorithm}.report_base_model=false",
        "data.validation.num_samples=200",
        f"checkpointing.checkpoint_dir={folder}",
        "checkpointing.save_period=10",
        "checkpointing.keep_top_k=1",
        "checkpointing.export_hf=false",
        "logger.tensorboard_enabled=false",
        "logger.print_sample_period=0",
        *(tiny_settings(algorithm, options.runs) if options.quick else ()),
        *options.settings,
    ]
    if code := nemo_rl([algorithm, *settings]):
        raise SystemExit(code)
    return folder


def tiny_settings(algorithm: str, folder: Path) -> list[str]:
    """Make the recipe so small, with a random model, that a run takes a second or two."""
    source, model = resolve_model("embedded:SmolLM2-135M-Instruct", cache_dir()), folder / "model"
    if not (model / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(source)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ).save_pretrained(model)
        tokenizer.save_pretrained(model)
    return [
        f"policy.model_name={model}",
        "policy.precision=float32",
        "policy.num_threads=1",
        f"{algorithm}.num_prompts_per_step=2",
        f"{algorithm}.num_generations_per_prompt=2",
        "policy.generation.max_new_tokens=4",
        "data.validation.num_samples=4",
        "data.test.num_samples=4",
    ]


def is_finished(folder: Path) -> bool:
    """Whether a run has got to its end."""
    summary = folder / "summary.json"
    return summary.exists() and json.loads(summary.read_text())["finished"]


def read_rows(folder: Path) -> list[Row]:
    """The steps of a run; step 0 is the model before training."""
    rows: list[Row] = [Row(step=0, tokens=0.0, reward=None, accuracy=None)]
    for line in read_metrics(folder / "metrics.jsonl"):
        if "train/tokens_sampled" in line:
            tokens = rows[-1]["tokens"] + line["train/tokens_sampled"]
            rows.append(Row(step=int(line["step"]), tokens=tokens, reward=line["train/reward/mean"], accuracy=None))
        if "val/accuracy" in line:
            rows[-1]["accuracy"] = line["val/accuracy"]
    return rows


def measured(rows: Sequence[Row]) -> list[Point]:
    """The validations of a run."""
    return [(row["tokens"], row["accuracy"]) for row in rows if row["accuracy"] is not None]


def accuracy_at(points: Sequence[Point], tokens: float) -> float:
    """Accuracy after so many tokens, on the straight line between two validations; `tokens` must lie between some."""
    for (start, before), (end, after) in pairwise(points):
        if start <= tokens <= end:
            return before + (after - before) * (tokens - start) / (end - start)
    raise ValueError(f"{tokens:.0f} tokens are not between two of the {len(points)} validations")


def mean_curve(runs: Sequence[Sequence[Point]], budget: float) -> list[Point]:
    """The mean accuracy of all runs at equal tokens, from 0 to `budget`."""
    grid = [budget * place / GRID for place in range(GRID + 1)]
    return [(tokens, statistics.fmean(accuracy_at(points, tokens) for points in runs)) for tokens in grid]


def tokens_to_reach(points: Sequence[Point], accuracy: float) -> float | None:
    """Tokens at which a curve first has this accuracy; None if it never does."""
    if points[0][1] >= accuracy:
        return points[0][0]
    for (start, before), (end, after) in pairwise(points):
        if before < accuracy <= after:
            return start + (end - start) * (accuracy - before) / (after - before)
    return None


def compare(curves: Mapping[str, Sequence[Point]]) -> list[dict[str, float | None]]:
    """Tokens of both sides' mean curves to reach each threshold, and how many times more PPO needs."""
    rows: list[dict[str, float | None]] = []
    for threshold in THRESHOLDS:
        grpo, ppo = (tokens_to_reach(curves[algorithm], threshold) for algorithm in ALGORITHMS)
        rows.append({"accuracy": threshold, "grpo": grpo, "ppo": ppo, "ratio": ppo / grpo if grpo and ppo else None})
    return rows


def print_comparison(rows: Sequence[Mapping[str, float | None]]) -> None:
    """Print the table of thresholds and what it says about the claim."""

    def text(value: float | None, form: str) -> str:
        return "never" if value is None else format(value, form)

    print(f"{'accuracy':>8} {'GRPO tokens':>12} {'PPO tokens':>12} {'PPO / GRPO':>11}")
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        print(f"{row['accuracy']:>8.2f} {text(row['grpo'], ',.0f'):>12} {text(row['ppo'], ',.0f'):>12} {ratio:>11}")
    ratios = [ratio for row in rows if (ratio := row["ratio"]) is not None]
    if ratios:
        middle = math.exp(statistics.fmean(map(math.log, ratios)))
        print(f"PPO needs {middle:.2f} times the tokens of GRPO (geometric mean), {CLAIM:g} are claimed")


def draw(runs: Mapping[str, Sequence[Sequence[Point]]], budget: float, output: Path) -> None:
    """Draw the mean of each side's runs as a line and their lowest and highest as a band."""
    figure = Figure(figsize=(7.2, 3.8), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    for algorithm, colour in ALGORITHMS.items():
        tokens, mean = zip(*mean_curve(runs[algorithm], budget), strict=True)
        spread = [[accuracy_at(points, place) for points in runs[algorithm]] for place in tokens]
        axes.fill_between(tokens, list(map(min, spread)), list(map(max, spread)), color=colour, alpha=0.2, linewidth=0)
        label = f"{algorithm.upper()}, mean of {len(runs[algorithm])} seeds"
        axes.plot(tokens, mean, color=colour, linewidth=2, label=label)
    axes.set(xlabel="sampled tokens", ylabel="validation accuracy, greedy", ylim=(0, 1.08), xlim=(0, budget))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def report(folders: Mapping[str, Path], options: argparse.Namespace) -> None:
    """Compare the finished runs up to the tokens that all of them have sampled; write figures and picture."""
    rows = {name: read_rows(folder) for name, folder in folders.items()}
    points = {a: [measured(rows[name]) for name in rows if name.startswith(a)] for a in ALGORITHMS}
    budget = min(curve[-1][0] for curves in points.values() for curve in curves)
    comparison = compare({algorithm: mean_curve(curves, budget) for algorithm, curves in points.items()})
    summaries = {name: json.loads((folder / "summary.json").read_text()) for name, folder in folders.items()}
    held_out = {name: summary["accuracy_after"] for name, summary in summaries.items()}
    print(f"\n{budget:,.0f} sampled tokens each, held-out accuracy after the last step:")
    print("\n".join(f"  {name:<8}{value:.3f}" for name, value in held_out.items()))
    print_comparison(comparison)
    draw(points, budget, options.picture)
    record = {"machine": machine(), "budget_tokens": budget, "thresholds": comparison, "held_out": held_out}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**record, "runs": rows}, indent=1) + "\n")
    print(f"wrote {options.picture} and {options.out}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, do the runs that are asked for, and report when none is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="ALGORITHM:SEED", help="do only these runs, e.g. grpo:1")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each side (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of each run (default: %(default)s)")
    parser.add_argument("--val-period", type=int, default=2, help="steps between validations (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny model and sizes: shows that it runs")
    parser.add_argument("--runs", type=Path, default=Path("results/grpo_vs_ppo"), help="where the runs' folders are")
    parser.add_argument("--out", type=Path, help="figures (default: benchmarks/results; with --quick, beside the runs)")
    parser.add_argument("--picture", type=Path, help="picture (default: docs/images; with --quick, beside the runs)")
    parser.add_argument("--settings", nargs="*", default=[], metavar="KEY=VALUE", help="on top of both recipes")
    options = parser.parse_args(arguments)
    options.out = options.out or (options.runs if options.quick else Path("benchmarks/results")) / "grpo_vs_ppo.json"
    options.picture = options.picture or (options.runs if options.quick else Path("docs/images")) / "grpo_vs_ppo.png"
    names = [f"{algorithm}:{seed}" for seed in range(1, options.seeds + 1) for algorithm in ALGORITHMS]
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"there is no run {min(unknown)}; the runs are {', '.join(names)}")
    folders = {name: options.runs / name.replace(":", "_") for name in names}
    for name in options.only or names:
        algorithm, _, seed = name.partition(":")
        run(algorithm, int(seed), options)
    if missing := [name for name, folder in folders.items() if not is_finished(folder)]:
        print(f"still to do before there is a comparison: --only {' '.join(missing)}")
        return
    report(folders, options)


if __name__ == "__main__":
    main()
