"""What stands for a type of PyTorch says of every value what the real type says, and imports nothing to say no."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cloudckpt import late
from tests.programs import run_to_end


def _real(name: str) -> type:
    found: type = getattr(importlib.import_module(getattr(late, name).place), name)
    return found


@pytest.mark.parametrize("name", late.__all__)
def test_the_real_type_is_where_it_is_said_to_be(name: str) -> None:
    assert issubclass(_real(name), getattr(late, name))
    assert not issubclass(torch.Tensor, getattr(late, name))
    assert not isinstance(torch.ones(1), getattr(late, name))


def test_an_instance_of_the_real_type_is_one() -> None:
    with FakeTensorMode():
        assert isinstance(torch.ones(2), late.FakeTensor)


def test_a_question_imports_nothing() -> None:
    program = (
        "import sys, torch; from cloudckpt import late\n"
        "assert not isinstance(torch.ones(1), (late.DTensor, late.FSDPModule, late.DefaultSavePlanner))\n"
        "assert 'torch.distributed.tensor' not in sys.modules and 'torch.distributed.fsdp' not in sys.modules"
    )
    done: subprocess.CompletedProcess[str] = run_to_end([sys.executable, "-c", program])

    assert done.returncode == 0, done.stderr
