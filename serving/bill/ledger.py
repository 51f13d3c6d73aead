"""The bill in the database: batches of `usage` are booked, each once, and read again for `ah usage`.

    Ledger(open_database(url)).book(batches)
    Ledger(open_database(url)).rows(since=…, until=…, tenant="acme")

What makes a batch count once is one number for each writer, the last that was booked, changed in the same transaction
as the counts: a batch that comes again, because nobody knew whether it had been written, is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime

import sqlalchemy as sa

from adapterhub.serving.database import Database
from adapterhub.serving.schema import usage, usage_writers
from adapterhub.serving.usage import COUNTS, Batch, Counts, Line, hour_of

_PLACE = ("hour", "tenant", "key", "adapter", "version")


class Ledger:
    """The tables ``usage`` and ``usage_writers``. Every method is one transaction; all raise StorageError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def book(self, batches: Sequence[Batch]) -> None:
        """Those of one writer in the order of their numbers. Again is the same."""
        if not batches:
            return
        with self._database.write(also_newer=True) as connection:
            for batch in batches:
                if _is_new(connection, batch):
                    _add(connection, batch)

    def rows(
        self, *, since: datetime, until: datetime, tenant: str | None = None
    ) -> Iterator[tuple[str, Line, Counts]]:
        """(hour, whose, what) of the hours from ``since``'s to before ``until``'s, in order of time."""
        found = sa.select(*usage.columns).where(usage.c.hour >= hour_of(since), usage.c.hour < hour_of(until))
        if tenant is not None:
            found = found.where(usage.c.tenant == tenant)
        with self._database.read() as connection:
            if not sa.inspect(connection).has_table(usage.name):
                return  # a database from before usage was counted, and no server wrote since
            for row in connection.execute(found.order_by(*(usage.c[name] for name in _PLACE))).mappings():
                line = Line(*(row[name] for name in _PLACE[1:]))
                yield row["hour"], line, Counts(*(row[name] for name in COUNTS))


def _is_new(connection: sa.Connection, batch: Batch) -> bool:
    """Whether it was not booked yet; from now on it is."""
    mine = usage_writers.c.writer == batch.writer
    last = connection.execute(sa.select(usage_writers.c.number).where(mine).with_for_update()).scalar()
    if last is not None and last >= batch.number:
        return False
    if last is None:
        connection.execute(usage_writers.insert().values(writer=batch.writer, number=batch.number))
    else:
        connection.execute(usage_writers.update().where(mine).values(number=batch.number))
    return True


def _add(connection: sa.Connection, batch: Batch) -> None:
    from sqlalchemy.dialects import postgresql, sqlite  # here: `ah usage` only reads

    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    row = insert(usage)
    added = row.on_conflict_do_update(
        index_elements=list(_PLACE), set_={name: usage.c[name] + row.excluded[name] for name in COUNTS}
    )
    places = [{"hour": hour, **asdict(line), **asdict(counts)} for (hour, line), counts in batch.rows.items()]
    # in one order everywhere: two servers that book at once never wait for each other in a circle
    connection.execute(added, sorted(places, key=lambda place: [place[name] for name in _PLACE]))
