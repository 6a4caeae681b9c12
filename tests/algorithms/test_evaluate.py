"""An evaluation from the command line to its files: the figures are those of the answers it keeps."""

import json
import math
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev

import pyarrow.parquet
import pytest
import torch

from nemo_rl.algorithms.evaluate import Evaluation, launch_eval
from nemo_rl.algorithms.samples import read_samples
from nemo_rl.cli import main
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.evaluation import EvalConfig
from nemo_rl.errors import NemoRLError
from tiny_run import make_tiny_llama

EXAMPLE = Path(__file__).parents[2] / "examples" / "configs" / "evals" / "eval.yaml"
COIN = """
def reward(completion: str, ground_truth: str) -> float:
    return sum(map(ord, completion)) % 2
"""
SHARE = """
def reward(completion: str, ground_truth: str) -> float:
    if ground_truth == "2":
        raise ValueError("no verdict")
    return sum(letter in "aeiou" for letter in completion) / max(1, len(completion))
"""
HALF = """
def reward(completion: str, ground_truth: str) -> float:
    return 0.5
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    records = [{"problem": f"{number} + {number}?", "answer": str(2 * number)} for number in range(6)]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def settings(model: Path, problems: Path, folder: Path, *more: str, code: str | None = COIN) -> list[str]:
    chosen: list[str] = []
    if code is not None:
        folder.mkdir(exist_ok=True)
        (folder / "reward.py").write_text(code)
        chosen = [f"+env.coin={{type: function, path: '{folder / 'reward.py'}:reward'}}", "data.environment=coin"]
    return [
        f"generation.model_name={model}",
        "generation.temperature=1.0",
        "generation.max_new_tokens=5",
        "generation.vllm_cfg.max_model_len=64",
        "generation.vllm_cfg.precision=float32",
        "generation.device=cpu",
        f"data.dataset_name={problems}",
        "eval.num_tests_per_prompt=4",
        f"eval.save_path={folder}",
        "cluster.gpus_per_node=0",
        *chosen,
        *more,
    ]


def evaluate(arguments: list[str]) -> Evaluation:
    return launch_eval(load_config(EXAMPLE, arguments, EvalConfig))


def test_the_figure_is_that_of_the_samples_on_disk(model: Path, problems: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = evaluate(settings(model, problems, folder, "eval.k_value=2"))
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    by_problem = [[line["score"] for line in lines if line["index"] == index] for index in range(6)]
    assert [len(scores) for scores in by_problem] == [4] * 6
    tried = [fmean(max(pair) for pair in combinations(scores, 2)) for scores in by_problem]
    assert 0 < fmean(tried) < 1
    assert result.estimate.value == pytest.approx(fmean(tried))
    assert result.estimate.standard_error == pytest.approx(stdev(tried) / math.sqrt(6))
    assert f"pass@2      {fmean(tried):.4f} ± {stdev(tried) / math.sqrt(6):.4f}" in result.block
    assert str(folder / "samples.jsonl") in result.block
    rows = pyarrow.parquet.read_table(folder / "samples.parquet").to_pylist()
    assert [{**row, "rewards": dict(row["rewards"])} for row in rows] == lines
    assert json.loads((folder / "summary.json").read_text())["value"] == result.estimate.value
    assert load_config(folder / "config.yaml", [], EvalConfig).config.eval.k_value == 2


def test_an_answer_depends_on_its_problem_and_the_seed_alone(model: Path, problems: Path, tmp_path: Path) -> None:
    whole = evaluate(settings(model, problems, tmp_path / "a")).samples
    few = ["generation.max_batch_size=3", "data.num_samples=4"]
    one_by_one = evaluate(settings(model, problems, tmp_path / "b", *few, "eval.num_tests_per_prompt=4"))
    assert one_by_one.samples == whole[:16]
    other = evaluate(settings(model, problems, tmp_path / "c", "eval.seed=7")).samples
    assert [sample.reply for sample in other] != [sample.reply for sample in whole]
    assert len({sample.reply for sample in whole}) > 12


def test_a_problem_without_verdict_is_counted_and_in_no_figure(
    model: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = settings(model, problems, tmp_path / "out", "eval.metric=avg@n", code=SHARE)
    assert main(["eval", "--config", str(EXAMPLE), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "not judged  1 of 6 problems, which are in no figure" in shown
    scores = [sample.score for sample in read_samples(tmp_path / "out" / "samples.jsonl")]
    assert len(scores) == 20
    assert f"avg@4       {fmean(scores):.4f} ± " in shown


def test_a_benchmark_in_a_folder_runs_with_nemo_rls_command(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    record = {"question": "1 + 1?", "choices": ["1", "2"], "answer": 1, "subject": "algebra"}
    (tmp_path / "hub" / "test.jsonl").write_text(f"{json.dumps(record)}\n" * 2)
    out = tmp_path / "out"
    arguments = settings(model, tmp_path, out, "data.dataset_name=mmlu", f"data.path={tmp_path / 'hub'}", code=None)
    arguments += ["generation.vllm_cfg.max_model_len=120", "eval.metric=cons@k", "eval.k_value=4"]
    assert main(["eval", "--config", str(EXAMPLE), *arguments]) == 0
    samples = read_samples(out / "samples.jsonl")
    assert samples[0].ground_truth == "B"
    assert samples[0].problem.endswith("1 + 1?\n\nA) 1\nB) 2")
    assert "cons@4 " in capsys.readouterr().out


def test_two_evaluations_are_compared_problem_by_problem(
    model: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = tmp_path / "a", tmp_path / "b"
    evaluate(settings(model, problems, one))
    evaluate(settings(model, problems, other, "eval.seed=7"))
    capsys.readouterr()
    assert main(["eval", "--compare", str(one), str(other)]) == 0
    means = [
        [fmean(s.score for s in read_samples(folder / "samples.jsonl") if s.index == i) for i in range(6)]
        for folder in (one, other)
    ]
    differences = [second - first for first, second in zip(*means, strict=True)]
    error = stdev(differences) / math.sqrt(6)
    shown = capsys.readouterr().out
    assert f"{fmean(differences):+.4f} ± {error:.4f}, 95% confidence interval" in shown
    low, high = (float(end) for end in shown.split("[")[1].split("]")[0].split(","))
    assert (low, high) == pytest.approx(
        (fmean(differences) - 2.5706 * error, fmean(differences) + 2.5706 * error), abs=2e-4
    )
    assert 0 < error < 1
    assert main(["eval", "--compare", str(one), str(one)]) == 0
    assert "+0.0000 on every problem, so there is no spread" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(
    model: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(settings(model, problems, tmp_path / "a"))
    evaluate(settings(model, problems, tmp_path / "b", "eval.metric=avg@n"))
    assert main(["eval", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "pass@1 and avg@n" in capsys.readouterr().err
    assert main(["eval", "--compare", str(tmp_path / "a"), str(tmp_path)]) == 2
    assert "holds no finished evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "generation.backend=vllm",
            "generation.backend is vllm, which this version plans (--dry-run) but does not run",
        ),
        pytest.param(
            "generation.device=cuda",
            "generation.device is cuda and torch finds no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        ("generation.vllm_cfg.max_model_len=8", "raise it, or set data.too_long=skip"),
        ("data.prompt_file=no_such.txt", "cannot read data.prompt_file = no_such.txt"),
        ("data.dataset_name=no_such.jsonl", "no_such.jsonl does not exist"),
        ("generation.model_name=./no_such", "does not exist"),
        ("eval.save_path=/dev/null/x", "set eval.save_path to another folder"),
    ],
)
def test_bad_input_is_one_sentence(override: str, says: str, model: Path, problems: Path, tmp_path: Path) -> None:
    with pytest.raises(NemoRLError) as caught:
        evaluate(settings(model, problems, tmp_path / "out", override))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_graded_scores_have_no_pass_at_k_and_end_the_sampling(model: Path, problems: Path, tmp_path: Path) -> None:
    arguments = settings(model, problems, tmp_path / "out", "generation.max_batch_size=1", code=HALF)
    with pytest.raises(NemoRLError, match=r"use eval\.metric=avg@n \(the answers so far are in .*samples\.jsonl\)"):
        evaluate(arguments)
    assert len(read_samples(tmp_path / "out" / "samples.jsonl")) == 8


def test_nemo_rls_words_run_on_what_there_is(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "math500.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    words = (
        f"generation.model_name={model} generation.temperature=0.6 generation.top_p=0.95 "
        "generation.vllm_cfg.max_model_len=64 data.dataset_name=math500 eval.num_tests_per_prompt=16 "
        "cluster.gpus_per_node=8"
    )
    own = [f"data.path={tmp_path / 'math500.jsonl'}", f"eval.save_path={tmp_path / 'out'}", "env.math.num_workers=1"]
    assert main(["eval", "--config", str(EXAMPLE), *words.split(), *own]) == 0
    shown = capsys.readouterr().out
    assert (
        shown.count("cluster.gpus_per_node = 8, and generation.backend = hf samples in one process on one device") == 1
    )
    assert "answers     16 a problem at temperature 0.6" in shown
    assert len(read_samples(tmp_path / "out" / "samples.jsonl")) == 16
