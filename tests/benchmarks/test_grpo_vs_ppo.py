"""The comparison of GRPO and PPO: its arithmetic on known curves, and the whole of it with a tiny model."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("grpo_vs_ppo", BENCHMARKS / "grpo_vs_ppo.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tokens_to_reach_an_accuracy_are_read_between_validations(benchmark: ModuleType) -> None:
    curve = [(0, 0.2), (100, 0.4), (200, 0.3), (300, 0.8)]
    reached = [benchmark.tokens_to_reach(curve, accuracy) for accuracy in (0.1, 0.3, 0.4, 0.6, 0.9)]
    assert reached == [0, pytest.approx(50), 100, pytest.approx(260), None]


def test_seeds_are_averaged_at_equal_tokens(benchmark: ModuleType) -> None:
    runs = [[(0, 0.0), (100, 1.0)], [(0, 0.0), (50, 0.0), (150, 1.0)]]
    curve = dict(benchmark.mean_curve(runs, 100))
    assert (curve[0], curve[50], curve[100]) == (0, pytest.approx(0.25), pytest.approx(0.75))


def test_the_ratio_is_how_many_times_more_tokens_ppo_needs(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = benchmark.compare({"grpo": [(0, 0.0), (100, 1.0)], "ppo": [(0, 0.0), (320, 0.8)]})
    assert [row["ratio"] for row in rows[:5]] == [pytest.approx(4.0)] * 5
    assert (rows[-1]["grpo"], rows[-1]["ppo"], rows[-1]["ratio"]) == (pytest.approx(95), None, None)
    benchmark.print_comparison(rows)
    printed = capsys.readouterr().out
    assert "4.00x" in printed and "never" in printed and "PPO needs 4.00 times" in printed


def test_runs_are_done_one_by_one_and_compared_once_none_is_missing(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--quick", "--seeds", "1", "--steps", "2", "--val-period", "1", "--runs", str(tmp_path)]
    benchmark.main([*quick, "--only", "grpo:1"])
    assert capsys.readouterr().out.endswith("still to do before there is a comparison: --only ppo:1\n")
    benchmark.main(quick)
    printed = capsys.readouterr().out
    assert "grpo_1 holds this run" in printed.replace("\n", " ") and "PPO / GRPO" in printed
    figures = json.loads((tmp_path / "grpo_vs_ppo.json").read_text())
    for rows in figures["runs"].values():
        assert [row["step"] for row in rows] == [0, 1, 2]
        assert rows[0]["tokens"] == 0 < rows[1]["tokens"] < rows[2]["tokens"]
        assert None not in [row["accuracy"] for row in rows] and None not in [row["reward"] for row in rows[1:]]
    assert figures["budget_tokens"] == min(rows[-1]["tokens"] for rows in figures["runs"].values())
    assert (tmp_path / "grpo_vs_ppo.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        benchmark.main([*quick, "--only", "sft:1"])
