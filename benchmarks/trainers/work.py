"""Turn a size into a small network of about so many bytes of state, and a step into its batch.

AdamW has two values beside each weight, so that a third of the bytes are weights. Knows no framework and no checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import torch
from torch import nn

__all__ = ["batch", "fetched", "gpt_sizes", "local_steps", "network", "newest", "sent", "width_of"]

_VALUE_BYTES, _OF_ADAM = 4, 3
_LARGE_BYTES = 48 << 20


def width_of(size_bytes: int) -> int:
    return 1024 if size_bytes >= _LARGE_BYTES else 256


def network(size_bytes: int) -> nn.Sequential:
    """Return layers that with their AdamW have about so many bytes."""
    torch.manual_seed(1)
    width = width_of(size_bytes)
    count = max(1, round(size_bytes / (_VALUE_BYTES * _OF_ADAM * width * width)))
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


def gpt_sizes(size_bytes: int, *, values_per_layer: int = 12) -> dict[str, int]:
    """Return sizes of a GPT-2 whose layers have about `size_bytes` in `values_per_layer` times its width squared."""
    width = 512 if size_bytes >= _LARGE_BYTES else 128
    layers = max(1, round(size_bytes / (_VALUE_BYTES * values_per_layer * width * width)))
    return {"n_embd": width, "n_layer": layers, "n_head": 4, "vocab_size": 256, "n_positions": 32}


def batch(step: int, width: int) -> torch.Tensor:
    """Return what is trained on at a step: shape (2, width), float32."""
    return torch.randn(2, width, generator=torch.Generator().manual_seed(step))


def local_steps(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield number and path of all that stands in a folder under a name that ends with a number."""
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            digits = path.name[len(path.name.rstrip("0123456789")) :]
            if digits:
                yield int(digits), path


def newest(folder: Path | str) -> Path | None:
    """Return what has the highest number in a folder of this machine, as a loop of one's own would."""
    return max(local_steps(Path(folder)), default=(0, None))[1]


def sent(path: Path, url: str) -> None:
    """Copy a local folder below a URL, as one does who has no other way to a bucket."""
    filesystem, root = fsspec.url_to_fs(url)
    filesystem.put(str(path), f"{root}/{path.name}", recursive=True)


def fetched(url: str, folder: Path) -> None:
    """Copy what has the highest number below a URL into a local folder; nothing where there is nothing."""
    filesystem, root = fsspec.url_to_fs(url)
    with suppress(FileNotFoundError):
        names = [name for name in filesystem.ls(root, detail=False) if name[-1].isdigit()]
        if names:
            last = max(names, key=lambda name: int(name[len(name.rstrip("0123456789")) :]))
            filesystem.get(last, str(folder / Path(last).name), recursive=True)
