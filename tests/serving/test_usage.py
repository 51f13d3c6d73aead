"""The bill: its rules, its way to the database, and what happens to it when anything on that way breaks."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.errors import Conflict, StorageError
from adapterhub.serving import database
from adapterhub.serving.bill.ledger import Ledger
from adapterhub.serving.bill.metering import Metering
from adapterhub.serving.bill.spool import Spool
from adapterhub.serving.database import Database, default_url, open_database
from adapterhub.serving.usage import Batch, Counts, Line, Tally, hour_of, summed

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)
ACME = Line("acme", "k1", "acme/support", 3)
BASE = Line("globex", "k2", "base", 0)
ALWAYS = {"since": NOON - timedelta(days=3650), "until": NOON + timedelta(days=3650)}

lines = st.sampled_from([ACME, BASE, Line("acme", "k1", "base", 0), Line("", "", "acme/support", 4)])
counts = st.builds(Counts, *[st.integers(0, 2**40)] * 8)
moments = st.datetimes(datetime(2026, 1, 1), datetime(2027, 1, 1), timezones=st.just(UTC))
entries = st.lists(st.tuples(lines, counts, moments), max_size=20)


def total(ledger: Ledger) -> Counts:
    return sum((c for _, _, c in ledger.rows(**ALWAYS)), Counts())


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(open_database(default_url(tmp_path / "home")))


# ── the rules ────────────────────────────────────────────────────────────────────────────────────────────────


@given(entries, st.lists(st.integers(0, 20)))
def test_nothing_is_lost_or_doubled_wherever_batches_are_cut(
    entries: list[tuple[Line, Counts, datetime]], cuts: list[int]
) -> None:
    tally, batches = Tally("w"), []
    for i, (line, what, at) in enumerate(entries):
        tally.add(line, what, hour=hour_of(at))
        if i in cuts:
            batches.append(tally.take())
    batches.append(tally.take())
    made = [batch for batch in batches if batch is not None]
    assert [batch.number for batch in made] == list(range(1, len(made) + 1))
    booked = sum((c for batch in made for c in batch.rows.values()), Counts())
    assert booked == sum((what for _, what, _ in entries), Counts())
    assert [Batch.from_json(batch.to_json()) for batch in made] == made


@pytest.mark.parametrize("text", ["", "{}", "[]", '["w",1,[["2026-11-25T12","acme"', '["w",1,[[1]]]', "[1,2]", "null"])
def test_half_a_line_is_no_batch(text: str) -> None:
    with pytest.raises(ValueError):
        Batch.from_json(text)


def test_whose_account() -> None:
    assert Line.of(tenant="acme", key="k", model="globex/desk@12") == Line("acme", "k", "globex/desk", 12)
    assert Line.of(tenant=None, key=None, model="base") == Line("", "", "base", 0)
    assert Line.of_owner("globex/desk@12", keyed=True) == Line("globex", "", "globex/desk", 12)
    assert Line.of_owner("globex/desk@12", keyed=False).tenant == ""


def test_hours_are_utc_and_sums_are_in_order() -> None:
    assert hour_of(datetime(2026, 11, 25, 1, 59, tzinfo=UTC)) == "2026-11-25T01"
    rows = [
        ("2026-11-25T01", ACME, Counts(requests=1, tokens_in=5)),
        ("2026-11-24T01", ACME, Counts(requests=1, tokens_out=7, resident_ms=1500)),
        ("2026-11-24T02", BASE, Counts(requests=1)),
    ]
    assert [(e["tenant"], e["requests"], e["tokens_in"], e["tokens_out"]) for e in summed(rows, by="tenant")] == [
        ("acme", 2, 5, 7), ("globex", 1, 0, 0),
    ]  # fmt: skip
    assert [(e["day"], e["requests"]) for e in summed(rows, by="day")] == [("2026-11-24", 2), ("2026-11-25", 1)]
    assert summed(rows, by="version")[0] | {"requests": 0} == {
        "adapter": "acme/support", "version": 3, "requests": 0, "cancelled": 0, "failed": 0, "tokens_in": 5,
        "tokens_out": 7, "tokens_cached": 0, "cold_loads": 0, "resident_seconds": 1.5,
    }  # fmt: skip
    assert [(e["tenant"], e["key"]) for e in summed(rows, by="key")] == [("acme", "k1"), ("globex", "k2")]


# ── the database ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_batch_counts_once_however_often_it_comes(ledger: Ledger) -> None:
    first = Batch("w", 1, {(hour_of(NOON), ACME): Counts(requests=1, tokens_in=10)})
    second = Batch("w", 2, {(hour_of(NOON), ACME): Counts(requests=2), (hour_of(NOON), BASE): Counts(requests=4)})
    ledger.book([first])
    ledger.book([first, second])
    ledger.book([first, second])
    ledger.book([Batch("other", 1, first.rows)])
    assert total(ledger) == Counts(requests=8, tokens_in=20)
    assert [c.requests for _, _, c in ledger.rows(**ALWAYS, tenant="acme")] == [4]
    assert not list(ledger.rows(since=NOON + timedelta(hours=1), until=NOON + timedelta(days=9)))
    assert not list(ledger.rows(since=NOON - timedelta(hours=1), until=NOON))


def test_two_servers_book_at_once(ledger: Ledger) -> None:
    def server(writer: str) -> None:
        for number in range(1, 11):
            ledger.book([Batch(writer, number, {(hour_of(NOON), line): Counts(requests=1) for line in (ACME, BASE)})])

    servers = [threading.Thread(target=server, args=(f"w{n}",)) for n in range(4)]
    for one in servers:
        one.start()
    for one in servers:
        one.join()
    assert total(ledger) == Counts(requests=80)


def test_a_database_without_usage_and_one_of_a_newer_program(tmp_path: Path, ledger: Ledger) -> None:
    ledger.book([Batch("w", 1, {(hour_of(NOON), ACME): Counts(requests=1)})])
    with sqlite3.connect(tmp_path / "home" / "adapterhub.db") as other:
        other.execute("ALTER TABLE usage ADD COLUMN energy INTEGER NOT NULL DEFAULT 0")
        other.execute("UPDATE alembic_version SET version_num = '9999'")
    ledger.book([Batch("w", 2, {(hour_of(NOON), ACME): Counts(requests=1)})])
    assert total(ledger) == Counts(requests=2)
    with sqlite3.connect(tmp_path / "home" / "adapterhub.db") as other:
        other.execute("DROP TABLE usage")
    assert total(ledger) == Counts()


def test_the_first_revision_is_brought_up_to_date_with_what_is_in_it(tmp_path: Path) -> None:
    from alembic import command
    from alembic.config import Config

    opened = open_database(default_url(tmp_path))
    opened._create_file()
    with opened._engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", "adapterhub.serving:migrations")
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(sa.text("INSERT INTO tenants (name, base, weight, created) VALUES ('acme', 1, 1, '')"))
    Ledger(opened).book([Batch("w", 1, {(hour_of(NOON), ACME): Counts(requests=1)})])
    with opened.read() as connection:
        assert database.revision(connection) == database.HEAD
        assert connection.execute(sa.text("SELECT name FROM tenants")).scalar() == "acme"


# ── the way there ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.anyio
class TestMetering:
    @pytest.fixture
    def seconds(self) -> list[float]:
        return [0.0]

    @pytest.fixture
    def now(self) -> list[datetime]:
        return [NOON]

    @pytest.fixture
    def make(
        self, tmp_path: Path, ledger: Ledger, seconds: list[float], now: list[datetime]
    ) -> Iterator[Callable[[], Metering]]:
        """Servers, all with one spool folder; killed at the end."""
        made = []

        def make() -> Metering:
            made.append(Metering(ledger, tmp_path / "spool", keyed=True, clock=lambda: seconds[0], now=lambda: now[0]))
            return made[-1]

        yield make
        for metering in made:
            metering._spool._file.close()

    async def test_what_is_counted_is_booked_once_and_nothing_stays_behind(
        self, make: Callable[[], Metering], ledger: Ledger, tmp_path: Path
    ) -> None:
        metering = make()
        for _ in range(3):
            metering.add(ACME, Counts(requests=1, tokens_out=5))
            await metering.flush()
            await metering.flush()
        metering.add(BASE, Counts(requests=1))
        await metering.close()
        assert total(ledger) == Counts(requests=4, tokens_out=15)
        assert not list((tmp_path / "spool").iterdir())

    async def test_residence_is_counted_by_a_clock_that_never_goes_back(
        self, make: Callable[[], Metering], ledger: Ledger, seconds: list[float], now: list[datetime]
    ) -> None:
        metering = make()
        metering.loaded("acme/support@3")
        seconds[0] = 10.25
        await metering.flush()
        now[0] -= timedelta(days=400)  # somebody sets the clock
        seconds[0] = 12.5
        metering.forgot("acme/support@3")
        metering.forgot("acme/support@3")
        seconds[0] = 99
        await metering.close()
        rows = list(ledger.rows(**ALWAYS))
        assert total(ledger) == Counts(cold_loads=1, resident_ms=12_500)
        assert [hour for hour, _, _ in rows] == ["2025-10-21T12", "2026-11-25T12"]
        assert {line for _, line, _ in rows} == {Line("acme", "", "acme/support", 3)}

    async def test_a_locked_database_is_waited_out(
        self, make: Callable[[], Metering], ledger: Ledger, tmp_path: Path, seconds: list[float],
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(database, "WAIT_SECONDS", 0)
        metering = make()
        metering.add(ACME, Counts(requests=1))
        await metering.flush()
        with sqlite3.connect(tmp_path / "home" / "adapterhub.db", isolation_level=None) as other:
            other.execute("BEGIN EXCLUSIVE")
            for _ in range(3):
                metering.add(ACME, Counts(requests=1))
                seconds[0] += 5
                await metering.flush()
            assert metering.lag == 15
            assert caplog.text.count("usage waits in") == 1
            other.execute("ROLLBACK")
        await metering.flush()
        assert total(ledger) == Counts(requests=4)
        assert metering.lag == 0 and "can be written again" in caplog.text
        await metering.close()

    async def test_what_a_server_left_behind_is_booked_by_the_next_once(
        self, make: Callable[[], Metering], ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gone = make()
        with monkeypatch.context() as patch:
            patch.setattr(Database, "write", _away)
            gone.add(ACME, Counts(requests=7))
            await gone.flush()
        left = next((tmp_path / "spool").iterdir())
        text = left.read_bytes()
        gone._spool._file.close()  # it was killed: nothing else of it ever runs
        left.write_bytes(text + b'["half a li')
        following = [make(), make()]
        for metering in following:
            await metering.flush()
        assert total(ledger) == Counts(requests=7)
        assert not left.exists()
        left.write_bytes(text)  # as if the machine had forgotten that it was removed
        await make().flush()
        assert total(ledger) == Counts(requests=7)

    async def test_a_living_servers_spool_is_its_own(self, make: Callable[[], Metering], tmp_path: Path) -> None:
        make()
        with pytest.raises(Conflict):
            Spool(next((tmp_path / "spool").iterdir()))

    async def test_a_full_disk_leaves_it_in_memory(
        self, make: Callable[[], Metering], ledger: Ledger, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        metering = make()

        def full(fd: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            patch.setattr(Database, "write", _away)
            metering.add(ACME, Counts(requests=2))
            await metering.flush()
        assert "usage waits in memory" in caplog.text and "No space left" in caplog.text
        metering.add(ACME, Counts(requests=1))
        await metering.close()
        assert total(ledger) == Counts(requests=3)

    async def test_a_deleted_database_and_a_deleted_spool(
        self, make: Callable[[], Metering], ledger: Ledger, tmp_path: Path
    ) -> None:
        metering = make()
        metering.add(ACME, Counts(requests=1))
        await metering.flush()
        for file in [*(tmp_path / "home").iterdir(), *(tmp_path / "spool").iterdir()]:
            file.unlink()
        metering.add(ACME, Counts(requests=5))
        await metering.close()
        assert total(ledger) == Counts(requests=5), "a new database, for what comes from now on"


def _away(*args: object, **options: object) -> None:
    raise StorageError("the database is away")


# ── a server that is killed ──────────────────────────────────────────────────────────────────────────────────

SERVER = """
import asyncio, sys
from pathlib import Path
from adapterhub.serving.database import default_url, open_database
from adapterhub.serving.bill.ledger import Ledger
from adapterhub.serving.bill.metering import Metering
from adapterhub.serving.usage import Counts, Line

async def main(home, spool):
    metering = Metering(Ledger(open_database(default_url(home))), spool, keyed=True)
    while True:
        metering.add(Line("acme", "k", "acme/support", 1), Counts(requests=1, tokens_out=3))
        print("counted", flush=True)
        await metering.flush()
        print("flushed", flush=True)

asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
"""


@pytest.mark.slow
def test_a_server_killed_anywhere_loses_one_interval_at_most_and_doubles_nothing(
    tmp_path: Path, ledger: Ledger
) -> None:
    """SIGKILL in the middle of a flush, again and again; each server takes up what the one before left."""
    least = most = 0
    for run in range(6):
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(tmp_path / "home"), str(tmp_path / "spool")],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdout is not None
        rng, said = random.Random(run), []
        flushes = rng.randint(1, 12)
        for line in server.stdout:
            said.append(line)
            if said.count("flushed\n") == flushes and line == "counted\n":
                break  # the flush is under way
        for _ in range(rng.randint(0, 20_000)):
            pass
        server.send_signal(signal.SIGKILL)
        said += server.stdout.readlines()
        server.wait()
        server.stdout.close()
        least += said.count("flushed\n")
        most += said.count("counted\n")
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path / "home"), str(tmp_path / "spool")],
        stdout=subprocess.PIPE, text=True,
    ) as last:  # fmt: skip
        assert last.stdout is not None
        said = []
        for line in last.stdout:
            said.append(line)
            if line == "flushed\n":
                break
        last.send_signal(signal.SIGKILL)
        said += last.stdout.readlines()
    least += said.count("flushed\n")
    most += said.count("counted\n")
    booked = total(ledger)
    assert least <= booked.requests <= most
    assert most - least <= 7, "at most one interval of each server"
    assert booked.tokens_out == 3 * booked.requests
