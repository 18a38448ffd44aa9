import pytest

from cloudckpt.integrations.framework import framework


@pytest.mark.parametrize(
    ("package", "lowest", "what"),
    [
        ("no-such-framework", "1.0", r"no-such-framework is not installed: pip install 'cloudckpt\[some\]'"),
        ("torch", "99.1", r"torch \S+ is too old: .*run with torch 99\.1"),
    ],
)
def test_a_framework_that_is_missing_or_too_old_is_named_with_what_to_install(
    package: str, lowest: str, what: str
) -> None:
    with pytest.raises(ImportError, match=what), framework(package, lowest=lowest, extra="some"):
        pytest.fail("what needs it must not run")


def test_a_framework_that_lacks_a_name_is_named_with_what_it_lacks() -> None:
    with (
        pytest.raises(ImportError, match=r"torch \S+ lacks what is needed .*no_such_name.*pip install"),
        framework("torch", lowest="2.0", extra="some"),
    ):
        from torch import no_such_name  # noqa: F401


def test_what_is_new_enough_is_let_be() -> None:
    with framework("torch", lowest="2.6", extra="some"):
        pass
