"""What is in the repositories of an organisation on the Hub: names, versions, logs. Nothing is changed here.

Records and logs are read at commits, which never change, and kept: a look costs the refs of the repository.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from adapterhub.errors import IntegrityError, NotFound
from adapterhub.manifest import Record
from adapterhub.refs import AdapterName
from adapterhub.registry import rules
from adapterhub.registry.base import Version
from adapterhub.registry.hub import layout
from adapterhub.registry.hub.client import Hub, Refs
from adapterhub.registry.hub.errors import LOGIN, NoRepository
from adapterhub.registry.hub.log import Log, log_from_bytes
from adapterhub.registry.hub.state import State, numbers_of
from adapterhub.registry.parallel import side_by_side

_KEPT = 10_000  # records and logs in memory


class HubReader:
    """Looks into one organisation."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._read: dict[tuple[str, str, str], bytes] = {}  # repository, commit, path → what is there for ever

    @property
    def url(self) -> str:
        return f"hf://{self._hub.org}"

    def state(self, name: AdapterName) -> State:
        """Raises NotFound for an adapter without a version."""
        refs = self.refs(name)
        numbers = self.numbered(name, refs)
        head = refs.branches[layout.LOG_BRANCH]
        repo = layout.repository(self._hub.org, name)
        try:
            data = self._bytes(repo, head, layout.LOG)
        except NotFound:
            return State(numbers, Log(), head)
        return State(numbers, log_from_bytes(data, where=f"{layout.LOG} of {repo}"), head)

    def refs(self, name: AdapterName) -> Refs:
        try:
            return self._hub.refs(layout.repository(self._hub.org, name))
        except NoRepository as error:
            raise self._no_adapter(name) from error

    def numbered(self, name: AdapterName, refs: Refs) -> dict[int, str]:
        numbers = numbers_of(refs)
        if not numbers:
            raise self._no_adapter(name)
        return numbers

    def version(self, name: AdapterName, number: int, state: State) -> Version:
        if number not in state.numbers:
            raise rules.no_version(name, number)
        return rules.with_status(self._record(name, number, state.numbers[number]), state.log.newest_status(number))

    def versions(self, name: AdapterName, state: State, limit: int | None = None) -> list[Version]:
        return side_by_side(partial(self.version, name, state=state), list(state.numbers)[:limit])

    def names(self) -> list[AdapterName]:
        """All repositories whose name an adapter can have."""
        return [name for name in map(layout.adapter_of, self._hub.repositories()) if name]

    def published(self, names: Iterable[AdapterName]) -> list[AdapterName]:
        """Those with at least one version."""

        def refs(name: AdapterName) -> Refs | None:
            try:
                return self._hub.refs(layout.repository(self._hub.org, name))
            except NoRepository:
                return None  # deleted since it was listed

        chosen = list(names)
        found = zip(chosen, side_by_side(refs, chosen), strict=True)
        return [name for name, its in found if its and numbers_of(its)]

    def _record(self, name: AdapterName, number: int, commit: str) -> Record:
        repo = layout.repository(self._hub.org, name)
        try:
            record = Record.from_bytes(self._bytes(repo, commit, layout.RECORD))
        except NotFound as error:
            raise IntegrityError(
                f"{name}@{number} has no record",
                why=f"the tag {layout.tag(number)} of {repo} was made or moved by hand",
                hint="delete that tag on the Hub",
            ) from error
        if (record.name, record.version) != (name, number):
            raise IntegrityError(
                f"the record of {name}@{number} is that of {record.ref}",
                why=f"the repository {repo} was renamed, or a tag moved by hand",
                hint="undo that on the Hub",
            )
        return record

    def _bytes(self, repo: str, commit: str, path: str) -> bytes:
        """A file at a commit: it never changes."""
        key = repo, commit, path
        if key not in self._read:
            if len(self._read) >= _KEPT:
                self._read.clear()
            self._read[key] = self._hub.read(repo, path, commit)
        return self._read[key]

    def _no_adapter(self, name: AdapterName) -> NotFound:
        if not self._hub.has_token():
            return NotFound(
                f"there is no adapter {name} in {self.url} that everybody may see", why="no token is set", hint=LOGIN
            )
        if self.published(one for one in self.names() if one.tenant == name.tenant):
            return NotFound(f"there is no adapter {name} in {self.url}", hint=f"ah ls {name.tenant}")
        return NotFound(f"there is no tenant {name.tenant!r} in {self.url}", hint="ah ls")
