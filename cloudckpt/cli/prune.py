"""`cloudckpt prune`: remove what no rule keeps."""

from __future__ import annotations

from cloudckpt.cli.asking import Access, AsJson, Root, Yes, ended
from cloudckpt.cli.removing import DryRun, Grace, carry_out
from cloudckpt.cli.rules import KeepBestOption, KeepEveryOption, KeepForOption, KeepLastOption, rules_of
from cloudckpt.root import Thinning, nothing_at

__all__ = ["prune"]


def prune(  # noqa: PLR0913 (each option of the command)
    url: Root,
    *,
    access: Access,
    keep_last: KeepLastOption = None,
    keep_best: KeepBestOption = None,
    keep_every: KeepEveryOption = None,
    keep_for: KeepForOption = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    grace: Grace = 60.0,
    as_json: AsJson = False,
) -> None:
    """Remove every checkpoint below a root that no rule keeps; the newest and the pinned ones always stay.

    Of all lines of history, whatever job saved them. What a running job went on from stays from the begin of its first
    save to the end of that; before, nobody can see which it is. The manifests go first, and the objects after the grace
    time, so that whoever reads one can end that.
    """
    rules = rules_of(keep_last, keep_best, keep_every, keep_for)
    if not rules:
        raise ended("no rule says what is to stay; give one or more, such as --keep-last 3 --keep-best loss", status=2)
    with access.opened(url) as catalog:
        thinning = Thinning(catalog, grace_s=grace)
        plan = thinning.by_rules(rules)
        if not plan.going and not plan.staying:
            raise nothing_at(catalog)
        carry_out(thinning, plan, is_yes=yes, is_dry=dry_run, as_json=as_json)
