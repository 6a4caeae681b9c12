"""Figures of judged answers with known values."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nemo_rl.algorithms.samples import Sample, append_samples, read_samples, scores_by_prompt, write_parquet
from nemo_rl.errors import DataError

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
