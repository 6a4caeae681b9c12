"""Where files that can be made again are kept."""

import os
from collections.abc import Mapping
from pathlib import Path


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Folder for files that can be made again, such as unpacked models.

    `NEMO_RL_CACHE` if it is set, else `nemo_rl` in `XDG_CACHE_HOME`, else `~/.cache/nemo_rl`. It need not exist yet.
    """
    if own := environ.get("NEMO_RL_CACHE"):
        return Path(own).expanduser()
    return Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nemo_rl"
