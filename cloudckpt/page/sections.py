"""Say what facts of a run are worth a person's look, section by section, each with what it cannot tell.

Pure functions from a run to markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean

from cloudckpt.options import Options
from cloudckpt.page.charts import PHASES, bars_of_bytes, bars_of_seconds, lanes, metric_curve
from cloudckpt.page.history import Break, Facts, Job, Save, claimed_at
from cloudckpt.page.markup import Child, Html, tag
from cloudckpt.page.tables import long_cell, moment, number_cell, pairs, seconds_cell, table_of, time_cell, words_cell
from cloudckpt.page.words import metric_name, percent, span
from cloudckpt.report import MONTH_S, Prices, as_bytes, money
from cloudckpt.root import Overview
from cloudckpt.store import Traffic

__all__ = ["SHOWN", "Run", "sections"]

SHOWN = 1_000
"""What a browser draws at once on a phone, and a person looks at."""
_METRICS = 24
_LANES = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a page is about."""

    url: str
    at: datetime
    facts: Facts
    found: Overview
    prices: Prices | None

    @property
    def shown(self) -> Sequence[Save]:
        """The newest of the saves, so many as are drawn."""
        return self.facts.saves[-SHOWN:]

    @property
    def total_bytes(self) -> int:
        """Bytes of all that is there, with what no commit owns."""
        checkpoints = sum(save.checkpoint.manifest.sent_bytes for save in self.facts.saves)
        return checkpoints + sum(orphan.total_bytes for orphan in self.found.unfinished)


def sections(run: Run) -> list[Html]:
    """Return all of the page, from its top to its end; of what nothing is known there is no section."""
    made = (
        _top,
        _timeline,
        _breaks,
        _durations,
        _sizes,
        _metrics,
        _advice,
        _cost,
        _table,
        _others,
        _environment,
        _knows,
    )
    return [one for section in made if (one := section(run)) is not None]


def _section(title: str, *children: Child) -> Html:
    return tag("section", tag("h2", title), *children)


def _note(text: str) -> Html:
    return tag("p", text, class_="note")


def _top(run: Run) -> Html:
    facts = run.facts
    said = tag("span", "as of ", moment(run.at), " UTC ", class_="dim")
    button = tag("button", "times of this machine", id="zone", type="button", aria_pressed="false", hidden="")
    return tag("header", tag("h1", run.url), tag("p", said, button), tag("div", *_cards(run, facts), class_="cards"))


def _cards(run: Run, facts: Facts) -> list[Html]:
    newest, seconds = facts.newest, [save.seconds for save in facts.saves if save.seconds is not None]
    blocked = [save.blocked_s for save in facts.saves if save.blocked_s is not None]
    cards = [
        ("newest step", "–" if newest is None else str(newest.checkpoint.step)),
        ("checkpoints", f"{len(facts.saves):,}"),
        ("bytes there", as_bytes(run.total_bytes)),
        ("a save takes", span(fmean(seconds)) if seconds else "–"),
        ("and blocks training for", span(fmean(blocked)) if blocked else "–"),
        ("jobs", f"{len(facts.jobs):,}"),
        ("interruptions", f"{facts.interruptions:,}"),
    ]
    if facts.wall_s is not None and facts.worked_s is not None:
        cards.append(("of the time went into the newest", f"{100 * min(1.0, facts.worked_s / facts.wall_s):.1f} %"))
    if run.prices is not None:
        monthly = run.total_bytes / 2**30 * run.prices.storage_gib_month
        cards.append(("a month, as it stands", money(monthly, run.prices.currency)))
    return [tag("div", tag("b", value), tag("span", name), class_="card") for name, value in cards]


def _timeline(run: Run) -> Html | None:
    jobs = run.facts.jobs
    drawn = lanes(run.facts, jobs[-_LANES:])
    if drawn is None:
        return None
    legend = _legend(("kept", "a checkpoint"), ("pin", "pinned"), ("gone", "between two jobs"))
    older = len(jobs) - _LANES
    note = _note(f"The newest {_LANES} jobs; {older:,} older ones are in the table.") if older > 0 else None
    return _section("Jobs and their checkpoints", legend, drawn, note)


def _legend(*entries: tuple[str, str]) -> Html:
    return tag("p", *(tag("span", tag("i", class_=kind), words) for kind, words in entries), class_="legend")


def _breaks(run: Run) -> Html | None:
    jobs = run.facts.jobs
    if not any(job.claim is not None for job in jobs):
        return None
    by_epoch = {one.job.epoch: one for one in run.facts.breaks}
    columns = (
        ("epoch", True),
        ("machine and process", False),
        ("went on from", False),
        ("first save claimed (UTC)", False),
        ("began (UTC)", False),
        ("after the last commit", True),
        ("work gone back behind", True),
        ("checkpoints there", True),
    )
    rows = [_job_row(job, by_epoch.get(job.epoch)) for job in jobs[-SHOWN:]]
    return _section(
        "Jobs, restores and interruptions",
        table_of(columns, rows),
        _note(
            "A job claims an epoch with its first save, so one that never saved is not here. The time after the last "
            "commit that is still there holds both the work that was lost and the time in which nothing ran: a store "
            "cannot tell them apart. What was gone back behind had been committed, and was trained again."
        ),
    )


def _job_row(job: Job, gap: Break | None) -> list[Html]:
    claim = job.claim
    if gap is None:
        origin = "nothing: a fresh start" if claim is not None else "not known"
    else:
        there = "" if gap.is_there else " (gone by now)"
        same = ", by itself" if gap.is_same_process else ""
        origin = f"step {gap.resumed_from[1]} of epoch {gap.resumed_from[0]}{there}{same}"
    return [
        number_cell(job.epoch, f"{job.epoch}"),
        words_cell(job.place or "not known"),
        words_cell(origin),
        words_cell("not known") if claim is None else time_cell(claimed_at(claim)),
        words_cell("not known") if job.began_at is None else time_cell(job.began_at),
        _gap(job, gap),
        seconds_cell(None if gap is None else gap.redone_s),
        number_cell(len(job.saves), f"{len(job.saves):,}"),
    ]


def _gap(job: Job, gap: Break | None) -> Html:
    if gap is None or gap.is_same_process or gap.gap_s is None:
        return seconds_cell(None)
    return number_cell(gap.gap_s, span(gap.gap_s) if job.began_at else f"at most {span(gap.gap_s)}")


def _durations(run: Run) -> Html | None:
    drawn = bars_of_seconds(run.shown)
    if drawn is None:
        return None
    words = {
        "plan": "plan",
        "upload": "upload, with staging",
        "gather": "gather",
        "commit": "index",
        "other": "the rest",
    }
    legend = _legend(*((name, words[name]) for name in PHASES))
    return _section("What each save took", legend, drawn, _left_out(run))


def _sizes(run: Run) -> Html | None:
    drawn = bars_of_bytes(run.shown)
    return None if drawn is None else _section("How large each checkpoint is", drawn, _left_out(run))


def _left_out(run: Run) -> Html | None:
    older = len(run.facts.saves) - len(run.shown)
    return _note(f"The newest {SHOWN:,}; {older:,} older ones are not drawn.") if older else None


def _metrics(run: Run) -> Html | None:
    names = sorted({name for save in run.shown for name in save.checkpoint.metrics})
    drawn = [(name, curve) for name in names[:_METRICS] if (curve := metric_curve(name, run.facts, run.shown))]
    if not drawn:
        return None
    buttons = [tag("button", metric_name(name), type="button", aria_pressed="false") for name, _ in drawn]
    choices = tag("p", *buttons, class_="choices", data_of="metric", hidden="") if len(drawn) > 1 else None
    panels = [
        tag("div", tag("p", metric_name(name), class_="dim"), curve, data_panel="metric") for name, curve in drawn
    ]
    legend = _legend(("kept", "is there"), ("pin", "is there, pinned"), ("gone", "a job went on from it; it is gone"))
    left = len(names) - _METRICS
    more = _note(f"{left} more metrics are in the manifests; `cloudckpt ls --json` prints them.") if left > 0 else None
    return _section("Metrics", choices, legend, *panels, more)


def _advice(run: Run) -> Html:
    advice, facts = run.facts.advice, run.facts
    if advice is None:
        return _section("How often to save", _note("The manifests do not tell for how long saves kept training."))
    costs = advice.costs
    failures = "not known" if facts.mtbf_s is None else span(facts.mtbf_s)
    if facts.mtbf_s is not None:
        failures += ", as given" if facts.is_mtbf_given else f", by {facts.interruptions} interruptions"
    best = span(advice.best_s)
    if advice.best_steps is not None:
        best += f" (save_every_steps={advice.best_steps})"
    rows = [
        ("A save blocks training for", span(costs.blocked_s)),
        ("and is committed after", span(costs.commit_s)),
        ("Training between two checkpoints that are there", span(costs.interval_s)),
        ("Work per failure", failures),
        ("Best interval", best),
        ("by Young, by Daly", f"{span(advice.young_s)}, {span(advice.daly_s)}"),
        ("Expected goodput now, at best", f"{percent(advice.goodput_present)}, {percent(advice.goodput_best)}"),
    ]
    if facts.wall_s is not None and facts.worked_s is not None:
        seen = f"{span(facts.worked_s)} of {span(facts.wall_s)}"
        rows.insert(0, ("Work in the newest checkpoint, of the time since it began", seen))
    blocked = [save.blocked_s for save in facts.saves if save.blocked_s is not None]
    rows.insert(0, ("Training was kept, by the saves that are there", span(sum(blocked))))
    return _section(
        "Time lost, and how often to save",
        pairs(rows),
        _note(
            "By checkpoints that are still there: where some were removed, saves were more frequent than this, and the "
            "goodput of now is higher. How long restores took is not kept, and counts nothing here; a job's own "
            "manager.report() knows it."
        ),
    )


def _cost(run: Run) -> Html:
    title = "What it costs"
    prices, saves = run.prices, run.facts.saves
    manifests = [save.checkpoint.manifest for save in saves]
    objects = sum(one.shard_count + 2 for one in manifests)
    requests = sum(int(save.number("requests") or 0) for save in saves)
    retries = sum(int(save.number("retries") or 0) for save in saves)
    rows = [
        ("Bytes there", as_bytes(run.total_bytes)),
        ("Objects of the checkpoints that are there", f"{objects:,}"),
        ("Requests of rank 0 for them, up to each commit", f"{requests:,}, {retries:,} of them retries"),
    ]
    if prices is None:
        rows.append(("Prices", "none are known for this store; give --prices FILE.json"))
        return _section(title, pairs(rows))
    gib_months = sum(save.checkpoint.manifest.sent_bytes / 2**30 * _age_s(run, save) / MONTH_S for save in saves)
    # A put for each shard of the other ranks: of as many as rank 0 has itself.
    others = sum(one.shard_count * (one.world_size - 1) // max(1, one.world_size) for one in manifests)
    spent = sum((_traffic(save) for save in saves), Traffic(puts=others))
    spent += Traffic(puts=max(0, objects - spent.requests))
    rows += [
        ("Storage, a month as it stands", money(run.total_bytes / 2**30 * prices.storage_gib_month, prices.currency)),
        ("Storage so far of what is there", money(gib_months * prices.storage_gib_month, prices.currency)),
        ("Requests of its saves, about", f"{money(prices.cost_of(spent), prices.currency)}: {_classes(spent)}"),
        *(_restore_cost(saves[-1], prices) if saves else []),
        ("Prices", _prices(prices)),
    ]
    note = "Prices depend on region, class and contract, and change: --prices FILE.json takes yours. Not in it: what "
    return _section(
        title,
        pairs(rows),
        _note(
            f"{note}was removed, what retention asks after each commit, retries of other ranks, restores (a job's own "
            "manager.report() counts them), and reads by others."
        ),
    )


def _traffic(save: Save) -> Traffic:
    """Return what rank 0 asked for a save, by class; of one that counted none, all are taken for puts."""
    found = {name: int(save.number(name) or 0) for name in Traffic().by_class}
    return Traffic(**found) if any(found.values()) else Traffic(puts=int(save.number("requests") or 0))


def _classes(traffic: Traffic) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in traffic.by_class.items() if count)


def _restore_cost(save: Save, prices: Prices) -> list[tuple[str, str]]:
    """Say what it takes to restore a checkpoint once: a listing, its records, and each byte of its shards once."""
    size_bytes, shards = save.checkpoint.total_bytes, save.checkpoint.manifest.shard_count
    reads = 2 + shards + size_bytes // Options().span_bytes
    cost = money(prices.cost(writes=1, reads=reads, sent_bytes=size_bytes), prices.currency)
    return [("A restore of the newest, about", f"{cost}: {reads:,} reads and {as_bytes(size_bytes)}")]


def _prices(prices: Prices) -> str:
    told = [
        f"{prices.storage_gib_month:g} {prices.currency} for a GiB and month",
        f"{prices.writes_1000:g} {prices.currency} for 1,000 writes",
        *([f"{prices.reads_1000:g} {prices.currency} for 1,000 reads"] if prices.reads_1000 else []),
        *([f"{prices.sent_gib:g} {prices.currency} for a GiB that it sends"] if prices.sent_gib else []),
    ]
    return f"{', '.join(told)}: {prices.source or 'given'}"


def _age_s(run: Run, save: Save) -> float:
    return max(0.0, (run.at - save.checkpoint.created_at).total_seconds())


def _table(run: Run) -> Html | None:
    if not run.facts.saves:
        return None
    names = sorted({name for save in run.shown for name in save.checkpoint.metrics})[:_METRICS]
    columns = [
        ("step", True),
        ("epoch", True),
        ("created (UTC)", False),
        ("size", True),
        ("ranks", True),
        ("took", True),
        ("blocked", True),
        ("retries", True),
        ("pinned", False),
        *((metric_name(name), True) for name in names),
    ]
    rows = [_save_row(save, names) for save in reversed(run.shown)]
    return _section("Checkpoints", table_of(columns, rows, is_sortable=True), _left_out(run))


def _save_row(save: Save, names: Sequence[str]) -> list[Html]:
    one, retries = save.checkpoint, save.number("retries")
    return [
        number_cell(one.step, "–" if one.step < 0 else str(one.step)),
        number_cell(one.epoch, str(one.epoch or "–")),
        time_cell(one.created_at),
        number_cell(one.total_bytes, as_bytes(one.total_bytes)),
        number_cell(one.world_size, str(one.world_size)),
        seconds_cell(save.seconds),
        seconds_cell(save.blocked_s),
        number_cell(retries, "–" if retries is None else f"{retries:.0f}"),
        words_cell("" if save.pin is None else save.pin or "yes"),
        *(_metric(one.metrics.get(name)) for name in names),
    ]


def _metric(value: float | None) -> Html:
    is_number = value is not None and value == value  # noqa: PLR0124 (NaN)
    return number_cell(value if is_number else None, "–" if value is None else f"{value:.6g}")


def _others(run: Run) -> Html | None:
    rows = [
        [
            words_cell(f"step {one.step} of epoch {one.epoch}"),
            long_cell(f"{type(one.error).__name__}: {one.error}", class_="bad"),
        ]
        for one in run.found.unreadable[:SHOWN]
    ]
    rows += [
        [
            words_cell(one.prefix),
            long_cell(f"no commit: {one.object_count:,} objects, {as_bytes(one.total_bytes)}, {span(one.age_s)} old"),
        ]
        for one in run.found.unfinished[:SHOWN]
    ]
    if not rows:
        return None
    note = (
        "Without a commit: a save under way, or what a save or a removal that was cut off has left; `sweep` removes it."
    )
    return _section("Unreadable, or without a commit", table_of([("what", False), ("why", False)], rows), _note(note))


def _environment(run: Run) -> Html | None:
    newest = run.facts.newest
    facts = {} if newest is None else newest.checkpoint.manifest.environment
    return _section("The job that saved the newest", pairs(sorted(facts.items()))) if facts else None


def _knows(_: Run) -> Html:
    return tag(
        "footer",
        _note(
            "This page holds what the store tells: manifests of checkpoints that are there, claims of jobs, and pins. "
            "A checkpoint that was removed took what it said with it; failed saves and restores leave nothing behind. "
            "Times are by the clocks of the machines that wrote them. `on_event=` tells a job's own loggers all of it."
        ),
    )
