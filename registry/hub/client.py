"""One organisation on the Hub, asked through huggingface_hub: refs, trees, bytes, commits, tags.

Questions are asked again where that may help. Changes are not: whether one whose reply was lost happened is for the
caller to find out (`huberrors.Busy`), by the id that it wrote.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from adapterhub.errors import IntegrityError, StorageError
from adapterhub.registry.hub.errors import Busy, Taken, hub_errors

T = TypeVar("T")

_PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds between the tries of a question
_LONGEST = 60.0  # seconds that the Hub may ask to wait; more is an error
_MAX_JSON = 64 * 2**20  # bytes of a record or a log
_TIMEOUT = 30.0  # seconds without a byte


@dataclass(frozen=True)
class Refs:
    """Name → commit."""

    branches: Mapping[str, str]
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Blob:
    """A file of a tree."""

    size: int  # bytes
    sha1: str  # git's name of it
    sha256: str | None  # of a large file's bytes


class Hub:
    """``org`` on an endpoint. Nothing is asked, and the client not imported, before the first call."""

    def __init__(
        self,
        org: str,
        *,
        endpoint: str | None = None,
        token: str | None = None,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """``endpoint`` and ``token`` default to the client's own: ``HF_ENDPOINT``, ``HF_TOKEN``, `hf auth login`."""
        self.org = org
        self.wait = wait
        self._endpoint = endpoint
        self._token = token

    @cached_property
    def _api(self) -> Any:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # only the command line prints
        return HfApi(endpoint=self._endpoint, token=self._token, library_name="adapterhub")

    def connect(self) -> None:
        """Import the client, which takes a while. Asks nothing."""
        _ = self._api

    def page(self, repo: str) -> str:
        return f"{self._api.endpoint}/{repo}"

    def has_token(self) -> bool:
        from huggingface_hub import get_token

        return bool(self._token or get_token())

    # ── questions ────────────────────────────────────────────────────────────────────────────────────────────

    def repositories(self) -> list[str]:
        """All model repositories of the organisation that the token may see."""
        what = f"the repositories of {self.org} cannot be listed"
        return self._ask(what, self.org, lambda: [model.id for model in self._api.list_models(author=self.org)])

    def refs(self, repo: str) -> Refs:
        """Raises NoRepository."""
        found = self._ask(f"{repo} cannot be read", repo, lambda: self._api.list_repo_refs(repo))
        return Refs(
            branches={ref.name: ref.target_commit for ref in found.branches},
            tags={ref.name: ref.target_commit for ref in found.tags},
        )

    def commit_of(self, repo: str, revision: str | None = None) -> str:
        """The commit that a branch or tag of anybody's repository names now."""
        what = f"{repo}@{revision or 'main'} cannot be read"
        return str(self._ask(what, repo, lambda: self._api.model_info(repo, revision=revision).sha))

    def tree(self, repo: str, commit: str) -> dict[str, Blob]:
        """Path → file."""
        what = f"the files of {repo} cannot be listed"
        listed = self._ask(what, repo, lambda: list(self._api.list_repo_tree(repo, revision=commit, recursive=True)))
        files = (entry for entry in listed if hasattr(entry, "size"))
        return {f.path: Blob(f.size, f.blob_id, f.lfs.sha256 if f.lfs else None) for f in files}

    def read(self, repo: str, path: str, revision: str) -> bytes:
        """For JSON. Raises NotFound, IntegrityError for more than anybody writes there."""
        with self.open(repo, path, revision) as stream:
            data = stream.read(_MAX_JSON + 1)
        if len(data) > _MAX_JSON:
            raise IntegrityError(f"{path} of {repo} is too large to be read", why=f"allowed are {_MAX_JSON} bytes")
        return data

    def open(self, repo: str, path: str, revision: str, offset: int = 0) -> BinaryIO:
        """A stream over a file from byte ``offset`` on. Raises NotFound; its ``read`` Busy when the Hub goes away."""
        what = f"{path} of {repo} cannot be read"
        return self._ask(what, repo, lambda: self._open(repo, path, revision, offset, what))

    def _open(self, repo: str, path: str, revision: str, offset: int, what: str) -> BinaryIO:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(repo, path, revision=revision, endpoint=self._api.endpoint)
        headers = build_hf_headers(token=self._token, library_name="adapterhub") | {"Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        with ExitStack() as stack:
            stream = get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT, follow_redirects=True)
            response = stack.enter_context(stream)
            if response.status_code == 416:  # what the Hub has is shorter than `offset`
                return io.BytesIO()
            hf_raise_for_status(response)
            self._refuse_renamed(response, repo)
            body = _Body(response.iter_bytes(), stack.pop_all(), what)
        if offset and response.status_code != 206:
            _skip(body, offset)
        return cast(BinaryIO, io.BufferedReader(body, 1 << 20))

    def _refuse_renamed(self, response: Any, repo: str) -> None:
        asked = response.history[0].url if response.history else response.url
        if response.url.host == asked.host and f"/{repo}/" not in response.url.path:
            raise StorageError(
                f"the repository {repo} was renamed on the Hub",
                why=f"it answers from {response.url.path}",
                hint=f"give it its name back in its settings on the Hub: {repo}",
            )

    def _ask(self, what: str, repo: str, question: Callable[[], T]) -> T:
        for pause in (*_PAUSES, None):
            try:
                with hub_errors(what, page=self.page(repo)):
                    return question()
            except Busy as error:
                if pause is None or error.after > _LONGEST:
                    raise
                self.wait(max(pause, error.after))
        raise AssertionError("the last try returns or raises")

    # ── changes ──────────────────────────────────────────────────────────────────────────────────────────────

    def create_repository(self, repo: str) -> None:
        """Private. One that is there stays as it is."""
        self._ask(
            f"the repository {repo} cannot be made",
            repo,
            lambda: self._api.create_repo(repo, private=True, exist_ok=True),
        )

    def delete_repository(self, repo: str) -> None:
        """No error where there is none."""
        what = f"the repository {repo} cannot be deleted"
        self._ask(what, repo, lambda: self._api.delete_repo(repo, missing_ok=True))

    def create_branch(self, repo: str, branch: str, commit: str) -> None:
        """One that is there stays where it is."""
        what = f"{repo} cannot be written"
        self._ask(what, repo, lambda: self._api.create_branch(repo, branch=branch, revision=commit, exist_ok=True))

    def delete_branch(self, repo: str, branch: str) -> None:
        what = f"the branch {branch} of {repo} cannot be removed"
        self._ask(what, repo, lambda: self._api.delete_branch(repo, branch=branch))

    def commit(
        self,
        repo: str,
        branch: str,
        *,
        parent: str,
        message: str,
        add: Mapping[str, bytes | Path] | None = None,
        delete: Sequence[str] = (),
    ) -> str:
        """The new head of a branch whose head was ``parent``. Raises Stale; Busy where nobody knows."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        with hub_errors(f"{repo} cannot be written", page=self.page(repo)):
            operations = [CommitOperationDelete(path) for path in delete]
            operations += [CommitOperationAdd(path, content) for path, content in (add or {}).items()]
            made = self._api.create_commit(
                repo, operations, commit_message=message, revision=branch, parent_commit=parent
            )
        return str(made.oid)

    def tag(self, repo: str, name: str, commit: str) -> bool:
        """Whether the tag was created; False where one of that name is there. Raises Busy where nobody knows."""
        try:
            with hub_errors(f"{repo} cannot be tagged {name}", page=self.page(repo)):
                self._api.create_tag(repo, tag=name, revision=commit)
        except Taken:
            return False
        return True


class _Body(io.RawIOBase):
    """The body of a response, as a file."""

    def __init__(self, chunks: Iterator[bytes], stack: ExitStack, what: str) -> None:
        self._chunks = chunks
        self._stack = stack
        self._what = what
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            with hub_errors(self._what):
                chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = chunk
        taken = min(len(buffer), len(self._left))
        buffer[:taken] = self._left[:taken]
        self._left = self._left[taken:]
        return taken

    def close(self) -> None:
        if not self.closed:
            self._stack.close()
        super().close()


def _skip(body: io.RawIOBase, offset: int) -> None:
    """For a Hub that answered with the whole file."""
    while offset and (chunk := body.read(min(offset, 1 << 20))):
        offset -= len(chunk)
