"""Laws of the benchmark of trainers: what it cannot run it names, and a save is struck in its middle."""

from __future__ import annotations

import http.client
import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from benchmarks import integrations
from benchmarks.sink.process import running_sink
from benchmarks.trainers.family import end_family, is_alive
from benchmarks.trainers.meter import Found, Meter, ResumedError, Task
from benchmarks.trainers.relay import running_relay
from benchmarks.trainers.report import HEADING, Kill, Left, Row, section, tables

MIB = 1 << 20


def _save(seconds: float, sums: dict[str, int] | None = None) -> Found:
    return Found(blocked_s=seconds, save_s=seconds, extra_bytes=10 * MIB, sums=sums or {"4": 7})


def _load(seconds: float) -> Found:
    return Found(load_s=seconds, extra_bytes=20 * MIB, step=4, sums={"4": 7})


def _told(*rows: Row) -> str:
    return tables({"one": rows}, size_bytes=200_000_000, runs=1, load=0.0)


def test_a_trainer_that_is_not_installed_has_a_row_that_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("lightning"):
        pytest.skip("lightning is installed here")
    page = tmp_path / "page.md"
    page.write_text("# Trainers\n")
    words = ["--frameworks", "lightning", "--mb", "1", "--runs", "1", "--no-kills", "--directory", str(tmp_path)]
    heard = signal.getsignal(signal.SIGTERM)
    assert integrations.main([*words, "--markdown", str(page)]) == 0
    assert signal.getsignal(signal.SIGTERM) is heard, "a program's affair, and not that of who calls"
    told = capsys.readouterr().out
    assert "| lightning |  | ModuleNotFoundError: No module named 'lightning'" in told
    assert page.read_text() == f"# Trainers\n\n{HEADING}\n\n{told}"


def test_the_section_of_a_page_is_replaced_and_all_else_stays() -> None:
    page = f"# A\n\ntext\n\n{HEADING}\n\nold\n\n| 1 |\n"
    assert section(page, "new") == f"# A\n\ntext\n\n{HEADING}\n\nnew\n"
    assert section(f"{page}\n## B\n\nmore\n", "new") == f"# A\n\ntext\n\n## B\n\nmore\n\n{HEADING}\n\nnew\n"


def test_ours_is_compared_with_a_trainer_that_came_to_the_bucket_and_with_no_other() -> None:
    stock = Row(way="stock", title="T", line="-", saves=[_save(3.0)], loads=[_load(2.0)])
    ours = Row(way="cloudckpt", title="ours", line="-", saves=[_save(1.0)], loads=[_load(1.0)])
    told = _told(stock, ours)
    assert "| ours | - | **1.00** (1.00–1.00) | 3.0 | 1.00 | **1.00** (1.00–1.00) | 2.0 | 10 | 20 |" in told
    assert "†" not in told
    stock.is_local = True
    told = _told(stock, ours)
    assert "| T | - | **3.00** (3.00–3.00)† | – |" in told
    assert "| ours | - | **1.00** (1.00–1.00) | – |" in told
    assert "the bucket stays empty" in told


def test_a_whole_save_that_a_resume_does_not_find_is_told_as_a_fresh_start() -> None:
    row = Row(way="stock", title="T", line="-", saves=[_save(3.0)], is_forgotten=True)
    assert "| **begins anew** | – | 10 | – |" in _told(row)


def test_what_a_kill_left_and_what_a_resume_found_stand_in_one_row() -> None:
    left = Left(objects=2, object_bytes=50_000_000, uploads=1, upload_bytes=100_000_000)
    stock = Row(way="stock", title="T", line="-", error="x", kill=Kill(left=left, elsewhere="step 2"))
    assert "| T | 2 objects (50 MB), 1 **open upload** (100 MB) | step 2 |" in _told(stock)
    here = Kill(left=Left(files=1, file_bytes=1), elsewhere="nothing", here="error: A | B")
    told = _told(Row(way="stock", title="T", line="-", error="x", kill=here))
    assert "| T | 1 file in `./s3:` (0 MB) | nothing; on the same machine: error: A / B |" in told


def test_ours_that_does_not_go_on_from_the_save_before_is_wrong() -> None:
    assert not Row(way="cloudckpt", title="", line="", kill=Kill(elsewhere="step 2")).is_wrong
    assert Row(way="cloudckpt", title="", line="", kill=Kill(elsewhere="nothing: begins anew")).is_wrong
    assert Row(way="cloudckpt", title="", line="", kill=Kill(error="never struck")).is_wrong


def test_a_meter_tells_of_a_resume_and_ends_it(tmp_path: Path) -> None:
    meter = Meter(Task(way="stock", op="resume", url="", size_bytes=1, folder=str(tmp_path)))
    meter.loading()
    with pytest.raises(ResumedError):
        meter.loaded(2, list)
    found = Found(**json.loads((tmp_path / "found.json").read_text()))
    assert (found.step, found.sums) == (2, {"2": 0})


def test_a_relay_strikes_at_its_byte_and_forwards_nothing_behind_it() -> None:
    with running_sink(8 * MIB) as sink, running_relay(sink.endpoint_url) as relay:

        def put(key: str) -> None:
            connection = http.client.HTTPConnection(urlsplit(relay.endpoint_url).netloc, timeout=30)
            connection.request("PUT", f"/bench/{key}", bytes(MIB))
            assert connection.getresponse().status == 200
            connection.close()

        struck: list[bool] = []
        put("before")
        relay.arm(MIB // 2, lambda: struck.append(True))
        with pytest.raises((http.client.HTTPException, OSError)):
            put("struck")
        assert struck == [True]
        put("after")
        assert sorted(sink.objects()) == ["bench/after", "bench/before"]


def test_the_end_of_a_process_is_that_of_all_that_it_began_in_whatever_session() -> None:
    child = (
        "import subprocess; p = subprocess.Popen(['sleep', '60'], start_new_session=True); "
        "print(p.pid, flush=True); p.wait()"
    )
    with subprocess.Popen([sys.executable, "-S", "-c", child], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        grandchild = int(process.stdout.readline())
        end_family(process.pid)
        assert process.wait() == -9
    assert not is_alive(grandchild)
