"""`cloudckpt show`: what is in one checkpoint."""

from __future__ import annotations

import json

import typer

from cloudckpt.cli.asking import AsJson, Engine, StorageOptions, Url, nothing_at, opened, the_one_at
from cloudckpt.cli.printing import in_utc, print_table, short, summary
from cloudckpt.format import Index
from cloudckpt.loading import read_index
from cloudckpt.root import Checkpoint, Roots

__all__ = ["show"]


def show(url: Url, *, storage_options: StorageOptions = None, engine: Engine = "auto", as_json: AsJson = False) -> None:
    """Show one checkpoint: its manifest, tensors and values; of a root, the newest."""
    with opened(url, storage_options, engine) as catalog:
        checkpoint = the_one_at(catalog) or Roots([catalog]).newest()
        if checkpoint is None:
            raise nothing_at(catalog)
        index = read_index(catalog, checkpoint)
        if as_json:
            found = {**summary(checkpoint), "tensors": _tensors(index), "values": index.values}
            typer.echo(json.dumps({**found, "environment": checkpoint.manifest.environment}))
        else:
            _print(checkpoint, index)


def _tensors(index: Index) -> dict[str, dict[str, object]]:
    counts = index.piece_counts()
    return {
        name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "chunks": counts[name]}
        for name, tensor in index.tensors.items()
    }


def _print(checkpoint: Checkpoint, index: Index) -> None:
    facts = {**summary(checkpoint), "created_at": f"{in_utc(checkpoint.created_at)} UTC"}
    rows = [(name, str(value)) for name, value in {**facts, **checkpoint.manifest.environment}.items()]
    print_table(checkpoint.url, (), rows)
    tensors = [(name, *map(str, facts.values())) for name, facts in _tensors(index).items()]
    print_table("tensors", ("name", "dtype", "shape", "chunks"), tensors)
    values = [(name, short(json.dumps(value))) for name, value in index.values.items()]
    print_table("values", ("name", "value"), values)
