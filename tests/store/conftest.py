"""Let the laws of the shared contract explain themselves when they fail, as those in test modules do."""

import pytest

pytest.register_assert_rewrite("tests.store.contract", "tests.store.engine_laws")
