"""From a draft to a version on the Hub: its commit on a branch of its own, then the tag. The tag is the commit point.

    ah-staging-…      from main: stale files out, the version's files, record and card in; read back
    v<n>              created on that commit, n = newest + 1; where it is taken, a commit with the next number
    main              the same files once more, unless a newer version is there

Killed before the tag, a publish leaves a staging branch that nobody reads, and that a later publish of the adapter
or `ah gc` removes after a week; one that was paused for so long is told to start over. Every commit has the record in
it, so none is empty, and a reply that was lost is known by the record's publish id.
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterhub.errors import AdapterError, AlreadyExists, Conflict, IntegrityError, NotFound, StorageError
from adapterhub.manifest import FileEntry, Record, parse_json
from adapterhub.refs import AdapterName
from adapterhub.registry.base import Draft, Progress
from adapterhub.registry.clock import now
from adapterhub.registry.files import hashed, storage_errors
from adapterhub.registry.hub import layout
from adapterhub.registry.hub.card import card
from adapterhub.registry.hub.client import Blob, Hub
from adapterhub.registry.hub.errors import Busy, NoRepository, Stale
from adapterhub.registry.rules import free_number, tenant_gone

log = logging.getLogger(__name__)

_TRIES = 30  # of one step: nobody else writes to a staging branch, so more than two are a Hub in trouble
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0  # seconds, before jitter
_ABANDONED = 7 * 24 * 3600  # seconds that a publish may be under way, whatever the clocks of two machines
_SMALL = 1 << 20  # bytes of a file that is read once, and cannot change after that

Content = Mapping[str, bytes | Path]


@dataclass(frozen=True)
class Prepared:
    """A draft's files as they go into a repository."""

    manifest_files: tuple[FileEntry, ...]
    content: Content  # by place in the repository
    base: str  # what the adapter's config names
    readme: str


class HubPublisher:
    """Publishes into one organisation."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def publish(
        self,
        draft: Draft,
        *,
        name: AdapterName,
        author: str,
        labels: Mapping[str, str],
        number: int | None,
        progress: Progress | None,
    ) -> Record:
        """As `base.Registry.publish`."""
        repo = layout.repository(self._hub.org, name)
        layout.check_files(draft.manifest)
        files = prepare(draft)
        main = self._open_repository(repo, name)
        publish_id = uuid.uuid4().hex
        branch = layout.staging(publish_id, int(time.time() * 1000))
        self._hub.create_branch(repo, branch, main)
        try:
            record = Record(
                name=name,
                version=1,
                digest=draft.manifest.digest,
                manifest=draft.manifest,
                publish_id=publish_id,
                created=now(),
                author=author,
                verdicts=draft.verdicts,
                labels=labels,
            )
            record = self._tagged(repo, branch, record, files, main=main, wanted=number)
        finally:
            self._clear(repo, branch)
        if record.version == 1 and self.is_gone(name.tenant):
            self._hub.delete_repository(repo)  # the tenant was deleted between our look and our tag
            raise tenant_gone(name.tenant)
        self._show(repo, record, files)
        for file in draft.manifest.files if progress else ():
            progress(file.size)  # type: ignore[misc]
        return record

    def is_gone(self, tenant: str) -> bool:
        """Whether the tenant was deleted."""
        try:
            self._hub.read(f"{self._hub.org}/{layout.BOOK}", layout.gone(tenant), layout.MAIN)
        except NotFound:
            return False
        return True

    def _open_repository(self, repo: str, name: AdapterName) -> str:
        """The head of main, in a repository that is there and ours."""
        try:
            refs = self._hub.refs(repo)
        except NoRepository:
            if self.is_gone(name.tenant):
                raise tenant_gone(name.tenant) from None
            self._hub.create_repository(repo)
            refs = self._hub.refs(repo)
        if layout.LOG_BRANCH not in refs.branches:
            if any(layout.number_of(tag) for tag in refs.tags):
                raise AlreadyExists(
                    f"the repository {repo} has tags like ours, and was not made by AdapterHub",
                    why=f"it has no branch {layout.LOG_BRANCH}",
                    hint=f"publish under another name, or bring it in: ah publish hf://{repo} --name …",
                )
            self._hub.create_branch(repo, layout.LOG_BRANCH, refs.branches[layout.MAIN])
        self._check_owner(repo, name, refs.branches[layout.MAIN])
        for branch in abandoned(refs.branches):
            self._clear(repo, branch)
        return refs.branches[layout.MAIN]

    def sweep(self, name: AdapterName, *, dry_run: bool) -> int:
        """Remove the branches of publishes that were killed long ago; how many there were."""
        repo = layout.repository(self._hub.org, name)
        try:
            left = abandoned(self._hub.refs(repo).branches)
        except NoRepository:
            return 0  # deleted since it was listed
        for branch in () if dry_run else left:
            self._hub.delete_branch(repo, branch)
        return len(left)

    def _check_owner(self, repo: str, name: AdapterName, commit: str) -> None:
        """Raises IntegrityError for the repository of another adapter, StorageError for one that was renamed."""
        found = self._record_at(repo, commit)
        owner = f"{found.get('tenant')}/{found.get('adapter')}"
        if found and owner != str(name):
            raise IntegrityError(
                f"the repository {repo} holds versions of {owner}",
                why="it was renamed on the Hub",
                hint=f"give it its name back in its settings on the Hub: {self._hub.page(repo)}",
            )

    # ── the commit and its tag ───────────────────────────────────────────────────────────────────────────────

    def _tagged(
        self, repo: str, branch: str, record: Record, files: Prepared, *, main: str, wanted: int | None
    ) -> Record:
        newest, head, adding = 0, main, files.content
        for attempt in range(10 * _TRIES):
            newest = max(newest, self._newest(repo))  # a look may be older than what a refused tag told
            record = _numbered(record, free_number(record.name, newest, wanted))
            head = self._commit(repo, branch, head, record, {**adding, **_front(record, files)}, keep=files.content)
            if adding:
                _check_tree(self._hub.tree(repo, head), files, repo)
                adding = {}
            if self._tag(repo, record, head):
                return record
            newest = max(newest, record.version)
            self._pause(attempt)
        raise _no_end(repo)

    def _newest(self, repo: str) -> int:
        numbers = (layout.number_of(tag) for tag in self._hub.refs(repo).tags)
        return max((number for number in numbers if number), default=0)

    def _tag(self, repo: str, record: Record, commit: str) -> bool:
        """Whether the tag of the record's number is on this commit, or on one of ours whose reply was lost."""
        name = layout.tag(record.version)
        for attempt in range(_TRIES):
            try:
                if self._hub.tag(repo, name, commit):
                    return True
                return self._publish_id(repo, name) == record.publish_id
            except Busy:
                if self._publish_id(repo, name) == record.publish_id:
                    return True
                self._pause(attempt)
        raise _no_end(repo)

    def _publish_id(self, repo: str, revision: str) -> str:
        """Of the version there; empty where none is."""
        return str(self._record_at(repo, revision).get("publish_id", ""))

    def _commit(self, repo: str, branch: str, parent: str, record: Record, add: Content, *, keep: Content) -> str:
        """The new head of ``branch``, with these files and of others only what is in ``keep``."""
        for attempt in range(_TRIES):
            try:
                return self._lay(repo, branch, parent, record, add, keep=keep)
            except (Busy, Stale):
                self._pause(attempt)
                parent = self._hub.refs(repo).branches.get(branch, parent)
                there = self._record_at(repo, parent)
                if (there.get("publish_id"), there.get("version")) == (record.publish_id, record.version):
                    return parent  # the reply was lost, the commit was not
        raise _no_end(repo)

    def _record_at(self, repo: str, revision: str) -> dict[str, Any]:
        """The record's JSON; empty where none is."""
        try:
            found = parse_json(self._hub.read(repo, layout.RECORD, revision), what=f"{layout.RECORD} of {repo}")
        except NotFound:
            return {}
        return found if isinstance(found, dict) else {}

    # ── afterwards ───────────────────────────────────────────────────────────────────────────────────────────

    def _show(self, repo: str, record: Record, files: Prepared) -> None:
        """Move main to the version, unless a newer one is there. The version is published with or without."""
        add = {**files.content, **_front(record, files)}
        try:
            for attempt in range(_TRIES):
                head = self._hub.refs(repo).branches[layout.MAIN]
                if int(self._record_at(repo, head).get("version", 0)) >= record.version:
                    return
                try:
                    self._lay(repo, layout.MAIN, head, record, add, keep=add)
                    return
                except (Busy, Stale):
                    self._pause(attempt)
        except (StorageError, Conflict, NotFound) as error:
            log.warning("%s is published, but the branch main of %s did not move: %s", record.ref, repo, error)

    def _lay(self, repo: str, branch: str, parent: str, record: Record, add: Content, *, keep: Content) -> str:
        """One commit, and one before it where files of another version are in the way."""
        stale = [path for path in self._hub.tree(repo, parent) if path not in {*keep, *layout.KEPT}]
        if stale:  # in a commit of its own: a .gitignore among them would hide what is added
            message = f"Make room for {record.ref} ({record.publish_id})"
            parent = self._hub.commit(repo, branch, parent=parent, message=message, delete=stale)
        return self._hub.commit(repo, branch, parent=parent, message=f"Publish {record.ref}", add=add)

    def _clear(self, repo: str, branch: str) -> None:
        try:
            self._hub.delete_branch(repo, branch)
        except (StorageError, Conflict, NotFound) as error:
            log.warning("the branch %s of %s is left over, it can be deleted: %s", branch, repo, error)

    def _pause(self, attempt: int) -> None:
        self._hub.wait(random.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt)))  # noqa: S311 - jitter


def abandoned(branches: Iterable[str]) -> list[str]:
    """Those of publishes that began so long ago that they were killed, or start over."""
    horizon = (time.time() - _ABANDONED) * 1000
    began = {branch: layout.staged_at(branch) for branch in branches}
    return [branch for branch, then in began.items() if then is not None and then < horizon]


def prepare(draft: Draft) -> Prepared:
    """Read and hash what is published. Raises AdapterError for a file that changed since it was judged."""
    content = {layout.place(file.path): _content(draft, file) for file in draft.manifest.files}
    config, readme = content.get("adapter_config.json", b"{}"), content.get(layout.place(layout.CARD), b"")
    named = parse_json(config, what="adapter_config.json") if isinstance(config, bytes) else {}
    base = named.get("base_model_name_or_path") if isinstance(named, dict) else None
    known = draft.manifest.base.name if draft.manifest.base else ""
    return Prepared(
        manifest_files=draft.manifest.files,
        content=content,
        base=base if isinstance(base, str) else known,
        readme=readme.decode(errors="replace") if isinstance(readme, bytes) else "",
    )


def _content(draft: Draft, file: FileEntry) -> bytes | Path:
    path = draft.path / file.path
    replaced = draft.replaced.get(file.path)
    with storage_errors(f"{path} cannot be read"):
        if replaced is None and file.size <= _SMALL:
            replaced = path.read_bytes()
        if replaced is not None:
            found = len(replaced), hashlib.sha256(replaced).hexdigest()
        else:
            with path.open("rb") as source:
                found = hashed(source)
    if found != (file.size, file.sha256):
        raise AdapterError(
            f"{path} changed while it was published",
            why="it has another size or sha256 than when it was judged",
            hint="publish it again when it is finished",
        )
    return replaced if replaced is not None else path


def _front(record: Record, files: Prepared) -> dict[str, bytes | Path]:
    shown = card(record, base=files.base, readme=files.readme)
    return {layout.RECORD: record.to_bytes(), layout.CARD: shown.encode()}


def _numbered(record: Record, number: int) -> Record:
    return replace(record, version=number)


def _check_tree(tree: Mapping[str, Blob], files: Prepared, repo: str) -> None:
    """Raises StorageError unless every file is in the tree as it was sent: a version is never tagged without."""
    wrong = [file.path for file in files.manifest_files if not _is_there(tree, file, files.content)]
    if wrong:
        raise StorageError(
            f"the Hub did not take all files into {repo}",
            why=f"missing or different are {', '.join(wrong)}; a .gitignore or a rule there may hide them",
            hint="look at the repository's files and the organisation's settings on the Hub; nothing was published",
        )


def _is_there(tree: Mapping[str, Blob], file: FileEntry, content: Content) -> bool:
    place = layout.place(file.path)
    blob, sent = tree.get(place), content[place]
    if blob is None or blob.size != file.size:
        return False
    if blob.sha256 is not None:
        return blob.sha256 == file.sha256
    return not isinstance(sent, bytes) or blob.sha1 == _git_name(sent)


def _git_name(content: bytes) -> str:
    """What git calls a blob: sha1 of ``blob <size>\\0`` and its bytes (git-scm.com/book, Git Internals)."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _no_end(repo: str) -> StorageError:
    return StorageError(
        f"{repo} cannot be written",
        why="the Hub refused or lost many tries in a row",
        hint="look at https://status.huggingface.co, then type the same command again",
    )
