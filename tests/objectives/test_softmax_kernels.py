"""The Triton kernels of the head compute its formula; here Triton interprets them, a GPU compiles them (tests/gpu)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_kernels_of_the_head_are_its_formula() -> None:
    pytest.importorskip("triton")
    script = Path(__file__).parent.parent / "tiny_kernels.py"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
