"""The most memory that this process has held."""

import resource
import sys
from contextlib import suppress
from pathlib import Path


def peak_memory_bytes() -> int:
    """The most resident memory, or the most that torch has held on this process's GPU where that is more."""
    return max(_peak_resident_bytes(), _peak_device_bytes())


def _peak_resident_bytes() -> int:
    with suppress(OSError, StopIteration):  # Linux: `getrusage` would count what the parent held at the fork, too
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _peak_device_bytes() -> int:
    import torch  # here, because a process without a model may do without it

    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
