"""Figures of judged answers with known values."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from nemo_rl.algorithms.samples import (
    SAMPLES,
    SUMMARY,
    Sample,
    append_samples,
    compare,
    read_samples,
    render_estimate,
    scores_by_prompt,
    write_parquet,
)
from nemo_rl.errors import ConfigError, DataError
from nemo_rl.objectives.estimates import mean_estimate

BLANK = Sample(0, 0, "1 + 1?", "It is 2.", "2", "2", 1.0, "stop", 4, {"reward": 1.0})


def answers(*extracted: str | None, index: int = 0) -> list[Sample]:
    return [
        replace(BLANK, index=index, sample=number, extracted=text, score=float(text == "2"))
        for number, text in enumerate(extracted)
    ]


def test_pass_avg_and_cons_of_the_same_answers() -> None:
    samples = [*answers("2", "3", "3", None), *answers("2", "2", "2", "3", index=1)]
    first, second = (0, "1 + 1?"), (1, "1 + 1?")
    assert scores_by_prompt("pass@k", 2, samples) == pytest.approx({first: 1 - 3 / 6, second: 1.0})
    assert scores_by_prompt("avg@n", 1, samples) == pytest.approx({first: 0.25, second: 0.75})
    assert scores_by_prompt("cons@k", 4, samples) == pytest.approx({first: 0.0, second: 1.0})
    votes = [(2 * 0.5 + 1 + 3 * 0) / 6, (3 * 1 + 3 * 0.5) / 6]  # 2 3, 2 3, 2 -, then 3 3, 3 -, 3 -
    assert scores_by_prompt("cons@k", 2, samples) == pytest.approx({first: votes[0], second: votes[1]})


def test_wrong_answers_vote_together_where_they_say_the_same() -> None:
    def consensus(*wrong: str) -> float:
        return scores_by_prompt("cons@k", 5, answers("2", "2", *wrong))[0, "1 + 1?"]

    assert consensus("0.50", "1/2", "\\frac{1}{2}") == 0
    assert consensus("0", "0.0", "0.00") == 0
    assert consensus("x = 3\\,\\pi", "3 \\pi", "3\\pi.") == 0
    assert consensus("\\left( 1, 2\\right)", "(1,2)", "$(1,2)$") == 0
    assert consensus("(1, 2)", "(1, 3)", "(1,2)") == 0.5
    assert consensus("0.5", "0.51", "0.52") == 1


def test_what_is_written_is_read(tmp_path: Path) -> None:
    samples = [replace(BLANK, reply="line\u2028break\x85\n", extracted=None), replace(BLANK, sample=1, reply="\ud800")]
    append_samples(tmp_path / "s.jsonl", samples[:1])
    append_samples(tmp_path / "s.jsonl", samples[1:])
    read = read_samples(tmp_path / "s.jsonl")
    assert read[0] == samples[0]
    assert asdict(read[1]) == asdict(samples[1]) | {"reply": "?"}
    write_parquet(tmp_path / "s.parquet", samples[:1])


def test_a_torn_line_is_named(tmp_path: Path) -> None:
    append_samples(tmp_path / "s.jsonl", [BLANK])
    with (tmp_path / "s.jsonl").open("a") as file:
        file.write('{"index": 1')
    with pytest.raises(DataError, match="line 2 is no answer"):
        read_samples(tmp_path / "s.jsonl")
    with pytest.raises(DataError, match="cannot read"):
        read_samples(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1.0], "1.0000 on the one problem, so there is no standard error"),
        ([0.5, 0.5], "0.5000 on each of 2 problems, so there is no spread"),
        ([0.0, 1.0], "0.5000 ± 0.5000 (standard error over 2 problems)"),
    ],
)
def test_an_estimate_is_shown_with_the_error_that_it_has(values: list[float], shown: str) -> None:
    assert render_estimate(mean_estimate(torch.tensor(values))) == shown


def test_the_k_that_avg_does_not_use_is_not_compared(tmp_path: Path) -> None:
    for k in (1, 4):
        folder = tmp_path / str(k)
        folder.mkdir()
        (folder / SUMMARY).write_text(json.dumps({"metric": "avg@n", "k_value": k}))
        append_samples(folder / SAMPLES, [*answers("2", "3"), *answers("2", "2" if k == 4 else "3", index=1)])
    comparison = compare(tmp_path / "1", tmp_path / "4")
    assert (comparison.metric, comparison.first, comparison.second) == ("avg@n", 0.5, 0.75)
    (tmp_path / "1" / SUMMARY).write_text(json.dumps({"metric": "pass@k", "k_value": 2}))
    with pytest.raises(ConfigError, match="measured pass@2 and avg@n; give both the same"):
        compare(tmp_path / "1", tmp_path / "4")
