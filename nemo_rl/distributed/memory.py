"""The most memory that this process has held, in all and phase by phase."""

import resource
import sys
from contextlib import suppress
from pathlib import Path


def peak_memory_bytes() -> int:
    """The most resident memory, or the most that torch has held on this process's GPU where that is more."""
    return max(_peak_resident_bytes(), _peak_device_bytes())


class PeakMemory:
    """Tells the most memory that this process has held since it was last asked: the peak of each phase."""

    def __init__(self) -> None:
        self._highest = 0

    def take(self) -> int:
        """The most bytes on the process's GPU since the last call, or in resident memory where it uses none.

        Where the system does not let the resident peak be reset, it is that of the whole life of the process.
        """
        self._highest = self.highest
        if device := _peak_device_bytes():
            import torch

            torch.cuda.reset_peak_memory_stats()
            return device
        resident = _peak_resident_bytes()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is what there is now
        return resident

    @property
    def highest(self) -> int:
        """The most of all (`peak_memory_bytes`), however often `take` was called."""
        return max(self._highest, peak_memory_bytes())


def _peak_resident_bytes() -> int:
    with suppress(OSError, StopIteration):  # Linux: `getrusage` would count what the parent held at the fork, too
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _peak_device_bytes() -> int:
    import torch  # here, because a process without a model may do without it

    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
