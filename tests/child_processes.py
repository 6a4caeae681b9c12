"""The processes that a test starts."""

import psutil

_others: set[psutil.Process] = set()


def forget_other_processes() -> None:
    """Leave out of `spawned` what runs now: other tests of this process may have left a fork server or the like."""
    _others.clear()
    _others.update(psutil.Process().children(recursive=True))


def spawned(*, recursive: bool = False) -> list[psutil.Process]:
    """Child processes started since."""
    return [child for child in psutil.Process().children(recursive=recursive) if child not in _others]
