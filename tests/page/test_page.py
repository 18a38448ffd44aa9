"""A page says what a store tells of a run and no more, in one file that nothing from outside can get into or out of."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from typer.testing import CliRunner

import cloudckpt
from cloudckpt import CheckpointManager, CheckpointNotFoundError, Options, OptionsError
from cloudckpt.cli import app
from cloudckpt.page import page_of
from cloudckpt.page.charts import metric_curve
from cloudckpt.page.history import Facts, facts_of
from cloudckpt.page.markup import tag
from cloudckpt.page.sections import SHOWN, Run, sections
from cloudckpt.report import Prices, prices_from
from cloudckpt.root import Catalog, Overview
from cloudckpt.store import open_store
from servers import FreshPrefix
from tests.page.browser import Browser, found
from tests.page.runs import BEGAN, a_run, checkpoint_of, claim_of

EVIL = "<script>alert(1)</script>\"'&</style>\u202e\x1b[31m"


class Seen(HTMLParser):
    """Elements, their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] not in (["style"], ["script"]) else ""


def page_about(facts: Facts, *, prices: Prices | None = None) -> str:
    overview = Overview(checkpoints=(), unreadable=(), unfinished=())
    at = BEGAN + timedelta(days=10)
    return "".join(sections(Run(url="s3://bucket/run", at=at, facts=facts, found=overview, prices=prices)))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two jobs in one process: steps 1 to 3, then back to 2, and 3 again. Nobody changes it."""
    base = tmp_path_factory.mktemp("page") / "root"
    state: dict[str, Any] = {"w": torch.ones(100)}
    with CheckpointManager(base, progress="off", save_rng=False) as manager:
        for step, evil in ((1, math.nan), (2, -math.inf), (3, 3.0)):
            manager.save(step, state, metrics={"loss": 1.0 / step, EVIL: evil})
        manager.restore(state, step=2)
        manager.async_save(3, state, metrics={"loss": 0.3}).result()
    return base


# -- what is told -------------------------------------------------------------------------------------------


def test_a_run_is_told_with_its_jobs_and_what_lies_between_them() -> None:
    checkpoints, claims = a_run()
    facts = facts_of(checkpoints, claims)
    assert [(job.epoch, len(job.saves)) for job in facts.jobs] == [(1, 3), (2, 3), (3, 2)]
    # Each began when its first save was, less the work since what it went on from.
    began = [(job.began_at - BEGAN).total_seconds() for job in facts.jobs if job.began_at is not None]
    assert began == [0.0, 800.0, 2000.0]
    assert [(one.resumed_from, one.gap_s, one.redone_s) for one in facts.breaks] == [
        ((1, 300), 500.0, 0.0),
        ((2, 500), 900.0, 100.0),
    ]
    assert (facts.wall_s, facts.worked_s, facts.interruptions) == (2200.0, 700.0, 2)
    assert facts.advice is not None
    costs = facts.advice.costs
    assert (costs.blocked_s, costs.commit_s, costs.interval_s, costs.step_s) == (2.0, 8.0, 98.0, 1.0)
    assert facts.mtbf_s == 400.0, "the work that checkpoints tell of, also what was trained twice"


def test_what_a_removed_checkpoint_said_is_not_made_up() -> None:
    checkpoints, claims = a_run()
    facts = facts_of([one for one in checkpoints if one.order not in ((1, 300), (2, 500))], claims)
    assert facts.gone == [(1, 300), (2, 500)]
    assert [job.began_at is None for job in facts.jobs] == [False, True, True]
    # At most until the first save has claimed.
    told = [(one.is_there, one.gap_s, one.redone_s) for one in facts.breaks]
    assert told == [(False, 695.0, None), (False, 995.0, None)]
    page = page_about(facts)
    assert "step 300 of epoch 1 (gone by now)" in page
    assert "at most 11.6 min" in page


def test_a_job_that_goes_back_by_itself_is_no_interruption(root: Path) -> None:
    with open_store(root) as store:
        catalog = Catalog(store)
        claims = {epoch: claim for epoch in (1, 2) if (claim := catalog.claims.read(epoch)) is not None}
        facts = facts_of(catalog.survey().checkpoints, claims)
    assert [one.is_same_process for one in facts.breaks] == [True]
    assert (facts.interruptions, facts.mtbf_s) == (0, None)


def test_a_save_in_the_background_has_kept_training_for_planning_and_staging_alone(root: Path) -> None:
    with open_store(root) as store:
        saves = facts_of(Catalog(store).survey().checkpoints, {}).saves
    *others, last = saves
    assert all(save.blocked_s == save.seconds for save in others)
    assert last.blocked_s == pytest.approx(last.number("plan_s") + last.number("stage_s"))  # type: ignore[operator]


@pytest.mark.parametrize(
    "summary",
    [
        {"in_background": -1.0},
        {"seconds": -5.0},
        {"seconds": 1e300, "plan_s": 1e300},
        {"worked_s": 1e300},
        {"worked_s": -1e300},
        {"slowest_rank": 1e300},
        {"retries": 1e300},
    ],
    ids=str,
)
def test_numbers_that_no_save_has_written_break_no_page(summary: dict[str, float]) -> None:
    one = checkpoint_of(1, 1, at_s=0, worked_s=1.0, summary=summary)
    metrics = [{"m": value} for value in (1.7e308, -1.7e308)]
    others = [checkpoint_of(step, 1, at_s=9, worked_s=2.0, metrics=given) for step, given in enumerate(metrics, 2)]
    facts = facts_of([one, *others], {1: claim_of(1, at_s=0)}, mtbf_s=100.0)
    page = page_about(facts, prices=Prices(storage_gib_month=1.0, writes_1000=1.0))
    assert re.findall(r'="[^"]*(?:nan|inf)[^"]*"', page) == []
    assert not re.search(r"\d{40}", Seen(page).text)


def test_what_cannot_be_read_is_not_called_gone() -> None:
    checkpoints, claims = a_run()
    facts = facts_of([one for one in checkpoints if one.order != (1, 300)], claims, unreadable={(1, 300)})
    assert facts.gone == []
    assert [one.is_there for one in facts.breaks] == [True, True]


def test_a_manifest_of_before_that_tells_little_is_told_as_little() -> None:
    one = checkpoint_of(7, 1, at_s=0)
    bare = msgspec.structs.replace(one.manifest, summary={})
    facts = facts_of([replace(one, manifest=bare)], {})
    assert (facts.advice, facts.wall_s, facts.worked_s) == (None, None, None)
    page = page_about(facts)
    assert "do not tell for how long saves kept training" in page
    assert "What each save took" not in page


def test_a_metric_that_is_no_number_draws_no_mark(root: Path) -> None:
    checkpoints = [
        checkpoint_of(step, 1, at_s=step, metrics={"m": value}) for step, value in [(1, math.nan), (2, math.inf)]
    ]
    facts = facts_of([*checkpoints, checkpoint_of(3, 1, at_s=3, metrics={"m": 5.0})], {})
    drawn = metric_curve("m", facts, facts.saves)
    assert drawn is not None
    assert drawn.count("<circle") == 1
    assert metric_curve("other", facts, facts.saves) is None


def test_a_metric_of_an_older_save_whose_name_is_blank_can_be_seen() -> None:
    saves = [checkpoint_of(step, 1, at_s=step, metrics={" ": 1.0, "loss": 0.5}) for step in (1, 2)]
    page = page_about(facts_of(saves, {}))
    assert page.count("&quot; &quot;</button>") == page.count("&quot; &quot; by step") == 1


def test_pinned_checkpoints_are_told_with_their_note(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, progress="off", save_rng=False) as manager:
        for step in (1, 2):
            manager.save(step, {"w": torch.ones(3)}, metrics={"loss": 1.0 / step})
        manager.pin(1, "for the <paper>")
    page = cloudckpt.report_page(tmp_path)
    assert page.count("pinned: for the &lt;paper&gt;") == 4, "in each drawing"
    assert "<td>for the &lt;paper&gt;</td>" in page
    assert page.count("mark save pinned") == 2


def test_of_many_checkpoints_the_newest_are_drawn_and_the_page_says_so() -> None:
    many = [checkpoint_of(step, 1, at_s=step) for step in range(SHOWN + 5)]
    page = page_about(facts_of(many, {}))
    assert "5 older ones are not drawn" in page
    assert len(page) < 4 << 20


def test_of_many_jobs_the_newest_have_a_lane_and_the_page_says_so() -> None:
    many = [checkpoint_of(1, epoch, at_s=epoch) for epoch in range(1, 51)]
    assert "The newest 40 jobs; 10 older ones" in page_about(facts_of(many, {}))


# -- the page -----------------------------------------------------------------------------------------------


def test_the_page_is_whole_markup_that_asks_for_nothing_and_holds_texts_as_texts(root: Path) -> None:
    page = cloudckpt.report_page(root)
    seen = Seen(page)
    assert seen.open == []
    assert [name for name, _ in seen.elements if name in ("script", "style")] == ["style", "script"]
    targets = [
        one[key] for _, one in seen.elements for key in ("src", "href", "action", "data", "srcset") if key in one
    ]
    assert targets == ["data:,"]
    assert not [key for _, one in seen.elements for key in one if key.startswith("on") or key == "style"]
    assert "<script>alert(1)</script>\"'&</style>\\u202e\\x1b[31m" in seen.text
    assert "\u202e" not in page
    assert "\x1b" not in page
    assert root.as_uri() in seen.text


def test_only_the_page_s_own_script_and_style_may_run(root: Path) -> None:
    page = cloudckpt.report_page(root)
    policy = next(
        one["content"] for _, one in Seen(page).elements if one.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    for name in ("style", "script"):
        text = page.split(f"<{name}>")[1].split(f"</{name}>")[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy


def test_no_text_leaves_its_element() -> None:
    assert tag("td", EVIL, title=EVIL).count("<") == 2
    assert tag("td", tag("b", "x"), None, "&") == "<td><b>x</b>&amp;</td>"
    assert tag("rect", x=1.50, height=2.0, class_="a", stroke_width=None) == '<rect x="1.5" height="2" class="a"/>'


def test_a_url_that_is_one_checkpoint_has_a_page(tmp_path: Path) -> None:
    cloudckpt.save({"w": torch.ones(3)}, tmp_path / "one", metrics={"loss": 0.25}, progress="off")
    seen = Seen(cloudckpt.report_page(tmp_path / "one"))
    assert "0.25" in seen.text


def test_where_nothing_is_committed_there_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint"):
        cloudckpt.report_page(tmp_path / "nothing")


def test_what_is_unreadable_or_unfinished_is_told(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, progress="off", save_rng=False) as manager:
        for step in (1, 2):
            manager.save(step, {"w": torch.ones(3)})
    (tmp_path / "step-0000000001-e0001" / "manifest.json").write_bytes(b"{}")
    shard = tmp_path / "step-0000000009-e0001" / "0123456789abcdef" / "r00000-0000.safetensors"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"x" * 2048)
    text = Seen(cloudckpt.report_page(tmp_path)).text
    assert "step 1 of epoch 1ManifestError" in text
    assert "no commit: 1 objects, 2.0 KiB" in text


def test_where_nothing_can_be_read_the_page_says_why(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, progress="off", save_rng=False) as manager:
        manager.save(1, {"w": torch.ones(3)})
    (tmp_path / "step-0000000001-e0001" / "manifest.json").write_bytes(b"{}")
    seen = Seen(cloudckpt.report_page(tmp_path))
    assert "was changed after it was written" in seen.text
    assert "fresh start" in seen.text, "what its job's claim tells"


def test_a_page_of_a_bucket_writes_nothing_there(s3_url: FreshPrefix) -> None:
    options = dict(s3_url.storage_options)
    with CheckpointManager(s3_url.url, storage_options=options, progress="off", save_rng=False) as manager:
        manager.save(1, {"w": torch.ones(3)})
    with open_store(s3_url.url, storage_options=options) as store:
        before = {(info.key, info.modified_s) for info in store.list("").objects}
        text = Seen(page_of(Catalog(store))).text
        assert {(info.key, info.modified_s) for info in store.list("").objects} == before
        verbs = set(store.stats())
    assert verbs <= {"list", "read", "get", "head"}
    assert "none are known for this store" in text, "a server of one's own has not the prices of AWS"


# -- prices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "endpoint", "price"),
    [
        ("s3://bucket/x", "", 0.023),
        ("s3://bucket/x", "https://s3.eu-west-1.amazonaws.com", 0.023),
        ("s3://bucket/x", "http://127.0.0.1:9000", None),
        ("s3://bucket/x", "https://amazonaws.com.example.org", None),
        ("gs://bucket/x", "https://storage.googleapis.com", 0.020),
        ("file:///x", "", None),
    ],
)
def test_the_usual_prices_are_those_of_their_clouds_alone(url: str, endpoint: str, price: float | None) -> None:
    class Named:
        pass

    store: Any = Named()
    store.url, store.endpoint = url, endpoint
    found = Prices.of(store)
    assert (found and found.storage_gib_month) == price
    assert found is None or "pricing as of 20" in found.source


def test_prices_of_one_s_own_are_said_with_their_source(tmp_path: Path, root: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({"storage_gib_month": 1024.0, "writes_1000": 10.0, "currency": "EUR"}))
    checkpoints, claims = a_run()
    page = page_about(facts_of(checkpoints, claims), prices=prices_from(path))
    assert "24,576.00 EUR" in page, "3 GiB of 8 checkpoints"
    assert f"1024 EUR for a GiB and month, 10 EUR for 1,000 writes: {path}" in page
    # 70 requests of rank 0 each, and a put for each of the 42 shards of the other 7 ranks.
    assert "8.96 EUR" in page


def test_a_restore_is_priced_by_its_reads_and_by_what_the_store_sends() -> None:
    prices = Prices(storage_gib_month=0.0, writes_1000=1000.0, reads_1000=1000.0, sent_gib=0.5)
    checkpoints, claims = a_run()
    newest = max(checkpoints, key=lambda one: one.order)
    reads = 2 + newest.manifest.shard_count + newest.total_bytes // Options().span_bytes
    page = page_about(facts_of(checkpoints, claims), prices=prices)
    assert f"{1 + reads + newest.total_bytes / 2**30 * 0.5:,.2f} USD: {reads:,} reads and" in page
    assert "1000 USD for 1,000 reads, 0.5 USD for a GiB that it sends" in page
    assert prices.cost(writes=2, reads=3, sent_bytes=2**30) == 5.5


def test_the_prices_that_the_documentation_shows_can_be_read(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "report.md"
    shown = re.search(r"^(\{.*storage_gib_month.*\})$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert shown is not None
    (tmp_path / "prices.json").write_text(shown[1])
    assert prices_from(tmp_path / "prices.json").source == "our contract, 2026-11"


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"storage_gib_month": "cheap", "writes_1000": 1}'),
        '{"storage_gib_month": -1, "writes_1000": 1}',
        '{"storage_gib_month": 1, "writes_1000": 1, "rebate": 1}',
        '{"storage_gib_month": 1e999, "writes_1000": 1}',
        '{"storage_gib_month": 1, "writes_1000": 1, "reads_1000": -1}',
        '{"storage_gib_month": 1, "writes_1000": 1, "sent_gib": -1}',
    ],
)
def test_prices_that_are_none_are_refused_by_the_name_of_their_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "prices.json").write_text(text)
    with pytest.raises(OptionsError, match=r"prices\.json"):
        prices_from(tmp_path / "prices.json")


# -- the command --------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_whole_or_not_at_all(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    result = CliRunner().invoke(app, ["report", str(root), "-o", str(out), "--mtbf", "3h"])
    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    assert "3 h, as given" in Seen(out.read_text(encoding="utf-8")).text
    before = out.read_bytes()
    failed = CliRunner().invoke(app, ["report", str(tmp_path / "nothing"), "-o", str(out)])
    assert failed.exit_code == 1
    assert (out.read_bytes(), list(tmp_path.iterdir())) == (before, [out])
    no_folder = CliRunner().invoke(app, ["report", str(root), "-o", str(tmp_path / "a" / "b.html")])
    assert no_folder.exit_code == 1
    assert "b.html" in no_folder.stderr


def test_a_page_leaves_no_sums_of_the_file_that_it_replaces(root: Path, tmp_path: Path) -> None:
    with cloudckpt.open(tmp_path / "out.html", "wb") as file:
        file.write(b"before")
    assert CliRunner().invoke(app, ["report", str(root), "-o", str(tmp_path / "out.html")]).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"]


def test_the_command_writes_to_a_pipe_or_a_device_and_puts_no_file_in_its_place(root: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_text)
        result = CliRunner().invoke(app, ["report", str(root), "-o", str(pipe)])
        assert result.exit_code == 0, result.stderr
        assert read.result().startswith("<!doctype html>")
    assert pipe.is_fifo()


def test_the_command_writes_through_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link.html", tmp_path / "there" / "page.html"
    link.symlink_to("there/page.html")
    for _ in ("a link to nothing yet", "to a file"):
        result = CliRunner().invoke(app, ["report", str(root), "-o", str(link)])
        assert result.exit_code == 0, result.stderr
        assert (link.is_symlink(), list(target.parent.iterdir())) == (True, [target])
        assert target.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (".", "-o . is a directory; name a file in it, such as report.html"),
        ("", "-o . is a directory"),
        ("/", "such as /report.html"),
        ("nodir/x.html", "there is no directory"),
        ("circle", "leads in a circle"),
    ],
)
def test_where_no_page_can_go_is_said_in_one_line_before_anything_is_read(
    tmp_path: Path, output: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "nothing"), "-o", output])
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 1
    assert words in line
    assert [one.name for one in tmp_path.iterdir()] == ["circle"]


def test_the_command_prints_the_page_where_that_is_wanted(root: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(root), "-o", "-"])
    assert result.stdout.startswith("<!doctype html>")
    assert result.stdout.endswith("</html>\n")


def test_a_command_has_the_short_name_of_an_option_before_the_options_that_all_share(root: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(root), "-o", "-", "--storage-options", "{}"])
    assert result.exit_code == 0, result.stderr
    assert "-o" in CliRunner().invoke(app, ["ls", "--help"]).stdout


# -- in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A Chromium on an empty page; the tests of this module share it, each opens its own."""
    program = found()
    if program is None:
        pytest.skip("no Chromium on PATH (apt-get install chromium)")
    with Browser.opened(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_in_a_browser_all_that_can_be_clicked_works_and_nothing_is_asked_for(
    browser: Browser, root: Path, tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    path.write_text(cloudckpt.report_page(root), encoding="utf-8")
    browser.errors.clear()
    browser.requests.clear()
    browser.open(path)
    clicked = browser.run("""
        (() => {
          let count = 0;
          for (const mark of document.querySelectorAll(".mark")) {
            mark.dispatchEvent(new MouseEvent("click", {bubbles: true}));
            const drawing = mark.closest(".scroll");
            const words = mark.querySelector("title").textContent;
            if (drawing.nextElementSibling.textContent !== words) throw mark.outerHTML;
            count += 1;
          }
          for (const button of document.querySelectorAll("button")) { button.click(); count += 1; }
          return count;
        })()
    """)
    assert clicked > 20
    # Of the two metrics the one that was clicked last is shown; the table is sorted by its last column.
    assert browser.run("[...document.querySelectorAll('[data-panel]')].map(one => one.hidden)") == [True, False]
    losses = browser.run(
        "[...document.querySelectorAll('table.sortable tbody tr td:last-child')].map(a => a.dataset.value)"
    )
    assert losses == sorted(losses)
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [path.as_uri()]


def test_in_a_browser_columns_sort_both_ways_and_what_is_not_known_comes_last(
    browser: Browser, root: Path, tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    path.write_text(cloudckpt.report_page(root), encoding="utf-8")
    browser.open(path)
    column = """
        (place, times) => {
          const table = document.querySelector("table.sortable");
          for (let i = 0; i < times; i += 1) table.querySelectorAll("th button")[place].click();
          return [...table.tBodies[0].rows].map((row) => row.cells[place].dataset.value);
        }
    """
    assert browser.run(f"({column})(0, 1)") == ["1", "2", "3", "3"]
    assert browser.run(f"({column})(0, 1)") == ["3", "3", "2", "1"]
    evil = browser.run(f"({column})(9, 2)")
    assert evil == ["3.0", "-Infinity", "", ""]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 900), (390, 844)], ids=["desk", "phone"])
def test_in_a_browser_the_page_fits_the_window_light_and_dark(
    browser: Browser, root: Path, tmp_path: Path, scheme: str, size: tuple[int, int]
) -> None:
    path = tmp_path / "page.html"
    path.write_text(cloudckpt.report_page(root), encoding="utf-8")
    browser.open(path)
    picture = browser.look(width=size[0], height=size[1], scheme=scheme)
    assert picture.startswith(b"\x89PNG")
    assert browser.run("document.documentElement.scrollWidth") <= size[0]
    colour = browser.run("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", colour)[:3]))
    assert brightness > 600 if scheme == "light" else brightness < 150


def test_in_a_browser_without_its_script_all_is_there(browser: Browser, root: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(cloudckpt.report_page(root), encoding="utf-8")
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(path)
        hidden = browser.run("[...document.querySelectorAll('[hidden]')].map(one => one.id || one.className)")
        assert hidden == ["zone", "choices"], "what only the script serves"
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
