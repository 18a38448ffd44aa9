"""Turn the interrupted run of the demo into `report.png`: train it on SeaweedFS, kill it thrice, photograph its page.

    python docs/picture.py

Needs a browser; what it shows is of the run that has just been, on the store that it was saved to.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "report.png"
WIDTH, HEIGHT = 1000, 1290
sys.path[:0] = [str(ROOT / "examples"), str(ROOT)]

from demo import SCRIPT, Size, interruptions_for, job_for  # noqa: E402 (their folders are put on the path above)
from runs import run  # noqa: E402
from target import seaweedfs_target  # noqa: E402

import cloudckpt  # noqa: E402
from tests.page import browser  # noqa: E402


def main() -> int:
    """Take the picture, and return the status to exit with."""
    argparse.ArgumentParser(description="Write docs/report.png, the page of the demo's run.").parse_args()
    program = browser.found()
    if program is None:
        print(f"no browser is on the path: one of {', '.join(browser.NAMES)}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="cloudckpt-picture-") as name, seaweedfs_target() as target:
        folder = Path(name)
        run(job_for(SCRIPT, target, "b", Size(), folder), interruptions_for(Size()))
        page = folder / "report.html"
        page.write_text(cloudckpt.report_page(target.root("b"), storage_options=dict(target.storage_options)))
        with browser.Browser.opened(program, folder / "profile") as window:
            window.open(page)
            PICTURE.write_bytes(window.look(width=WIDTH, height=HEIGHT, scheme="light"))
    print(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
