"""A stand-in for the Hugging Face Hub over HTTP: repositories with commits, branches, tags and large files.

It does what the real one does to the requests that huggingface_hub sends: commits name their parent (412), tags and
branches are created once (409), a .gitignore hides files, private repositories are not there for others, large files
are uploaded by their sha256. What can go wrong there goes wrong here when a test asks for it: `HubServer.fail`.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITER, READER = "hf_writer", "hf_reader"  # tokens
_PAGE = 100  # repositories of one listing


@dataclass(frozen=True)
class File:
    data: bytes
    large: bool

    @property
    def sha1(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data, usedforsecurity=False).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        return self.sha256 if self.large else self.sha1


Tree = dict[str, File]


@dataclass
class Repository:
    private: bool = True
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    trees: dict[str, Tree] = field(default_factory=dict)  # of each commit
    parents: dict[str, str] = field(default_factory=dict)

    def commit(self, tree: Tree, parent: str, message: str) -> str:
        listed = sorted((path, file.oid) for path, file in tree.items())
        oid = hashlib.sha1(repr((listed, parent, message, len(self.trees))).encode(), usedforsecurity=False).hexdigest()
        self.trees[oid], self.parents[oid] = tree, parent
        return oid

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision) or self.tags.get(revision) or (revision if revision in self.trees else None)


@dataclass
class Fault:
    """Answers ``status`` to the next ``times`` requests that match; ``lost``: after having done what was asked."""

    method: str
    path: str  # regular expression
    status: int
    times: int = 1
    lost: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    code: str = ""  # X-Error-Code


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


class HubServer:
    """One Hub, on a free port of this machine."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.renamed: dict[str, str] = {}
        self.large: dict[str, bytes] = {}  # sha256 → bytes
        self.uploaded: list[str] = []  # sha256 of what was sent
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.hidden: list[str] = []  # files that are never taken
        self.stale_refs: dict[str, list[Any]] = {}  # answers of earlier to give out first
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        self._thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def fail(self, method: str, path: str, status: int, **how: Any) -> None:
        self.faults.append(Fault(method, path, status, **how))

    def clear(self) -> None:
        for kept in (
            self.repositories,
            self.renamed,
            self.large,
            self.uploaded,
            self.faults,
            self.requests,
            self.hidden,
        ):
            kept.clear()
        self.stale_refs.clear()

    def create(self, repo: str, *, private: bool = True) -> Repository:
        made = Repository(private=private)
        made.branches["main"] = made.commit({".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "", "init")
        self.repositories[repo] = made
        return made

    def put(self, repo: str, branch: str, **files: bytes) -> str:
        """A commit by somebody else."""
        found = self.repositories[repo]
        tree = dict(found.trees[found.branches[branch]])
        tree |= {path: File(data, path.endswith(".safetensors")) for path, data in files.items()}
        found.branches[branch] = found.commit(tree, found.branches[branch], "by hand")
        return found.branches[branch]

    def tree(self, repo: str, revision: str) -> dict[str, bytes]:
        found = self.repositories[repo]
        return {path: file.data for path, file in found.trees[str(found.find(revision))].items()}

    def answer_refs(self, repo: str) -> dict[str, Any]:
        found = self.repositories[repo]
        return {"branches": _refs("heads", found.branches), "tags": _refs("tags", found.tags), "converts": []}

    def rename(self, old: str, new: str) -> None:
        self.repositories[new] = self.repositories.pop(old)
        self.renamed[old] = new


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one packet an answer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):  # every method the same way
            return self._serve
        raise AttributeError(name)

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        try:
            with self.hub.lock:
                self.hub.requests.append(f"{self.command} {path}")
                fault = self._fault(path)
                if fault and not fault.lost:
                    raise Refused(fault.status, "as the test asked", fault.code)
                answer = self._route(path, body)
                if fault:
                    raise Refused(fault.status, "as the test asked", fault.code)
            self._send(*answer)
        except Refused as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            headers |= {"X-Error-Message": refused.message} | (fault.headers if fault else {})
            if "Location" in refused.body:
                headers["Location"] = refused.body.pop("Location")
            self._send(refused.status, json.dumps({"error": refused.message, **refused.body}).encode(), headers)

    def _chunked(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _fault(self, path: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    # ── routes ───────────────────────────────────────────────────────────────────────────────────────────────

    def _route(self, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        for old, new in self.hub.renamed.items():
            if re.search(rf"(/api/models|^)/{re.escape(old)}(/|\.git|$)", path):
                raise Refused(307, "renamed", Location=self.hub.endpoint + self.path.replace(old, new))
        for method, pattern, serve in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method == ("GET" if self.command == "HEAD" else self.command):
                answer = serve(self, body, *found.groups())
                return answer if isinstance(answer, tuple) else (200, json.dumps(answer).encode(), {})
        raise Refused(404, f"no such page: {self.command} {path}")

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _repository(self, repo: str, *, write: bool = False) -> Repository:
        if self.token not in {"", WRITER, READER}:
            raise Refused(401, "Invalid credentials in Authorization header")
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not self.token):
            raise Refused(404 if self.token else 401, "Repository not found", "RepoNotFound")
        if found.gated and self.token != WRITER:
            raise Refused(403, "Access to this repository is restricted", "GatedRepo")
        self._check_writer(write)
        return found

    def _check_writer(self, write: bool = True) -> None:
        if write and self.token != WRITER:
            raise Refused(403 if self.token else 401, "You don't have the rights to write here")

    def _at(self, repo: str, revision: str) -> tuple[Repository, str]:
        found = self._repository(repo)
        commit = found.find(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found, commit

    def create_repository(self, body: bytes) -> Any:
        self._check_writer()
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        url = f"{self.hub.endpoint}/{repo}"
        if repo in self.hub.repositories:
            raise Refused(409, "You already created this model repo", url=url)
        self.hub.create(repo, private=asked.get("visibility") == "private" or asked.get("private", False))
        return {"url": url, "id": repo}

    def delete_repository(self, body: bytes) -> Any:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        self._repository(repo, write=True)
        del self.hub.repositories[repo]
        return {}

    def validate(self, body: bytes) -> Any:
        front = re.match(r"\A---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        if not front:
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        base = yaml.safe_load(front[1]).get("base_model", "a/b")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            said = '"base_model" with value is not valid. Use a model id from https://hf.co/models.'
            raise Refused(400, said, errors=[{"message": said}], warnings=[])
        return {"errors": [], "warnings": []}

    def models(self, body: bytes) -> Any:
        if self.token not in {"", WRITER, READER}:
            raise Refused(401, "Invalid credentials in Authorization header")
        query = parse_qs(urlsplit(self.path).query)
        after, author = query.get("cursor", [""])[0], query["author"][0]
        seen = sorted(
            repo
            for repo, found in self.hub.repositories.items()
            if repo.startswith(f"{author}/") and repo > after and (self.token or not found.private)
        )
        page = json.dumps([{"id": repo, "modelId": repo, "tags": []} for repo in seen[:_PAGE]]).encode()
        more = (
            f'<{self.hub.endpoint}/api/models?author={author}&cursor={seen[_PAGE - 1]}>; rel="next"'
            if seen[_PAGE:]
            else ""
        )
        return 200, page, {"Link": more} if more else {}

    def model(self, body: bytes, repo: str, revision: str | None = None) -> Any:
        found, commit = self._at(repo, revision or "main")
        files = [{"rfilename": path} for path in found.trees[commit]]
        return {"id": repo, "modelId": repo, "sha": commit, "private": found.private, "siblings": files, "tags": []}

    def refs(self, body: bytes, repo: str) -> Any:
        self._repository(repo)
        if self.hub.stale_refs.get(repo):
            return self.hub.stale_refs[repo].pop(0)
        return self.hub.answer_refs(repo)

    def tree(self, body: bytes, repo: str, revision: str) -> Any:
        found, commit = self._at(repo, revision)
        listed: list[dict[str, Any]] = []
        for path, file in found.trees[commit].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.data), "oid": file.sha1}
            if file.large:
                entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": 130}
            listed.append(entry)
        folders = {path.rpartition("/")[0] for path in found.trees[commit]} - {""}
        return listed + [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]

    def preupload(self, body: bytes, repo: str, revision: str) -> Any:
        self._repository(repo, write=True)
        found, commit = self._at(repo, revision)
        tree, asked = found.trees[commit], json.loads(body)
        hidden = tree.get(".gitignore", File(b"", False)).data.decode().split()
        hidden = (asked["gitIgnore"].split() if "gitIgnore" in asked else hidden) + self.hub.hidden
        return {"files": [_upload_mode(file["path"], tree, hidden) for file in asked["files"]]}

    def lfs_batch(self, body: bytes, repo: str) -> Any:
        self._repository(repo, write=True)
        objects: list[dict[str, Any]] = []
        for wanted in json.loads(body)["objects"]:
            href = f"{self.hub.endpoint}/lfs/{wanted['oid']}"
            there = wanted["oid"] in self.hub.large
            objects.append(wanted | ({} if there else {"actions": {"upload": {"href": href, "header": {}}}}))
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, body: bytes, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "the sha256 differs")
        self.hub.large[oid] = body
        self.hub.uploaded.append(oid)
        return {}

    def commit(self, body: bytes, repo: str, branch: str) -> Any:
        found = self._repository(repo, write=True)
        head = found.branches.get(branch)
        if head is None:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", head) != head:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(found.trees[head])
        for line in lines:
            self._apply(tree, line["key"], line["value"])
        oid = found.branches[branch] = found.commit(tree, head, header["summary"])
        return {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None}

    def _apply(self, tree: Tree, key: str, value: dict[str, Any]) -> None:
        if key == "file":
            tree[value["path"]] = File(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.large:
                raise Refused(400, f"{value['path']} was never uploaded")
            tree[value["path"]] = File(self.hub.large[value["oid"]], True)
        elif key == "deletedFile":
            del tree[value["path"]]

    def tag(self, body: bytes, repo: str, revision: str) -> Any:
        found = self._repository(repo, write=True)
        name, (_, commit) = json.loads(body)["tag"], self._at(repo, revision)
        if name in found.tags:
            raise Refused(409, "Tag reference exists already")
        found.tags[name] = commit
        return {}

    def branch(self, body: bytes, repo: str, name: str) -> Any:
        found = self._repository(repo, write=True)
        if name in found.branches:
            raise Refused(409, "Reference already exists")
        found.branches[name] = self._at(repo, json.loads(body).get("startingPoint", "main"))[1]
        return {}

    def delete_branch(self, body: bytes, repo: str, name: str) -> Any:
        if self._repository(repo, write=True).branches.pop(name, None) is None:
            raise Refused(404, "no such branch", "RevisionNotFound")
        return {}

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> Any:
        found, commit = self._at(repo, revision)
        file = found.trees[commit].get(path)
        if file is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        headers = {"ETag": f'"{file.oid}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not start:
            return 200, file.data, headers
        if int(start[1]) >= len(file.data):
            raise Refused(416, "Range Not Satisfiable")
        span = f"bytes {start[1]}-{len(file.data) - 1}/{len(file.data)}"
        return 206, file.data[int(start[1]) :], headers | {"Content-Range": span}


def _refs(kind: str, names: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": commit} for n, commit in names.items()]


def _upload_mode(path: str, tree: Tree, hidden: list[str]) -> dict[str, Any]:
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    there = {"oid": tree[path].oid} if path in tree else {}
    ignored = any(fnmatch.fnmatch(path, pattern) for pattern in hidden)
    return {"path": path, "uploadMode": mode, "shouldIgnore": ignored, **there}


_ID = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("POST", "/api/repos/create", _Handler.create_repository),
    ("DELETE", "/api/repos/delete", _Handler.delete_repository),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", "/api/models", _Handler.models),
    ("GET", f"/api/models/{_ID}", _Handler.model),
    ("GET", f"/api/models/{_ID}/revision/(.+)", _Handler.model),
    ("GET", f"/api/models/{_ID}/refs", _Handler.refs),
    ("GET", f"/api/models/{_ID}/tree/([^/]+)", _Handler.tree),
    ("POST", f"/api/models/{_ID}/preupload/(.+)", _Handler.preupload),
    ("POST", f"/api/models/{_ID}/commit/(.+)", _Handler.commit),
    ("POST", f"/api/models/{_ID}/tag/(.+)", _Handler.tag),
    ("POST", f"/api/models/{_ID}/branch/(.+)", _Handler.branch),
    ("DELETE", f"/api/models/{_ID}/branch/(.+)", _Handler.delete_branch),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]{64})", _Handler.lfs_put),
    ("GET", f"/{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
