"""Draw the learning curve of a run: `uv run --group dev benchmarks/learning_curve.py results/grpo [PICTURE]`.

Reads `metrics.jsonl` and `summary.json` of the run folder. Lines are the per-step figures of the sampled training
rollouts, small dots the validations, large ones the greedy accuracy on the held-out problems before and after.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from nemo_rl.observe.logger import read_metrics

DEFAULT_OUTPUT = Path("docs/images/learning_curve.png")


def series(lines: Sequence[dict[str, float]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, without the steps that lack it."""
    points = [(int(line["step"]), line[name]) for line in lines if not math.isnan(line.get(name, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def smoothed(values: Sequence[float], window: int = 5) -> list[float]:
    """The mean of each value and the `window - 1` before it."""
    spans = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [math.fsum(span) / len(span) for span in spans]


def draw(run: Path, output: Path, *, training: Sequence[str], validation: str) -> None:
    """Draw `training` metrics, `validation` and the accuracy before and after the run into the picture `output`.

    Raises:
        SystemExit: the run has no metrics of these names.
    """
    lines = read_metrics(run / "metrics.jsonl")
    summary = json.loads((run / "summary.json").read_text()) if (run / "summary.json").exists() else {}
    figure = Figure(figsize=(7.2, 3.8), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    drawn: list[Sequence[float]] = []
    for name, colour in zip(training, ("tab:blue", "tab:orange", "tab:purple"), strict=False):
        steps, values = series(lines, name)
        if values in drawn or not values:
            continue  # reward and accuracy are one line where a right answer earns 1 and a wrong one 0
        drawn.append(values)
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, smoothed(values), color=colour, linewidth=2, label=f"{name}, mean of 5 steps")
    if not drawn:
        known = ", ".join(sorted({name for line in lines for name in line})) or "none"
        raise SystemExit(f"{run / 'metrics.jsonl'} has none of {', '.join(training)}; it has {known}.")

    if series(lines, validation)[0]:
        axes.plot(*series(lines, validation), "o", color="tab:gray", markersize=4, label=f"{validation}, greedy")
    ends = [(0, summary.get("accuracy_before")), (summary.get("steps"), summary.get("accuracy_after"))]
    if measured := [(step, value) for step, value in ends if value is not None]:
        axes.plot(*zip(*measured, strict=True), "o", color="tab:green", markersize=8, label="held-out accuracy, greedy")
    for step, value in measured:
        axes.annotate(f"{value:.3f}", (step, value), textcoords="offset points", xytext=(0, 10), ha="center")
    axes.set(xlabel="step", ylim=(0, 1.08), xlim=(-1, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, e.g. results/grpo")
    parser.add_argument("output", type=Path, nargs="?", default=DEFAULT_OUTPUT)
    parser.add_argument("--training", nargs="+", default=["train/reward/mean"], help="names in metrics.jsonl")
    parser.add_argument("--validation", default="val/accuracy", help="name in metrics.jsonl")
    arguments = parser.parse_args()
    draw(arguments.run, arguments.output, training=arguments.training, validation=arguments.validation)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
