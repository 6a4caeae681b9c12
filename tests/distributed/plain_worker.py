"""A worker that imports nothing of Ray, in a module of its own that an actor imports."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from typing import Any

from nemo_rl.errors import DataError


class Counter:
    def __init__(self, start: int = 0, fail: bool = False) -> None:
        if fail:
            raise DataError("no such data set")
        self.seen = [start]
        self.loop: asyncio.AbstractEventLoop | None = None
        self.running = 0

    def add(self, value: int, seconds: float = 0.0) -> list[int]:
        self.running += 1
        assert self.running == 1, "calls overlap"
        time.sleep(seconds)
        self.seen.append(value)
        self.running -= 1
        return list(self.seen)

    async def add_async(self, value: int) -> bool:
        await asyncio.sleep(0.01)
        self.seen.append(value)
        same_loop = self.loop in (None, asyncio.get_running_loop())
        self.loop = asyncio.get_running_loop()
        return same_loop

    def echo(self, value: Any) -> Any:
        return value

    def pid(self) -> int:
        return os.getpid()

    def getenv(self, name: str) -> str | None:
        return os.environ.get(name)

    def grad_enabled(self) -> bool:
        import torch

        return torch.is_grad_enabled()

    def bad_data(self) -> None:
        raise DataError("record 3 has no answer")

    def bug(self) -> None:
        raise ZeroDivisionError("of my own")

    def spawn(self) -> int:
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid

    def imported(self, module: str) -> bool:
        return module in sys.modules

    def lock(self) -> Any:
        return threading.Lock()

    def leave(self, exit_code: int) -> None:
        sys.exit(exit_code)
