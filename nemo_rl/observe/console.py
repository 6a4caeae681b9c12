"""What a person sees of a run: a live bar on a terminal, plain lines in a pipe or a CI log, the outcome at the end."""

import io
import logging
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TextIO

import rich.console
from rich.live import Live
from rich.logging import RichHandler
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nemo_rl.observe.summary import duration

_WIDEST_BAR = 100
_LONGEST_FIELD = 800


@dataclass(frozen=True, slots=True)
class Sample:
    """One rollout as text: the problem, what the policy replied, what was expected (may be empty), its reward."""

    problem: str
    reply: str
    expected: str
    reward: float


class Console:
    """Shows the progress of `total_steps` steps; a context manager, so that the terminal is left as it was found.

    On a terminal two lines stay at the bottom: a bar with the time left, and the latest figures with the phase at work.
    Everything else scrolls above them. Where the stream is no terminal each step is one plain line without control
    characters.

    Args:
        total_steps: steps of the whole run.
        first_step: steps that an earlier start of the run has already done.
        sample_period: print a sample after the first step and every so many steps (0: never).
        stream: where to write; standard output by default.
        width: columns; those of the terminal by default.
        clock: seconds, for the time left.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        first_step: int = 0,
        sample_period: int = 5,
        stream: TextIO | None = None,
        width: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        out: TextIO = stream or sys.stdout
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="backslashreplace")  # a reply in a script the terminal lacks must not end the run
        self._rich = rich.console.Console(file=out, force_terminal=out.isatty(), width=width, highlight=False)
        self._interactive = out.isatty() and not self._rich.is_dumb_terminal
        self._total_steps = total_steps
        self._first_step = first_step
        self._sample_period = sample_period
        self._clock = clock
        self._step = first_step
        self._step_ended = clock()
        self._step_seconds: deque[float] = deque(maxlen=10)
        self._figures: list[str] = []
        self._phases: list[tuple[str, float]] = []
        self._work: tuple[str, int, int] | None = None
        self._live = Live(console=self._rich, get_renderable=self._view, refresh_per_second=4)

    def __enter__(self) -> "Console":
        if self._interactive:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._phases.clear()
        self._live.stop()

    def handler(self) -> logging.Handler:
        """A logging handler whose records appear above the bar."""
        if self._interactive:
            handler: logging.Handler = RichHandler(console=self._rich, show_path=False, log_time_format="%H:%M:%S")
            handler.setFormatter(logging.Formatter("%(message)s"))
        else:
            handler = logging.StreamHandler(self._rich.file)
            handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        return handler

    def note(self, text: str) -> None:
        """Say something above the bar, on a line of its own."""
        self._rich.print(Text(_printable(text)), soft_wrap=not self._interactive)

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Show on a terminal that `name` is at work, and for how long."""
        self._phases.append((name, self._clock()))
        try:
            yield
        finally:
            del self._phases[-1:]

    def track[Item](self, items: Iterable[Item], name: str, total: int) -> Iterator[Item]:
        """Go through `total` items; on a terminal a bar of its own shows how many there were."""
        try:
            for done, item in enumerate(items):
                self._work = (name, done, total)
                yield item
        finally:
            self._work = None

    def begin_steps(self) -> None:
        """Start the clock of the steps, so that what came before them does not count in the time left."""
        self._step_ended = self._clock()

    def step(
        self,
        step: int,
        *,
        figures: Mapping[str, float],
        tokens_per_second: float,
        sample: Sample | None = None,
    ) -> None:
        """Show that `step` steps are done, the latest figures by name and, when it is due, the sample."""
        now = self._clock()
        self._step_seconds.append(now - self._step_ended)
        self._step, self._step_ended = step, now
        self._figures = [f"{name} {value:.2f}" for name, value in figures.items()]
        self._figures.append(f"{tokens_per_second:,.0f} tokens/s")
        if not self._interactive:
            self.note("  ".join([f"step {step}/{self._total_steps}", *self._figures, self._time_left()]).rstrip())
        due = self._sample_period and (step == 1 or step % self._sample_period == 0)
        if sample is not None and due:
            self._print_sample(step, sample)

    def finish(
        self,
        *,
        accuracy_before: float | None,
        accuracy_after: float | None,
        accuracy_base_best_prompt: float | None = None,
        reward_before: float | None = None,
        reward_after: float | None = None,
        validation_before: Mapping[str, float] = MappingProxyType({}),
        validation_after: Mapping[str, float] = MappingProxyType({}),
        rows: Mapping[str, str],
    ) -> None:
        """Take the bar away and print the outcome: accuracies, then `rows` (label to path, command or remark).

        The rewards have a row where they say something else than the accuracies, and so has each figure of the
        validation.

        A row is never cut or folded, so that a path or a command can be copied whole.
        """
        self.__exit__()
        outcome: dict[str, str] = {}
        if accuracy_after is not None:
            outcome["accuracy"] = self._change(accuracy_before, accuracy_after)
        if reward_after is not None and (reward_before, reward_after) != (accuracy_before, accuracy_after):
            outcome["reward"] = self._change(reward_before, reward_after)
        if accuracy_base_best_prompt is not None:
            outcome["base, best prompt"] = f"{accuracy_base_best_prompt:.3f}"
        for name, after in validation_after.items():
            outcome[f"validation {name}"] = self._change(validation_before.get(name), after)
        outcome |= rows
        width = max(map(len, outcome))
        self._rich.print()
        for label, text in outcome.items():
            style = "bold green" if label == "accuracy" or label.startswith("validation ") else ""
            line = Text.assemble((label.ljust(width + 2), "dim"), (_printable(text), style))
            self._rich.print(line, soft_wrap=True)

    def _change(self, before: float | None, after: float) -> str:
        arrow = "→" if self._rich.encoding.startswith("utf") else "->"
        return f"{after:.3f}" if before is None else f"{before:.3f} {arrow} {after:.3f}"

    def _print_sample(self, step: int, sample: Sample) -> None:
        fields = {
            "problem": sample.problem,
            "reply": sample.reply or "(empty)",
            "expected": sample.expected,
            "reward": f"{sample.reward:.2f}",
        }
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in fields.items():
            shown = Text(_shortened(_printable(text)), "green" if label == "reward" and sample.reward > 0 else "")
            if shown:
                table.add_row(f"step {step}" if label == "problem" else "", label, shown)
        self._rich.print(table)
        self._rich.print()

    def _time_left(self) -> str:
        left = self._total_steps - self._step
        if not self._step_seconds or left <= 0:
            return ""
        return f"{duration(statistics.median(self._step_seconds) * left)} left"

    def _view(self) -> rich.console.RenderableType:
        width = min(self._rich.width, _WIDEST_BAR)
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        bar.add_row(
            f"step {self._step}/{self._total_steps}",
            ProgressBar(total=self._total_steps, completed=self._step, complete_style="cyan"),
            Text(self._time_left(), "dim"),
        )
        if self._work is not None:
            name, done, total = self._work
            bar.add_row(name, ProgressBar(total=total, completed=done, complete_style="cyan"), f"{done:,}/{total:,}")
        bar.width = width
        figures = Text("   ".join(self._figures))
        for name, since in self._phases[-1:]:
            figures.append("   " if self._figures else "").append(f"{name} {self._clock() - since:.0f} s", "dim cyan")
        return rich.console.Group(bar, figures)


def _printable(text: str) -> str:
    """Show control characters (a model may well reply some) by their escapes instead of obeying them."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def _shortened(text: str) -> str:
    rest = len(text) - _LONGEST_FIELD
    return text if rest <= 0 else f"{text[:_LONGEST_FIELD]} ... ({rest} more characters)"
