import io
import itertools
import logging
import os
import pty
import re
from pathlib import Path

import pytest

from nemo_rl.observe.console import Console, Sample

COMMAND = "nemo-rl grpo --config results/a_run_with_a_long_name/config.yaml grpo.max_num_steps=80 grpo.seed=1234"


def show_a_run(console: Console) -> None:
    with console:
        console.note("8 prompts x 8 answers")
        for step in (1, 2):
            with console.phase("generate"):
                pass
            sample = Sample("What is 2 + 3?", f"{'word ' * 40}[bold]5\x1b[2J", "5", 1.0)
            console.step(
                step, figures={"reward": 0.25 * step, "accuracy": 0.5}, tokens_per_second=1234.0, sample=sample
            )
        console.finish(
            accuracy_before=0.26,
            accuracy_after=0.925,
            accuracy_base_best_prompt=0.39,
            rows={"checkpoint": "results/a/step_2", "continue": COMMAND},
        )


def on_a_terminal(width: int = 80) -> str:
    """What a terminal receives of the run, as written."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "w", encoding="utf-8") as stream, os.fdopen(master, "rb") as screen:
        show_a_run(Console(total_steps=4, sample_period=2, stream=stream, width=width))
        stream.flush()
        os.set_blocking(master, False)
        return (screen.read() or b"").decode()


@pytest.fixture(autouse=True)
def capable_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_in_a_pipe_each_step_is_one_plain_line() -> None:
    stream = io.StringIO()
    ticks = itertools.count(step=30.0)
    with Console(total_steps=40, first_step=10, stream=stream, clock=lambda: next(ticks)) as console:
        for step in (11, 12):
            console.step(step, figures={"reward": 0.625, "accuracy": 0.5}, tokens_per_second=1234.4)

    assert stream.getvalue().splitlines() == [
        "step 11/40  reward 0.62  accuracy 0.50  1,234 tokens/s  14:30 left",
        "step 12/40  reward 0.62  accuracy 0.50  1,234 tokens/s  14:00 left",
    ]


def test_in_a_pipe_no_control_character_is_written_even_if_the_model_replies_one() -> None:
    stream = io.StringIO()
    show_a_run(Console(total_steps=4, sample_period=2, stream=stream))

    text = stream.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert "[bold]5\\x1b[2J" in text
    assert text.count("problem") == 2
    assert COMMAND in text.splitlines()[-1]


def test_on_a_terminal_the_bar_is_live_and_nothing_is_lost_at_80_columns() -> None:
    screen = on_a_terminal()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)

    assert "━" in plain and "step 2/4" in plain and "reward 0.50   accuracy 0.50   1,234 tokens/s" in plain
    assert "…" not in plain
    assert plain.count("word") == 80
    assert "[bold]5\\x1b[2J" in plain and "\x1b[2J" not in screen
    assert "0.260 → 0.925" in plain and COMMAND in plain
    assert screen.endswith("\r\n") and screen.rfind("\x1b[?25h") > screen.rfind("\x1b[?25l") >= 0  # the cursor is back


def test_live_lines_fit_the_width() -> None:
    for width in (60, 80):
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", on_a_terminal(width))
        bars = [line for line in re.split(r"[\r\n]+", plain) if "━" in line]
        assert bars and all(len(line) <= width for line in bars)
        assert all("step" in line for line in bars) and any("left" in line for line in bars)


def test_a_stream_that_cannot_encode_a_reply_does_not_end_the_run(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w", encoding="ascii") as stream:
        console = Console(total_steps=1, stream=stream)
        console.step(1, figures={"reward": 1.0}, tokens_per_second=1.0, sample=Sample("2 + 3?", "五", "5", 1.0))
        console.finish(accuracy_before=0.1, accuracy_after=0.9, rows={})

    assert "\\u4e94" in (tmp_path / "log").read_text()
    assert "0.100 -> 0.900" in (tmp_path / "log").read_text()


def test_samples_come_after_the_first_step_and_every_period() -> None:
    stream = io.StringIO()
    with Console(total_steps=7, sample_period=3, stream=stream) as console:
        for step in range(1, 8):
            console.step(
                step, figures={"reward": 0.0}, tokens_per_second=1.0, sample=Sample(f"problem {step}", "", "", 0.0)
            )

    assert re.findall(r"problem +problem (\d)", stream.getvalue()) == ["1", "3", "6"]
    assert stream.getvalue().count("(empty)") == 3


def test_log_records_go_to_the_same_stream() -> None:
    stream = io.StringIO()
    console = Console(total_steps=1, stream=stream)
    logger = logging.Logger("nemo_rl.test")
    logger.addHandler(console.handler())
    logger.warning("a group was dropped")

    assert stream.getvalue() == "WARNING nemo_rl.test: a group was dropped\n"


def test_what_came_before_the_first_step_is_not_in_the_time_left() -> None:
    stream = io.StringIO()
    now = [0.0]
    with Console(total_steps=3, stream=stream, clock=lambda: now[0]) as console:
        now[0] = 500.0  # loading and evaluating
        console.begin_steps()
        now[0] = 510.0
        console.step(1, figures={"reward": 1.0}, tokens_per_second=1.0)

    assert stream.getvalue().splitlines() == ["step 1/3  reward 1.00  1 tokens/s  0:20 left"]
