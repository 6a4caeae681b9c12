"""Fixtures that several folders of tests share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of a few thousand weights with a real tokenizer; see `tiny_run`."""
    # not at the top: tests/gpu runs on machines that lack what whole runs need
    from tiny_run import make_tiny_llama  # pyright: ignore[reportImplicitRelativeImport]

    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")
