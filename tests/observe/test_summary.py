import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_rl.observe.summary import PhaseTimer, Summary, memory_line, write_summary


def test_phases_never_count_a_second_twice() -> None:
    now = [0.0]
    timer = PhaseTimer(clock=lambda: now[0])

    def work(seconds: float) -> None:
        now[0] += seconds

    with timer.phase("generate"):
        work(2)
    work(1)
    with timer.phase("train"):
        work(3)
        with timer.phase("save"):
            work(5)
            with timer.phase("train"):
                work(7)
        work(11)
    with pytest.raises(KeyboardInterrupt), timer.phase("generate"):
        work(13)
        raise KeyboardInterrupt

    assert timer.seconds == {"generate": 15.0, "train": 21.0, "save": 5.0}
    assert timer.total == 42.0


def test_each_phase_has_the_most_memory_of_its_own_time() -> None:
    held = [0]

    def take() -> int:
        most, held[0] = held[0], 0
        return most

    def work(count: int) -> None:
        held[0] = max(held[0], count)

    timer = PhaseTimer()
    with timer.phase("load"):
        work(7)
        timer.watch(take)
    work(100)  # between phases
    for count in (3, 5, 4):
        with timer.phase("train"):
            work(count)
            with timer.phase("save"):
                work(10 * count)
    assert timer.peak_memory_bytes == {"load": 7, "train": 5, "save": 50}
    assert memory_line(timer.peak_memory_bytes) == "0 MB (save 0 MB, load 0 MB, train 0 MB)"
    with pytest.raises(ZeroDivisionError), timer.phase("train"):
        raise ZeroDivisionError
    with timer.phase("train"):
        work(1000)  # after a failure nobody is asked
    assert timer.peak_memory_bytes["train"] == 5


def test_peak_memory_is_told_phase_by_phase() -> None:
    program = """
from nemo_rl.distributed.memory import PeakMemory
memory = PeakMemory()
before = memory.take()
block = b"x" * (64 << 20)
del block
print(before, memory.take(), memory.take(), memory.highest)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, large, small, highest = map(int, ran.stdout.split())
    assert large - before > 60 << 20
    assert highest == large
    if Path("/proc/self/clear_refs").exists():
        assert small < large - (60 << 20)


def test_peak_memory_is_in_bytes_and_outlives_what_it_measured() -> None:
    program = """
from nemo_rl.distributed.memory import peak_memory_bytes
before = peak_memory_bytes()
block = b"x" * (before + (64 << 20))
del block
print(before, peak_memory_bytes())
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = map(int, ran.stdout.split())

    assert 4 << 20 < before < 1 << 30
    assert after - before > 60 << 20


def test_summary_has_the_promised_keys_and_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "run" / "summary.json"
    for after in (0.5, 0.925):
        summary = Summary(
            accuracy_before=0.26,
            accuracy_after=after,
            accuracy_base_best_prompt=None,
            reward_before=0.25,
            reward_after=0.75,
            validation_before={"loss": 3.5},
            steps=40,
            seconds_total=271.5,
            seconds_by_phase={"generate": 130.0, "train": 120.0},
            tokens_per_second=312.0,
            peak_memory_bytes=3 << 30,
            peak_memory_bytes_by_phase={"train": 2 << 30},
            seed=42,
            extra={"model": "SmolLM2-135M-Instruct"},
        )
        write_summary(path, summary)

    assert json.loads(path.read_text()) == {
        "accuracy_before": 0.26,
        "accuracy_after": 0.925,
        "accuracy_base_best_prompt": None,
        "reward_before": 0.25,
        "reward_after": 0.75,
        "validation_before": {"loss": 3.5},
        "validation_after": {},
        "steps": 40,
        "seconds_total": 271.5,
        "seconds_by_phase": {"generate": 130.0, "train": 120.0},
        "tokens_per_second": 312.0,
        "peak_memory_bytes": 3 << 30,
        "peak_memory_bytes_by_phase": {"train": 2 << 30},
        "seed": 42,
        "model": "SmolLM2-135M-Instruct",
    }
    assert [entry.name for entry in path.parent.iterdir()] == ["summary.json"]
