"""Leave what takes hours to `make reliability`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability.records import FOLDER, IS_WHOLE


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the slow ones of this folder where no figures are made."""
    here = Path(__file__).parent
    for item in items:
        if not IS_WHOLE and here in item.path.parents and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason=f"make reliability sets {FOLDER}, and runs it"))
