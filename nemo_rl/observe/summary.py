"""What a run cost and what it reached: seconds and memory by phase, `summary.json`."""

import json
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nemo_rl.atomic import write_text_atomically
from nemo_rl.config.plan import size


class PhaseTimer:
    """Adds up wall seconds by phase. Time in a nested phase counts for that phase alone, so phases never overlap.

    >>> ticks = iter([0.0, 1.0, 2.0, 5.0, 7.0, 9.0])
    >>> timer = PhaseTimer(clock=lambda: next(ticks))
    >>> with timer.phase("train"):
    ...     with timer.phase("save"):
    ...         pass
    >>> timer.seconds
    {'train': 3.0, 'save': 3.0}
    >>> timer.total
    9.0
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._begun = clock()
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = self._begun
        self._memory: Callable[[], int] | None = None
        self._peaks: dict[str, int] = {}

    def watch(self, memory: Callable[[], int]) -> None:
        """Note the peak memory of phases from now on.

        Args:
            memory: the most bytes held since it was last asked; asked at both ends of every phase, until one fails.
        """
        self._memory = memory

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Count the time of the block for `name`, and its peak memory."""
        self._switch()
        self._open.append(name)
        self._seconds.setdefault(name, 0.0)
        try:
            yield
        except BaseException:
            self._memory = None  # whoever holds it may be gone
            raise
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        now = self._clock()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now
        if self._memory is not None:
            peak = self._memory()  # outside of phases too, so that it counts for none
            if self._open:
                self._peaks[self._open[-1]] = max(peak, self._peaks.get(self._open[-1], 0))

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase, of blocks already left, in order of first use."""
        return dict(self._seconds)

    @property
    def peak_memory_bytes(self) -> dict[str, int]:
        """The most memory by phase, of those that were watched."""
        return dict(self._peaks)

    @property
    def total(self) -> float:
        """Seconds since the timer was made, in phases or not."""
        return self._clock() - self._begun


def phase_table(seconds_by_phase: Mapping[str, float], seconds_total: float) -> list[tuple[str, float, float]]:
    """Name, seconds and share of the wall time of every phase, largest first; the rest of the time is `other`.

    >>> phase_table({"generate": 6.0, "train": 3.0}, 10.0)
    [('generate', 6.0, 0.6), ('train', 3.0, 0.3), ('other', 1.0, 0.1)]
    """
    rows = sorted(seconds_by_phase.items(), key=lambda row: -row[1])
    rows.append(("other", max(0.0, seconds_total - sum(seconds_by_phase.values()))))
    return [(name, seconds, seconds / seconds_total if seconds_total else 0.0) for name, seconds in rows]


def phase_line(seconds_by_phase: Mapping[str, float], seconds_total: float) -> str:
    """The phase table on one line.

    >>> phase_line({"generate": 60.0, "train": 30.0}, 100.0)
    '1:40 (generate 60%, train 30%, other 10%)'
    """
    shares = ", ".join(f"{name} {share:.0%}" for name, _, share in phase_table(seconds_by_phase, seconds_total))
    return f"{duration(seconds_total)} ({shares})"


def memory_line(bytes_by_phase: Mapping[str, int]) -> str:
    """Peaks of memory on one line, the largest first.

    >>> memory_line({"generate": 800_000_000, "train": 1_200_000_000})
    '1.2 GB (train 1.2 GB, generate 800 MB)'
    """
    rows = sorted(bytes_by_phase.items(), key=lambda row: -row[1])
    return f"{size(rows[0][1])} ({', '.join(f'{name} {size(count)}' for name, count in rows)})"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds for people.

    >>> duration(59.6), duration(3723)
    ('1:00', '1:02:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What `summary.json` says of a run.

    Attributes:
        accuracy_before: greedy accuracy on the held-out problems before the first step; None when not measured, or when
            no environment tells right from wrong.
        accuracy_after: the same after the last step.
        reward_before: mean reward of the same answers before the first step; None when not measured.
        reward_after: the same after the last step.
        validation_before: loss and accuracy of the validation before the first step, as far as they were measured.
        validation_after: the same after the last step.
        accuracy_base_best_prompt: of the untrained model with the best of the candidate prompts.
        steps: steps of the loop done.
        seconds_total: wall seconds of the run, loading included.
        seconds_by_phase: wall seconds per phase; phases do not overlap.
        tokens_per_second: sampled tokens per wall second of the training loop.
        peak_memory_bytes: the most that one process of the run has held, the policy's or the driver's.
        peak_memory_bytes_by_phase: the most that the policy's process has held in each phase, of its ranks the one that
            held most: on its GPU, or in resident memory where it has none.
        seed: the run's seed.
        extra: further figures, written beside the others.
    """

    accuracy_before: float | None
    accuracy_after: float | None
    accuracy_base_best_prompt: float | None
    reward_before: float | None
    reward_after: float | None
    steps: int
    seconds_total: float
    seconds_by_phase: Mapping[str, float]
    tokens_per_second: float
    peak_memory_bytes: int
    seed: int
    peak_memory_bytes_by_phase: Mapping[str, int] = field(default_factory=dict)
    validation_before: Mapping[str, float] = field(default_factory=dict)
    validation_after: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, float | str] = field(default_factory=dict)


def write_summary(path: Path, summary: Summary) -> None:
    """Write `summary` as JSON, whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    record = asdict(summary)
    extra = record.pop("extra")
    write_text_atomically(path, json.dumps({**record, **extra}, indent=2) + "\n")
