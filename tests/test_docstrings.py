"""What the public names say of themselves matches what they take and hold."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator

import pytest

import cloudckpt

PUBLIC = {name: getattr(cloudckpt, name) for name in cloudckpt.__all__}


def _callables() -> Iterator[tuple[str, object]]:
    for name, value in PUBLIC.items():
        if inspect.isfunction(value):
            yield name, value
        for attribute, found in vars(value).items() if inspect.isclass(value) else ():
            if inspect.isfunction(found) and (attribute == "__init__" or not attribute.startswith("_")):
                yield f"{name}.{attribute}", found


CALLABLES = dict(_callables())


@pytest.mark.parametrize("name", [name for name, call in CALLABLES.items() if "Args:" in (call.__doc__ or "")])
def test_a_docstring_with_arguments_speaks_of_each_parameter_in_order_and_of_no_other(name: str) -> None:
    doc = inspect.cleandoc(str(CALLABLES[name].__doc__))
    section = re.search(r"^Args:\n((?: {4}.*\n?|\n)*)", doc, re.MULTILINE)
    told = re.findall(r"^ {4}(\w+): ", section[1] if section else "", re.MULTILINE)
    assert told == [parameter for parameter in inspect.signature(CALLABLES[name]).parameters if parameter != "self"]


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if dataclasses.is_dataclass(value)])
def test_a_value_says_what_each_of_its_fields_is(name: str) -> None:
    doc = PUBLIC[name].__doc__
    untold = [
        field.name
        for field in dataclasses.fields(PUBLIC[name])
        if not re.search(rf"^ +{field.name}: |`{field.name}`", doc, re.MULTILINE)
    ]
    assert untold == []


def test_a_public_name_and_each_of_its_own_members_say_something() -> None:
    silent = [
        f"{name}.{member}"
        for name, value in PUBLIC.items()
        for member, found in [("", value), *(vars(value).items() if inspect.isclass(value) else ())]
        if not member.startswith("_") and (callable(found) or isinstance(found, property)) and not inspect.getdoc(found)
    ]
    # `keep` is told of once, on the protocol that the rules implement.
    assert [one for one in silent if not re.match(r"Keep\w+\.keep$", one)] == []
