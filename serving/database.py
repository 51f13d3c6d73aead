"""Where tenants, keys and usage are kept: SQLite in ``AH_HOME``, or PostgreSQL by ``AH_DATABASE_URL``.

    with open_database(url).write() as connection:      # created, or brought up to date, where it is not
        connection.execute(…)
    with open_database(url).read() as connection:       # StorageError where it is not there; never creates

Everything that SQLAlchemy and the drivers raise becomes a StorageError here, without addresses and passwords. The
schema is in `schema`, its changes in `migrations`. Changes only add, so that a server that runs goes on reading a
database that was migrated under it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from adapterhub.errors import MissingDependency, StorageError, UsageError

HEAD = "0002"  # the newest revision in `migrations`; tests compare
WAIT_SECONDS = 5  # for a lock, and for a connection
_LOCK = 0x6164_6170  # PostgreSQL's advisory lock for migrations: one at a time


class Database:
    """One database. Threads may share it."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self.name = engine.url.render_as_string(hide_password=True)

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One consistent look. Raises StorageError."""
        with self._told(), self._engine.connect().execution_options(reading=True) as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def write(self, *, also_newer: bool = False) -> Iterator[sa.Connection]:
        """One transaction on a schema that is up to date. Raises StorageError, UsageError.

        ``also_newer``: one that a newer program made will do, for who only adds rows to what it knows.
        """
        self._create_file()
        with self._told(), self._engine.begin() as connection:
            self._upgrade(connection, also_newer=also_newer)
            yield connection

    def exists(self) -> bool:
        """Whether there is anything to read; for PostgreSQL always."""
        return self._engine.dialect.name != "sqlite" or _file(self._engine.url).is_file()

    def _create_file(self) -> None:
        """A SQLite file that only its owner reads; its journal gets the same rights."""
        if self._engine.dialect.name == "sqlite":
            path = _file(self._engine.url)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(mode=0o600)
            except OSError as error:
                raise StorageError(f"{path} cannot be written", why=error.strerror or str(error)) from error

    def _upgrade(self, connection: sa.Connection, *, also_newer: bool) -> None:
        if self._engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        present = revision(connection)
        if present == HEAD or (also_newer and present is not None and present > HEAD):
            return
        if present is not None and present > HEAD:
            raise UsageError(
                "the database is newer than this program",
                why=f"it is at revision {present}, this program knows {HEAD}",
                hint="pip install -U adapterhub",
            )
        from alembic import command
        from alembic.config import Config
        from alembic.util.exc import CommandError

        config = Config()
        config.set_main_option("script_location", "adapterhub.serving:migrations")
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise StorageError(
                f"the database {self.name} cannot be brought up to date", why=str(error), hint="ah doctor"
            ) from error

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            why = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
            locked = "locked" in why or "lock timeout" in why
            raise StorageError(
                f"the database {self.name} cannot be used",
                why=why,
                hint="another program holds it: try again" if locked else "ah doctor",
            ) from error


def open_database(url: str) -> Database:
    """Nothing is connected yet. Raises UsageError for another kind of database, MissingDependency."""
    parsed = _parse(url)
    try:
        if parsed.get_backend_name() == "sqlite":
            engine = _sqlite(parsed)
        else:
            engine = sa.create_engine(
                parsed.set(drivername="postgresql+psycopg"),
                pool_pre_ping=True,
                pool_size=1,
                hide_parameters=True,
                connect_args={"connect_timeout": WAIT_SECONDS, "options": f"-c statement_timeout={WAIT_SECONDS}s"},
            )
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        raise MissingDependency(
            "the driver for PostgreSQL is not installed", why=str(error), hint="pip install 'adapterhub[postgres]'"
        ) from error
    return Database(engine)


def revision(connection: sa.Connection) -> str | None:
    """The schema's revision; None where there is no schema."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    return found


def _parse(url: str) -> sa.URL:
    kinds = "sqlite:///path and postgresql://user@host/name"
    try:
        parsed = sa.make_url(url)
    except ArgumentError as error:
        raise UsageError("AH_DATABASE_URL is not a database URL", why=f"it can be {kinds}") from error
    kind = parsed.get_backend_name()
    if kind not in ("sqlite", "postgresql", "postgres") or (kind == "sqlite" and not parsed.database):
        raise UsageError(f"a database of kind {kind} is not supported", why=f"it can be {kinds}")
    return parsed


def _file(url: sa.URL) -> Path:
    return Path(str(url.database))


def _sqlite(url: sa.URL) -> sa.Engine:
    """Transactions begin where we say so, and a file that is not there is an error and not a new database."""
    import sqlite3

    path = _file(url).absolute()

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{path.as_uri()}?mode=rw", uri=True, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA journal_mode = WAL")  # who reads and who writes do not wait for each other
        return connection

    # a connection a use: one that is kept goes on reading a file that was deleted or replaced
    engine = sa.create_engine("sqlite://", creator=connect, poolclass=sa.NullPool, hide_parameters=True)
    engine.url = url

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        reading = connection.get_execution_options().get("reading")
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    return engine


def default_url(home: Path) -> str:
    """The database of those who named none."""
    return f"sqlite:///{home / 'adapterhub.db'}"


def masked(url: str) -> str:
    """The URL without its password, for people. Raises UsageError."""
    return _parse(url).render_as_string(hide_password=True)
