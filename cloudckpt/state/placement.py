"""Say how a part of an optimizer's state lies on its parameter's mesh, and note what the parameter cannot tell.

Most state is placed like its parameter, or plain (a count of steps), and needs no note; means of rows do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch

from cloudckpt.format import JsonValue, PathElement
from cloudckpt.late import DTensor

if TYPE_CHECKING:
    from torch.distributed.tensor import Placement

__all__ = ["noted_placements", "placement_note", "usual_placements"]

Placements: TypeAlias = "tuple[Placement, ...]"


def usual_placements(
    parameter: torch.Tensor, shape: tuple[int, ...], below: Sequence[PathElement]
) -> Placements | None:
    """Return how state of which nothing was noted lies on the mesh of its parameter; None for a plain tensor.

    Args:
        parameter: whose state it is.
        shape: the state's full one.
        below: its path in the optimizer's state_dict.
    """
    if not isinstance(parameter, DTensor) or below[-1] == "step":  # torch keeps that a plain one
        return None
    if shape == tuple(parameter.size()):
        return parameter.placements
    from torch.distributed.tensor import Replicate

    # Of a checkpoint whose parameters were plain: ops of a DTensor take what every rank has whole beside any sharding.
    return (Replicate(),) * parameter.device_mesh.ndim if shape else None


def placement_note(parameter: torch.Tensor, part: torch.Tensor, below: Sequence[PathElement]) -> JsonValue:
    """Return what is to be noted of a part of the state of `parameter`; None if that is nothing."""
    placements = part.placements if isinstance(part, DTensor) else None
    if placements == usual_placements(parameter, tuple(part.size()), below):
        return None
    if not isinstance(part, DTensor):
        return {"placements": None}
    from torch.distributed.tensor import Shard

    axes = part.device_mesh.mesh_dim_names
    return {
        "placements": [placement.dim if type(placement) is Shard else None for placement in part.placements],
        "axes": None if axes is None else list(axes),
    }


def noted_placements(note: dict[str, JsonValue], parameter: DTensor, shape: tuple[int, ...]) -> Placements | None:
    """Return how a part of the state was placed, on the mesh that its parameter has here; None for a plain tensor.

    Axes of the two meshes are matched by their names, else by their places. Along an axis that only this mesh has,
    every rank has all of it.
    """
    from torch.distributed.tensor import Replicate, Shard

    saved, axes, mesh = note["placements"], note.get("axes"), parameter.device_mesh
    if not isinstance(saved, list):
        return None
    if isinstance(axes, list) and mesh.mesh_dim_names and len(axes) == len(saved):
        by_axis = {str(axis): placement for axis, placement in zip(axes, saved, strict=True)}
        saved = [by_axis.get(axis) for axis in mesh.mesh_dim_names]
    elif len(saved) != mesh.ndim:
        saved = [None] * mesh.ndim
    return tuple(Shard(axis) if isinstance(axis, int) and 0 <= axis < len(shape) else Replicate() for axis in saved)
