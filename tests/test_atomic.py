"""`atomic_folder`: killed at every single file operation, it leaves the previous folder or the new one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_rl.atomic import atomic_folder, recover_folders

WRITER = """
import os, signal, sys
from pathlib import Path
from nemo_rl.atomic import atomic_folder

final, countdown = Path(sys.argv[1]), int(sys.argv[2])
def kill_at_last(event, args):
    global countdown
    if event.startswith(("open", "os.", "shutil.")) and str(final.parent) in str(args):
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill_at_last)
with atomic_folder(final) as work:
    for name in ("a", "b"):
        (work / name).write_text("new")
"""


def _content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def _write(folder: Path, text: str) -> None:
    with atomic_folder(folder) as work:
        (work / "a").write_text(text)
        (work / "b").write_text(text)


def test_killed_at_any_instant_it_leaves_the_previous_folder_or_the_new_one(tmp_path: Path) -> None:
    outcomes: list[str] = []
    for instant in range(1, 100):
        parent = tmp_path / str(instant)
        _write(parent / "step_1", "old")
        killed = subprocess.run([sys.executable, "-S", "-c", WRITER, str(parent / "step_1"), str(instant)], check=False)
        recover_folders(parent)
        assert [path.name for path in parent.iterdir()] == ["step_1"]
        content = _content(parent / "step_1")
        assert content in ({"a": "old", "b": "old"}, {"a": "new", "b": "new"})
        outcomes.append(content["a"])
        if killed.returncode == 0:
            break
        assert killed.returncode == -signal.SIGKILL
    assert len(outcomes) > 10
    assert outcomes == sorted(outcomes, reverse=True)  # "old" up to one instant, "new" from then on
    assert outcomes[-1] == "new"


def test_an_exception_inside_leaves_the_previous_folder_and_no_trace(tmp_path: Path) -> None:
    _write(tmp_path / "step_1", "old")
    with pytest.raises(RuntimeError, match="half-way"), atomic_folder(tmp_path / "step_1") as work:
        (work / "a").write_text("new")
        raise RuntimeError("half-way")
    assert os.listdir(tmp_path) == ["step_1"]
    assert _content(tmp_path / "step_1") == {"a": "old", "b": "old"}
