"""Run the command line as `python -m cloudckpt`."""

from cloudckpt.cli import app

if __name__ == "__main__":
    app()
