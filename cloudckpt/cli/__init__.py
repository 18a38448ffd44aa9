"""What a person types: the command `cloudckpt`."""

from cloudckpt.cli.commands import app

__all__ = [
    "app",
]
