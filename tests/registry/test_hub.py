"""Registries on the Hub, with the real client against a stand-in: what is pushed, and what goes wrong there."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapterhub.errors import (
    AlreadyExists,
    Conflict,
    Gone,
    IntegrityError,
    InvalidName,
    NotFound,
    StorageError,
    Unsupported,
    UsageError,
)
from adapterhub.manifest import BaseFingerprint, FileEntry
from adapterhub.refs import AdapterName, AdapterRef
from adapterhub.registry import Draft, open_registry, open_store
from adapterhub.registry.base import Signature
from adapterhub.registry.hub import layout
from adapterhub.registry.hub.client import Hub
from adapterhub.registry.hub.errors import Busy
from adapterhub.registry.hub.publish import HubPublisher
from adapterhub.registry.hub.registry import HubRegistry
from adapterhub.registry.lifecycle.gc import collect

Drafts = Callable[..., Draft]
REPO = "acme-models/acme.support"
WEIGHTS = "adapter_model.safetensors"


def registry_on(server: Any, **how: Any) -> HubRegistry:
    chosen = {"token": "hf_writer", "wait": lambda seconds: None} | how
    return HubRegistry("acme-models", endpoint=server.endpoint, **chosen)


@pytest.fixture
def hub(hub_server: Any) -> HubRegistry:
    return registry_on(hub_server)


def with_file(draft: Draft, path: str, content: bytes) -> Draft:
    (draft.path / path).parent.mkdir(parents=True, exist_ok=True)
    (draft.path / path).write_bytes(content)
    entry = FileEntry(path, len(content), hashlib.sha256(content).hexdigest())
    return replace(draft, manifest=replace(draft.manifest, files=(*draft.manifest.files, entry)))


# ── what is pushed ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_version_is_a_model_repository(
    hub: HubRegistry, hub_server: Any, new_draft: Drafts, name: AdapterName
) -> None:
    base = BaseFingerprint("some/base", "l", "c", "v", "F32", 1)
    draft = new_draft("weights")
    hub.publish(replace(draft, manifest=replace(draft.manifest, base=base)), name=name, author="ana")
    repo = hub_server.repositories[REPO]
    assert repo.private
    assert set(repo.branches) == {"main", "ah-channels"}  # nothing is left of the staging
    for revision in ("v1", "main"):
        tree = hub_server.tree(REPO, revision)
        assert tree[WEIGHTS] == b"weights"
        assert tree["adapter_config.json"] == b"{}"
        assert b"base_model: some/base" in tree["README.md"]
        assert b"library_name: peft" in tree["README.md"]


def test_the_own_readme_of_a_version_stays(
    hub: HubRegistry, hub_server: Any, new_draft: Drafts, name: AdapterName, tmp_path: Path
) -> None:
    readme = b"---\nbase_model: /home/ana/base\nlicense: mit\n---\n# Our words\n"  # the Hub would refuse this head
    record = hub.publish(with_file(new_draft(), "README.md", readme), name=name, author="ana")
    hub.fetch_file(record, "README.md", tmp_path / "readme")
    assert (tmp_path / "readme").read_bytes() == readme
    card = hub_server.tree(REPO, "v1")["README.md"].decode()
    assert "license: mit" in card
    assert "# Our words" in card
    assert "/home/ana" not in card


def test_files_of_an_earlier_version_do_not_stay(
    hub: HubRegistry, hub_server: Any, new_draft: Drafts, name: AdapterName
) -> None:
    hub.publish(with_file(new_draft(), "tokenizer/vocab.txt", b"a"), name=name, author="ana")
    hub.publish(new_draft(), name=name, author="ana")
    assert "tokenizer/vocab.txt" in hub_server.tree(REPO, "v1")
    for revision in ("v2", "main"):
        assert "tokenizer/vocab.txt" not in hub_server.tree(REPO, revision)


def test_the_same_weights_are_sent_once(
    hub: HubRegistry, hub_server: Any, new_draft: Drafts, name: AdapterName
) -> None:
    told: list[int] = []
    first = hub.publish(new_draft("same"), name=name, author="ana")
    second = hub.publish(new_draft("same"), name=name, author="ana", progress=told.append)
    assert (first.digest, first.version, second.version) == (second.digest, 1, 2)
    assert len(hub_server.uploaded) == 1
    assert sum(told) == second.manifest.size


def test_a_number_that_was_asked_for(hub: HubRegistry, new_draft: Drafts, name: AdapterName) -> None:
    assert hub.publish(new_draft(), name=name, author="ana", number=7).version == 7
    with pytest.raises(Conflict, match="cannot be given"):
        hub.publish(new_draft(), name=name, author="ana", number=7)
    assert hub.numbers(name) == [7]


def test_evaluations_and_signatures_are_kept(hub: HubRegistry, new_draft: Drafts, name: AdapterName) -> None:
    record = hub.publish(new_draft(), name=name, author="ana")
    hub.add_evaluation(name, 1, suite="gsm8k", metrics={"score": 0.5}, details={"n": 10}, who="ana")
    hub.add_evaluation(name, 1, suite="gsm8k", metrics={"score": 0.6}, who="ben")
    assert [(e.seq, e.metrics["score"]) for e in hub.evaluations(name, 1)] == [(2, 0.6), (1, 0.5)]
    hub.add_signature(record, Signature("key", b"first"))
    hub.add_signature(record, Signature("key", b"second"))
    assert hub.signatures(record) == [Signature("key", b"first")]
    assert hub.overview("acme")[0].versions[0].digest == record.digest


def test_tenants_are_deleted_for_ever(hub: HubRegistry, hub_server: Any, new_draft: Drafts, name: AdapterName) -> None:
    hub.publish(new_draft(), name=name, author="ana")
    hub.publish(new_draft(), name=AdapterName("acme2", "bot"), author="ana")
    hub.delete_tenant("acme", who="ana", why="left")
    hub.delete_tenant("acme", who="ana")  # finishes what was broken off
    assert hub.tenants() == ["acme2"]
    with pytest.raises(Gone, match="was deleted"):
        hub.publish(new_draft(), name=name, author="ana")
    assert REPO not in hub_server.repositories
    with pytest.raises(NotFound):
        hub.delete_tenant("nobody", who="ana")


# ── many writers ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_many_writers_get_contiguous_numbers(hub_server: Any, new_draft: Drafts, name: AdapterName) -> None:
    drafts = [new_draft() for _ in range(12)]
    writers = [registry_on(hub_server) for _ in range(4)]

    def publish(i: int) -> int:
        return writers[i % 4].publish(drafts[i], name=name, author=f"writer {i}").version

    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(publish, range(12)))
    assert sorted(told) == list(range(1, 13))
    found = {v.record.version: v.record.author for v in registry_on(hub_server).versions(name)}
    assert found == {version: f"writer {i}" for i, version in enumerate(told)}
    assert b'"version":12' in hub_server.tree(REPO, "main")["adapterhub.json"]
    assert set(hub_server.repositories[REPO].branches) == {"main", "ah-channels"}


def test_changes_of_many_at_once_are_all_kept(hub_server: Any, new_draft: Drafts, name: AdapterName) -> None:
    registry_on(hub_server).publish(new_draft(), name=name, author="ana")

    def change(i: int) -> int:
        return registry_on(hub_server).set_channel(name, f"channel-{i % 4}", {1: 100}, who=str(i), force=True).seq

    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(change, range(12)))
    assert sorted(told) == [1] * 4 + [2] * 4 + [3] * 4
    assert {move.seq for move in registry_on(hub_server).channels(name).values()} == {3}


def test_branches_of_publishes_that_were_killed_long_ago_go(
    hub: HubRegistry, hub_server: Any, new_draft: Drafts, name: AdapterName
) -> None:
    hub.publish(new_draft(), name=name, author="ana")
    branches = hub_server.repositories[REPO].branches
    day, now = 86_400_000, int(time.time() * 1000)
    old, young = (layout.staging(c * 32, now - days * day) for c, days in (("a", 8), ("b", 6)))
    foreign = "ah-staging-of-ours"
    for branch in (old, young, foreign):
        branches[branch] = branches["main"]
    for dry_run in (True, False):
        assert old in branches
        assert collect(hub, ["acme"], dry_run=dry_run).unfinished == 1
    assert set(branches) == {"main", "ah-channels", young, foreign}
    assert collect(hub).unfinished == 0
    branches[old] = branches["main"]
    hub.publish(new_draft(), name=name, author="ana")
    assert set(branches) == {"main", "ah-channels", young, foreign}


def test_a_publisher_whose_branch_was_removed_says_so(
    hub: HubRegistry, hub_server: Any, new_draft: Drafts, name: AdapterName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was paused for a week between its branch and its commit."""
    hub.publish(new_draft(), name=name, author="ana")
    newest = HubPublisher._newest

    def paused(self: HubPublisher, repo: str) -> int:
        branches = hub_server.repositories[REPO].branches
        for branch in [branch for branch in branches if layout.staged_at(branch)]:
            del branches[branch]
        return newest(self, repo)

    with monkeypatch.context() as patch:
        patch.setattr(HubPublisher, "_newest", paused)
        with pytest.raises((NotFound, StorageError)) as told:
            hub.publish(new_draft(), name=name, author="ana")
    assert told.value.hint
    assert hub.numbers(name) == [1]
    assert hub.publish(new_draft(), name=name, author="ana").version == 2


def test_a_channel_does_not_move_to_what_was_yanked_meanwhile(
    hub: HubRegistry, hub_server: Any, new_draft: Drafts, name: AdapterName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moves and statuses are one file: a yank in between is a conflict, and the move is judged anew."""
    for version in (1, 2, 3):
        hub.publish(new_draft(), name=name, author="ana")
        hub.set_channel(name, "prod", {version: 100}, who="ana")
    commit = Hub.commit

    def yanking(version: int) -> None:
        def late(self: Hub, *arguments: Any, **how: Any) -> str:
            monkeypatch.setattr(Hub, "commit", commit)
            registry_on(hub_server).set_status(name, version, "yanked", who="bo")
            return commit(self, *arguments, **how)

        monkeypatch.setattr(Hub, "commit", late)

    yanking(2)
    assert hub.rollback(name, "prod", who="ana").main.version == 1
    yanking(3)
    with pytest.raises(Gone):
        hub.set_channel(name, "prod", {3: 100}, who="ana")
    assert hub.channels(name)["prod"].main.version == 1


# ── a Hub in trouble ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/commit/ah-staging"),
        ("POST", "/tag/"),
        ("POST", "/commit/main"),
        ("POST", "/branch/"),
        ("POST", "repos/create"),
        ("DELETE", "/branch/"),
    ],
)
@pytest.mark.parametrize("lost", [True, False])
@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_publish_survives_lost_replies_and_refusals(
    hub: HubRegistry,
    hub_server: Any,
    new_draft: Drafts,
    name: AdapterName,
    method: str,
    path: str,
    lost: bool,
    status: int,
) -> None:
    hub_server.fail(method, path, status, lost=lost, headers={"Retry-After": "1"})
    assert hub.publish(new_draft("a"), name=name, author="ana").version == 1
    assert hub.publish(new_draft("b"), name=name, author="ana").version == 2
    assert hub.numbers(name) == [2, 1]


@pytest.mark.parametrize("lost", [True, False])
def test_a_move_whose_reply_is_lost_happens_once(
    hub: HubRegistry, hub_server: Any, new_draft: Drafts, name: AdapterName, lost: bool
) -> None:
    hub.publish(new_draft(), name=name, author="ana")
    hub_server.fail("POST", "/commit/ah-channels", 500, lost=lost)
    assert hub.set_channel(name, "prod", {1: 100}, who="ana").seq == 1
    hub_server.fail("POST", "/commit/ah-channels", 412)
    assert hub.set_status(name, 1, "deprecated", who="ana").seq == 1
    assert len(hub.channel_log(name, "prod")) == 1
    assert len(hub.status_log(name, 1)) == 1


def test_a_look_at_old_refs_loses_no_number(
    hub: HubRegistry, hub_server: Any, new_draft: Drafts, name: AdapterName
) -> None:
    hub.publish(new_draft(), name=name, author="ana")
    hub.set_channel(name, "prod", {1: 100}, who="ana")
    old = hub_server.answer_refs(REPO)
    hub.publish(new_draft(), name=name, author="ana")
    hub.set_channel(name, "prod", {2: 100}, who="ana")
    hub_server.stale_refs[REPO] = [old] * 3
    assert hub.publish(new_draft(), name=name, author="ana").version == 3
    hub_server.stale_refs[REPO] = [old] * 2
    with pytest.raises(Conflict, match="now at acme/support@2"):  # what it was judged by had moved
        hub.set_channel(name, "prod", {1: 100}, who="ben")
    assert hub.numbers(name) == [3, 2, 1]


def test_a_hub_that_stays_away_is_said(hub: HubRegistry, hub_server: Any, new_draft: Drafts, name: AdapterName) -> None:
    hub.publish(new_draft(), name=name, author="ana")
    hub_server.fail("GET", "/refs", 429, times=99, headers={"Retry-After": "7"})
    with pytest.raises(Busy, match="too many requests") as busy:
        hub.numbers(name)
    assert busy.value.hint.startswith("wait 7 seconds")
    hub_server.faults.clear()
    hub_server.fail("GET", "/refs", 503, times=99)
    with pytest.raises(Busy, match="503"):
        hub.numbers(name)


def test_nobody_answers(name: AdapterName, hub_server: Any) -> None:
    lost = HubRegistry("acme-models", endpoint="http://127.0.0.1:9", token="x", wait=lambda seconds: None)
    with pytest.raises(StorageError, match="did not answer"):
        lost.numbers(name)


def test_a_gitignore_hides_nothing(hub: HubRegistry, hub_server: Any, new_draft: Drafts, name: AdapterName) -> None:
    hub.publish(new_draft(), name=name, author="ana")
    hub_server.put(REPO, "main", **{".gitignore": b"*.safetensors\n*.json"})
    record = hub.publish(new_draft("weights"), name=name, author="ana")
    for revision in ("v2", "main"):
        assert hub_server.tree(REPO, revision)[WEIGHTS] == b"weights"
    hub.check_file(record, WEIGHTS)


def test_a_version_with_hidden_files_is_never_tagged(
    hub: HubRegistry, hub_server: Any, new_draft: Drafts, name: AdapterName
) -> None:
    hub_server.hidden.append(WEIGHTS)  # a rule that no file tells
    with pytest.raises(StorageError, match=WEIGHTS):
        hub.publish(new_draft(), name=name, author="ana")
    assert hub.tenants() == []


def test_other_bytes_of_the_same_size_are_noticed(
    hub: HubRegistry, hub_server: Any, new_draft: Drafts, name: AdapterName, tmp_path: Path
) -> None:
    record = hub.publish(new_draft("weights"), name=name, author="ana")
    repo = hub_server.repositories[REPO]
    tree = repo.trees[repo.tags["v1"]]
    for wrong in (b"weightx", b"weight", b"weights and more", b""):
        tree[WEIGHTS] = replace(tree[WEIGHTS], data=wrong)
        with pytest.raises(IntegrityError, match="not what was published"):
            hub.fetch_file(record, WEIGHTS, tmp_path / "file")
        with pytest.raises(IntegrityError):
            hub.check_file(record, WEIGHTS)
        assert not (tmp_path / "file").exists()
    del tree[WEIGHTS]
    with pytest.raises(NotFound):
        hub.fetch_file(record, WEIGHTS, tmp_path / "file")


# ── who may, and what others did ─────────────────────────────────────────────────────────────────────────────────


def test_tokens(hub: HubRegistry, hub_server: Any, new_draft: Drafts, name: AdapterName) -> None:
    hub.publish(new_draft(), name=name, author="ana")
    reader, stranger = registry_on(hub_server, token="hf_reader"), registry_on(hub_server, token="hf_wrong")
    assert reader.numbers(name) == [1]
    with pytest.raises(StorageError) as refused:
        reader.publish(new_draft(), name=name, author="ben")
    assert "write access" in refused.value.hint
    with pytest.raises(StorageError, match="does not take the token") as refused:
        stranger.numbers(name)
    assert "hf auth login" in refused.value.hint


def test_no_token(
    hub: HubRegistry, hub_server: Any, new_draft: Drafts, name: AdapterName, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(new_draft(), name=name, author="ana")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    nobody = registry_on(hub_server, token=None)
    with pytest.raises(NotFound, match="no token is set") as refused:
        nobody.numbers(name)
    assert refused.value.hint.startswith("hf auth login")
    with pytest.raises(StorageError):
        nobody.publish(new_draft(), name=name, author="ana")


def test_gated(hub: HubRegistry, hub_server: Any, new_draft: Drafts, name: AdapterName) -> None:
    hub.publish(new_draft(), name=name, author="ana")
    hub_server.repositories[REPO].gated = True
    with pytest.raises(StorageError, match="gated") as refused:
        registry_on(hub_server, token="hf_reader").numbers(name)
    assert REPO in refused.value.hint


def test_offline(hub: HubRegistry, name: AdapterName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match="offline mode") as refused:
        hub.numbers(name)
    assert "HF_HUB_OFFLINE" in refused.value.hint


def test_a_repository_that_was_renamed(hub: HubRegistry, hub_server: Any, new_draft: Drafts, name: AdapterName) -> None:
    hub.publish(new_draft(), name=name, author="ana")
    hub_server.rename(REPO, "acme-models/acme.other")
    fresh = registry_on(hub_server)
    with pytest.raises(StorageError, match="was renamed"):
        fresh.versions(name)
    with pytest.raises(IntegrityError, match="was renamed"):
        fresh.versions(AdapterName("acme", "other"))
    with pytest.raises(StorageError, match="was renamed"):
        fresh.publish(new_draft(), name=name, author="ana")
    with pytest.raises(IntegrityError, match="holds versions of acme/support"):
        fresh.publish(new_draft(), name=AdapterName("acme", "other"), author="ana")
    assert set(hub_server.repositories["acme-models/acme.other"].tags) == {"v1"}


def test_a_repository_that_was_deleted_under_us(
    hub: HubRegistry, hub_server: Any, new_draft: Drafts, name: AdapterName, tmp_path: Path
) -> None:
    record = hub.publish(new_draft(), name=name, author="ana")
    del hub_server.repositories[REPO]
    with pytest.raises(NotFound, match="are not in hf://acme-models"):
        hub.fetch_file(record, WEIGHTS, tmp_path / "file")
    with pytest.raises(NotFound, match="no tenant"):
        hub.versions(name)


def test_repositories_of_others_are_left_alone(
    hub: HubRegistry, hub_server: Any, new_draft: Drafts, name: AdapterName
) -> None:
    theirs = hub_server.create(REPO)
    theirs.tags["v1"] = theirs.branches["main"]
    hub_server.create("acme-models/Some-Model")
    assert hub.tenants() == []
    with pytest.raises(AlreadyExists, match="not made by AdapterHub"):
        hub.publish(new_draft(), name=name, author="ana")
    assert set(theirs.branches) == {"main"}


def test_tags_and_logs_made_by_hand_are_not_believed(
    hub: HubRegistry, hub_server: Any, new_draft: Drafts, name: AdapterName
) -> None:
    hub.publish(new_draft(), name=name, author="ana")
    repo = hub_server.repositories[REPO]
    repo.tags |= {"v2": repo.tags["v1"], "v3": repo.branches["ah-channels"], "vx": repo.tags["v1"]}
    for version in (2, 3):
        with pytest.raises(IntegrityError, match="by hand"):
            hub.resolve(name.at(version))
    for broken in (b"", b"[]", b"{}", b'{"format": 1, "statuses": {"1": [{}]}}', b'{"format": 1, "channels": []}'):
        hub_server.put(REPO, "ah-channels", **{"log.json": broken})
        with pytest.raises(IntegrityError):
            hub.resolve(name.at(1))
    hub_server.put(REPO, "ah-channels", **{"log.json": b'{"format": 2}'})
    with pytest.raises(Unsupported, match="format 2"):
        hub.resolve(name.at(1))


# ── names and addresses ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("url", ["hf://", "hf://a/b", "hf://../x", "hf://a b", "hf://-a"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UsageError):
        open_registry(url)


def test_an_address_opens_the_registry() -> None:
    assert open_registry("hf://acme-models").url == "hf://acme-models"
    with pytest.raises(Unsupported):
        open_store("hf://acme-models")


def test_what_cannot_be_on_the_hub_is_refused(hub: HubRegistry, hub_server: Any, new_draft: Drafts) -> None:
    with pytest.raises(InvalidName, match="too long"):
        hub.publish(new_draft(), name=AdapterName("a" * 60, "b" * 60), author="ana")
    for path in (".gitattributes", "x/.gitignore", "adapterhub.json", "adapterhub/x"):
        with pytest.raises(Unsupported):
            hub.publish(with_file(new_draft(), path, b"x"), name=AdapterName("acme", "x"), author="ana")
    assert hub_server.repositories == {}


def test_resolving_asks_for_refs_and_no_more_when_nothing_changed(
    hub: HubRegistry, hub_server: Any, new_draft: Drafts, name: AdapterName
) -> None:
    hub.publish(new_draft(), name=name, author="ana")
    hub.set_channel(name, "prod", {1: 100}, who="ana")
    ref = AdapterRef.parse("acme/support@prod")
    fresh = registry_on(hub_server)
    counts = []
    for _ in range(2):
        hub_server.requests.clear()
        fresh.resolve(ref)
        counts.append(len(hub_server.requests))
    assert counts == [3, 1]
