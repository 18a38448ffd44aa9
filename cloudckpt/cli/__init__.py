"""What a person types: the command `cloudckpt`, a module a command."""

from cloudckpt.cli.main import app

__all__ = ["app"]
