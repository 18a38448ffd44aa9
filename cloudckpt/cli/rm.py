"""`cloudckpt rm`: remove checkpoints by their steps."""

from __future__ import annotations

from typing import Annotated

import typer

from cloudckpt.cli.asking import Access, AsJson, Root, Yes, ended
from cloudckpt.cli.removing import DryRun, Grace, carry_out
from cloudckpt.root import Thinning

__all__ = ["rm"]

_Force = Annotated[bool, typer.Option("--force", help="With --yes: also the newest, the last, or one in use.")]


def rm(
    url: Root,
    steps: Annotated[list[int], typer.Argument(metavar="STEP...", help="Of each the newest checkpoint.")],
    *,
    access: Access,
    dry_run: DryRun = False,
    yes: Yes = False,
    force: _Force = False,
    grace: Grace = 60.0,
    as_json: AsJson = False,
) -> None:
    """Remove the checkpoints of these steps, also what nobody can read; a pinned one is refused.

    The manifests go first, and the objects after the grace time, so that whoever reads one can end that.
    """
    with access.opened(url) as catalog:
        thinning = Thinning(catalog, grace_s=grace)
        plan = thinning.by_steps(steps)
        if yes and plan.warnings and not (force or dry_run):
            raise ended(f"{'; '.join(plan.warnings)}. Nothing was removed: --force with --yes does it", status=1)
        carry_out(thinning, plan, is_yes=yes, is_dry=dry_run, as_json=as_json)
