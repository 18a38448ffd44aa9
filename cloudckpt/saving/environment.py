"""Describe the job that saves, for the record in its manifests: versions, platform, device and data path.

Read once per process; names no credential and no user.
"""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata

import torch

__all__ = ["environment"]

_PACKAGES = ("cloudckpt", "torch", "numpy", "fsspec", "s3fs", "gcsfs", "obstore", "msgspec", "tenacity", "xxhash")


def environment(root_url: str, data_path: str) -> dict[str, str]:
    """Return the environment record of this process for a root and the engine that moves its bytes."""
    return {**_of_process(), "root": root_url, "data_path": data_path}


@cache
def _of_process() -> dict[str, str]:
    # To find the versions, Python parses what each package says of itself, its whole page of description included.
    return {
        **{f"package.{name}": version for name in _PACKAGES if (version := _version(name))},
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": _platform(),
        "machine": platform.machine(),
        "device": _device(),
    }


def _platform() -> str:
    """Return system, release, machine and C library, without another process."""
    # `platform.platform()` runs `uname -p`. In a save's thread that can wait for ever: a worker of a DataLoader that
    # the main thread forks at that moment inherits the pipe whose end the start of `uname` waits for.
    library = "".join(platform.libc_ver())
    return "-".join(filter(None, (platform.system(), platform.release(), platform.machine(), library)))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu ({torch.get_num_threads()} threads)"
