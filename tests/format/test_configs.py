"""A configuration of OmegaConf comes back as one, unresolved, with its flags; what is more than plain is refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import UnsupportedValueError
from cloudckpt.errors import ManifestError
from cloudckpt.format import codec

omegaconf: Any = pytest.importorskip("omegaconf")
OmegaConf = omegaconf.OmegaConf


def round_trip(value: Any) -> Any:
    return codec.decode(json.loads(json.dumps(codec.encode(value, key="cfg"))), key="cfg")


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"lr": 0.1, "layers": [1, 2, {"a": None}], "on": True, 3: "three"},
        {"a": 1, "b": "${a}", "home": "${oc.env:HOME}", "lacking": "???", "text": "x ${a} y"},
        [{"a": "${..b}"}, [b"bytes", Path("p")]],
    ],
)
def test_a_plain_configuration_comes_back_as_it_was(content: Any) -> None:
    made = OmegaConf.create(content)
    found = round_trip(made)
    assert type(found) is type(made)
    assert OmegaConf.to_container(found, resolve=False) == OmegaConf.to_container(made, resolve=False)
    assert codec.encode(found, key="cfg") == codec.encode(made, key="cfg")


def test_flags_come_back_on_the_nodes_that_have_them() -> None:
    made = OmegaConf.create({"a": {"b": {"c": 1}}, "l": [{"x": 1}]})
    OmegaConf.set_struct(made, True)
    OmegaConf.set_readonly(made.a.b, True)
    OmegaConf.set_readonly(made.l[0], False)
    found = round_trip(made)
    with pytest.raises(omegaconf.errors.ConfigAttributeError):
        _ = found.unknown
    with pytest.raises(omegaconf.errors.ReadonlyConfigError):
        found.a.b.c = 2
    found.l[0].x = 5
    assert codec.encode(round_trip(made), key="cfg") == codec.encode(made, key="cfg")


def test_a_part_keeps_what_it_inherits() -> None:
    made = OmegaConf.create({"a": {"b": 1}})
    OmegaConf.set_readonly(made, True)
    with pytest.raises(omegaconf.errors.ReadonlyConfigError):
        round_trip(made.a).b = 2


@dataclasses.dataclass
class Model:
    width: int = 3


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (lambda: OmegaConf.structured(Model), "types or nodes of its own"),
        (lambda: OmegaConf.create({"m": OmegaConf.structured(Model)}), "types or nodes of its own"),
        (lambda: OmegaConf.create({"a": 1, "b": {"c": "${a}"}}).b, "about the configuration that it is a part of"),
        (lambda: omegaconf.DictConfig(None), "it is None"),
        (lambda: omegaconf.DictConfig("${a}"), "it is None, missing or one interpolation"),
    ],
    ids=["structured", "structured-within", "part", "none", "interpolation"],
)
def test_what_is_more_than_plain_is_refused_by_name_with_the_way_out(value: Any, told: str) -> None:
    with pytest.raises(UnsupportedValueError, match=rf"^hparams\.cfg .*{told}.*to_container"):
        codec.encode({"cfg": value()}, key="hparams")


def test_nothing_is_resolved_and_a_state_takes_it_beside_tensors(tmp_path: Path) -> None:
    cfg = OmegaConf.create({"x": "${of_nobody:}", "y": "???"})  # an error for whoever resolves it
    cloudckpt.save({"hparams": {"cfg": cfg, "w": torch.ones(1)}}, tmp_path / "c", progress="off")
    state: dict[str, Any] = {"hparams": {"cfg": None, "w": torch.zeros(1)}}
    cloudckpt.load(state, tmp_path / "c", progress="off")
    assert OmegaConf.to_container(state["hparams"]["cfg"], resolve=False) == {"x": "${of_nobody:}", "y": "???"}


@pytest.mark.parametrize(
    "data",
    [
        {"content": [], "flags": []},
        {"content": {"a": "${a"}, "flags": []},
        {"content": {"a": 1}, "flags": [["b"], {"readonly": True}]},
        {"content": {"a": 1}, "flags": [[["b"], {"readonly": True}]]},
        {"content": {"a": 1}, "flags": [[[], {"readonly": 1}]]},
        {"content": {"a": 1}},
    ],
)
def test_foreign_data_are_a_manifest_error(data: Any) -> None:
    with pytest.raises(ManifestError, match=r"^cfg is no omegaconf\.DictConfig"):
        codec.decode({"$omegaconf.DictConfig": data}, key="cfg")


def test_where_omegaconf_is_missing_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    data = codec.encode(OmegaConf.create({"a": 1}), key="cfg")
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    with pytest.raises(
        UnsupportedValueError, match=r"cfg needs OmegaConf for a DictConfig.*install the package omegaconf"
    ):
        codec.decode(data, key="cfg")
