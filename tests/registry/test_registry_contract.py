"""What every Registry promises (adapterhub.registry.base): run against every backend.

What is about keys in a store is in `test_object_layout`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.errors import AdapterError, Conflict, Gone, InvalidName, NotFound, UsageError
from adapterhub.refs import AdapterName, AdapterRef
from adapterhub.registry import Draft, Registry
from adapterhub.registry.base import Logs

Drafts = Callable[..., Draft]


@pytest.fixture
def registry(every_registry: Registry) -> Registry:
    return every_registry


def publish(registry: Registry, draft: Draft, name: AdapterName, **labels: str) -> int:
    return registry.publish(draft, name=name, author="ana", labels=labels).version


def resolved(registry: Registry, text: str) -> int:
    return registry.resolve(AdapterRef.parse(text)).record.version


# ── publish and resolve ──────────────────────────────────────────────────────────────────────────────────────────


def test_versions_are_numbered_from_one(registry: Registry, new_draft: Drafts, name: AdapterName) -> None:
    assert [publish(registry, new_draft(), name) for _ in range(3)] == [1, 2, 3]
    assert [v.record.version for v in registry.versions(name)] == [3, 2, 1]
    assert resolved(registry, "acme/support") == 3
    assert resolved(registry, "acme/support@2") == 2


def test_a_version_is_told_whatever_its_status(registry: Registry, new_draft: Drafts, name: AdapterName) -> None:
    for _ in range(3):
        publish(registry, new_draft(), name)
    registry.set_status(name, 2, "yanked", who="ana", why="rude")
    assert registry.numbers(name) == [3, 2, 1]
    assert [registry.version(name, n).status for n in (1, 2, 3)] == ["active", "yanked", "active"]
    for wrong in (4, 10**6):
        with pytest.raises(NotFound, match="no version"):
            registry.version(name, wrong)
    for question in (
        lambda: registry.numbers(AdapterName("acme", "nothing")),
        lambda: registry.version(AdapterName("no", "one"), 1),
    ):
        with pytest.raises(NotFound):
            question()


def test_a_record_says_what_was_published(registry: Registry, new_draft: Drafts, name: AdapterName) -> None:
    draft = new_draft()
    record = registry.publish(draft, name=name, author="ana", labels={"team": "x"})
    found = registry.resolve(record.ref)
    assert found.record == record
    assert found.status == "active"
    assert record.manifest == draft.manifest
    assert record.digest == draft.manifest.digest
    assert (record.author, record.labels, record.verdicts) == ("ana", {"team": "x"}, draft.verdicts)
    assert record.created.endswith("+00:00")


def test_a_digest_finds_the_newest_version_in_use(registry: Registry, new_draft: Drafts, name: AdapterName) -> None:
    record = registry.publish(new_draft("same"), name=name, author="ana")
    publish(registry, new_draft("same"), name)
    publish(registry, new_draft(), name)
    ref = f"acme/support@{record.digest}"
    assert resolved(registry, ref) == 2
    registry.set_status(name, 2, "yanked", who="ana")
    assert resolved(registry, ref) == 1
    registry.set_status(name, 1, "yanked", who="ana")
    with pytest.raises(Gone):
        resolved(registry, ref)
    with pytest.raises(NotFound):
        resolved(registry, f"acme/support@sha256:{'0' * 64}")


def test_tenants_and_adapters_are_listed_when_they_have_versions(
    registry: Registry, new_draft: Drafts, name: AdapterName
) -> None:
    assert registry.tenants() == []
    for text in ("acme/support", "acme/bot", "acme/bot2", "beta/support"):
        publish(registry, new_draft(), AdapterName.parse(text))
    assert registry.tenants() == ["acme", "beta"]
    assert [str(n) for n in registry.adapters("acme")] == ["acme/bot", "acme/bot2", "acme/support"]
    assert registry.adapters("nobody") == []


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("nobody/support", "no tenant 'nobody'"),
        ("acme/nothing", "no adapter acme/nothing"),
        ("acme/support@9", "no version 9"),
        ("acme/support@prod", "no channel 'prod'"),
        ("nobody/support@prod", "no tenant"),
        ("acme/nothing@1", "no adapter"),
        (f"acme/nothing@sha256:{'a' * 64}", "no adapter"),
    ],
)
def test_what_is_not_there_is_said_precisely(
    registry: Registry, new_draft: Drafts, name: AdapterName, ref: str, said: str
) -> None:
    publish(registry, new_draft(), name)
    with pytest.raises(NotFound, match=said) as missing:
        registry.resolve(AdapterRef.parse(ref))
    assert missing.value.hint.startswith("ah ")


def test_unknown_adapters_have_no_versions_channels_or_logs(registry: Registry, name: AdapterName) -> None:
    for question in (
        lambda: registry.versions(name),
        lambda: registry.channels(name),
        lambda: registry.channel_log(name, "prod"),
        lambda: registry.status_log(name, 1),
        lambda: registry.set_status(name, 1, "yanked", who="ana"),
        lambda: registry.set_channel(name, "prod", {1: 100}, who="ana"),
        lambda: registry.rollback(name, "prod", who="ana"),
    ):
        with pytest.raises(NotFound):
            question()


def test_a_file_that_changes_under_publish_is_refused(registry: Registry, new_draft: Drafts, name: AdapterName) -> None:
    draft = new_draft()
    (draft.path / "adapter_model.safetensors").write_bytes(b"trained on meanwhile")
    with pytest.raises(AdapterError, match="changed while"):
        publish(registry, draft, name)
    assert registry.tenants() == []
    (draft.path / "adapter_model.safetensors").unlink()
    with pytest.raises(Exception, match="cannot be read"):
        publish(registry, draft, name)


# ── statuses ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_yanked_versions_are_refused_and_latest_steps_down(
    registry: Registry, new_draft: Drafts, name: AdapterName
) -> None:
    for _ in range(3):
        publish(registry, new_draft(), name)
    registry.set_channel(name, "prod", {3: 100}, who="ana")
    registry.set_status(name, 3, "yanked", who="ana", why="rude")
    assert resolved(registry, "acme/support") == 2
    for ref in ("acme/support@3", "acme/support@prod"):
        with pytest.raises(Gone) as gone:
            resolved(registry, ref)
        assert gone.value.why == "rude"
    registry.set_status(name, 3, "active", who="ana")
    assert resolved(registry, "acme/support@prod") == 3
    assert [c.status for c in registry.status_log(name, 3)] == ["active", "yanked"]


def test_deprecated_versions_work_but_are_not_latest(registry: Registry, new_draft: Drafts, name: AdapterName) -> None:
    for _ in range(2):
        publish(registry, new_draft(), name)
    registry.set_status(name, 2, "deprecated", who="ana", why="slow")
    found = registry.resolve(AdapterRef.parse("acme/support@2"))
    assert (found.status, found.why) == ("deprecated", "slow")
    assert resolved(registry, "acme/support") == 1
    registry.set_channel(name, "prod", {2: 100}, who="ana")
    assert resolved(registry, "acme/support@prod") == 2


def test_deleted_is_final_and_the_number_is_not_used_again(
    registry: Registry, new_draft: Drafts, name: AdapterName
) -> None:
    publish(registry, new_draft(), name)
    registry.set_status(name, 1, "deleted", who="ana", why="law")
    assert registry.set_status(name, 1, "deleted", who="ana").seq == 1
    with pytest.raises(Gone, match="deleted"):
        registry.set_status(name, 1, "active", who="ana")
    with pytest.raises(Gone):
        resolved(registry, "acme/support@1")
    with pytest.raises(Gone, match="no active version"):
        resolved(registry, "acme/support")
    assert publish(registry, new_draft(), name) == 2
    assert [(v.record.version, v.status) for v in registry.versions(name)] == [(2, "active"), (1, "deleted")]


def test_a_status_set_again_is_not_a_change(registry: Registry, new_draft: Drafts, name: AdapterName) -> None:
    publish(registry, new_draft(), name)
    assert registry.status_log(name, 1) == []
    first = registry.set_status(name, 1, "yanked", who="ana", why="a")
    assert registry.set_status(name, 1, "yanked", who="ben", why="b") == first
    assert len(registry.status_log(name, 1)) == 1


# ── evaluations ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_evaluations_are_added_and_kept(registry: Registry, new_draft: Drafts, name: AdapterName) -> None:
    publish(registry, new_draft(), name)
    assert registry.evaluations(name, 1) == []
    details = {"data_sha256": "ab" * 32, "base": {"eval_loss": 2.5}}
    first = registry.add_evaluation(name, 1, suite="heldout", metrics={"eval_loss": 1.5}, details=details, who="ana")
    registry.set_status(name, 1, "yanked", who="ana")  # what is yanked can still be measured
    second = registry.add_evaluation(name, 1, suite="heldout", metrics={"eval_loss": 1}, who="ben")
    assert registry.evaluations(name, 1) == [second, first]
    assert (first.seq, first.details, first.who, second.seq, second.metrics) == (1, details, "ana", 2, {"eval_loss": 1})
    with pytest.raises(NotFound):
        registry.add_evaluation(name, 2, suite="heldout", metrics={}, who="ana")
    with pytest.raises(NotFound):
        registry.evaluations(name, 2)
    registry.set_status(name, 1, "deleted", who="ana")
    with pytest.raises(Gone):
        registry.add_evaluation(name, 1, suite="heldout", metrics={}, who="ana")
    assert len(registry.evaluations(name, 1)) == 2


@pytest.mark.parametrize(
    ("suite", "metrics", "details"),
    [
        ("", {"loss": 1.0}, {}),
        ("heldout", {"loss": float("nan")}, {}),
        ("heldout", {"loss": float("-inf")}, {}),
        ("heldout", {"loss": 1.0}, {"path": object()}),
        ("heldout", {"loss": 1.0}, {"loss": float("inf")}),
    ],
)
def test_what_is_no_measurement_is_refused(
    registry: Registry, new_draft: Drafts, name: AdapterName, suite: str, metrics: dict[str, float], details: object
) -> None:
    publish(registry, new_draft(), name)
    with pytest.raises(UsageError):
        registry.add_evaluation(name, 1, suite=suite, metrics=metrics, details=details, who="ana")  # type: ignore[arg-type]
    assert registry.evaluations(name, 1) == []


# ── channels ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_channels_move_and_remember(registry: Registry, new_draft: Drafts, name: AdapterName) -> None:
    for _ in range(2):
        publish(registry, new_draft(), name)
    registry.set_channel(name, "prod", {1: 100}, who="ana", why="first")
    registry.set_channel(name, "prod", {2: 100}, who="ben")
    registry.set_channel(name, "canary", {2: 100}, who="ben")
    assert {c: m.main.version for c, m in registry.channels(name).items()} == {"canary": 2, "prod": 2}
    log = registry.channel_log(name, "prod")
    assert [(m.seq, m.main.version, m.who, m.why) for m in log] == [(2, 2, "ben", ""), (1, 1, "ana", "first")]
    assert log[0].main.digest == registry.resolve(name.at(2)).record.digest


def test_a_channel_may_point_at_several_versions(registry: Registry, new_draft: Drafts, name: AdapterName) -> None:
    for _ in range(2):
        publish(registry, new_draft(), name)
    move = registry.set_channel(name, "prod", {1: 90, 2: 10}, who="ana")
    assert [(t.version, t.weight) for t in move.targets] == [(1, 90), (2, 10)]
    assert registry.channels(name)["prod"] == move
    assert resolved(registry, "acme/support@prod") == 1


@pytest.mark.parametrize("weights", [{}, {1: 99}, {1: 101}, {1: 100, 2: 0}, {1: 150, 2: -50}])
def test_weights_sum_to_a_hundred(
    registry: Registry, new_draft: Drafts, name: AdapterName, weights: dict[int, int]
) -> None:
    for _ in range(2):
        publish(registry, new_draft(), name)
    with pytest.raises(UsageError):
        registry.set_channel(name, "prod", weights, who="ana")
    assert registry.channels(name) == {}


def test_a_channel_points_only_at_what_can_be_used(registry: Registry, new_draft: Drafts, name: AdapterName) -> None:
    publish(registry, new_draft(), name)
    with pytest.raises(NotFound):
        registry.set_channel(name, "prod", {2: 100}, who="ana")
    registry.set_status(name, 1, "yanked", who="ana")
    with pytest.raises(Gone):
        registry.set_channel(name, "prod", {1: 100}, who="ana")


@pytest.mark.parametrize("channel", ["latest", "1", "Prod", "", "../x", "a/b", "x" * 64])
def test_channels_outside_the_grammar_are_refused(
    registry: Registry, new_draft: Drafts, name: AdapterName, channel: str
) -> None:
    publish(registry, new_draft(), name)
    with pytest.raises(InvalidName):
        registry.set_channel(name, channel, {1: 100}, who="ana")
    with pytest.raises(InvalidName):
        registry.rollback(name, channel, who="ana")
    with pytest.raises(InvalidName):
        registry.channel_log(name, channel)


def test_a_mover_who_came_too_late_knows(registry: Registry, new_draft: Drafts, name: AdapterName) -> None:
    for _ in range(2):
        publish(registry, new_draft(), name)
    read = registry.set_channel(name, "prod", {1: 100}, who="ana").seq
    registry.set_channel(name, "prod", {2: 100}, who="ben", expected=read)
    with pytest.raises(Conflict, match="acme/support@2, moved by ben"):
        registry.set_channel(name, "prod", {1: 100}, who="ana", expected=read)
    with pytest.raises(Conflict):
        registry.set_channel(name, "prod", {1: 100}, who="ana", expected=0)
    assert resolved(registry, "acme/support@prod") == 2
    forced = registry.set_channel(name, "prod", {1: 100}, who="ana", expected=read, force=True)
    assert forced.seq == 3
    with pytest.raises(Conflict):
        registry.rollback(name, "prod", to=1, who="ana", expected=2)
    assert registry.rollback(name, "prod", to=2, who="ana", expected=3).seq == 4


def test_gates_are_kept_with_the_move(registry: Registry, new_draft: Drafts, name: AdapterName) -> None:
    for _ in range(2):
        publish(registry, new_draft(), name)
    gates = {"max_error_rate": 0.05, "min_requests": 20}
    registry.set_channel(name, "prod", {1: 95, 2: 5}, who="ana", gates=gates)
    assert registry.channels(name)["prod"].gates == gates
    assert registry.channel_log(name, "prod")[0].gates == gates


# ── rollback ─────────────────────────────────────────────────────────────────────────────────────────────────────


def prod_after(registry: Registry, name: AdapterName, new_draft: Drafts, *versions: int) -> None:
    for _ in range(max(versions)):
        publish(registry, new_draft(), name)
    for version in versions:
        registry.set_channel(name, "prod", {version: 100}, who="ana")


def test_two_rollbacks_go_back_two_deployments(registry: Registry, new_draft: Drafts, name: AdapterName) -> None:
    prod_after(registry, name, new_draft, 1, 2, 3)
    first = registry.rollback(name, "prod", who="ana", why="rude")
    assert (first.main.version, first.kind, first.undoes, first.why) == (2, "rollback", 3, "rude")
    assert registry.rollback(name, "prod", who="ana").main.version == 1
    with pytest.raises(NotFound, match="nothing to go back to"):
        registry.rollback(name, "prod", who="ana")
    assert resolved(registry, "acme/support@prod") == 1


def test_what_was_rolled_back_is_not_gone_back_to(registry: Registry, new_draft: Drafts, name: AdapterName) -> None:
    prod_after(registry, name, new_draft, 1, 2)
    registry.rollback(name, "prod", who="ana")  # 2 was bad
    publish(registry, new_draft(), name)
    registry.set_channel(name, "prod", {3: 100}, who="ana")
    assert registry.rollback(name, "prod", who="ana").main.version == 1


def test_rollback_steps_over_yanked_versions_and_repetitions(
    registry: Registry, new_draft: Drafts, name: AdapterName
) -> None:
    prod_after(registry, name, new_draft, 1, 2, 3, 3)
    registry.set_status(name, 2, "yanked", who="ana")
    assert registry.rollback(name, "prod", who="ana").main.version == 1
    with pytest.raises(NotFound):
        registry.rollback(name, "prod", who="ana")


def test_rollback_leaves_a_yanked_version(registry: Registry, new_draft: Drafts, name: AdapterName) -> None:
    prod_after(registry, name, new_draft, 1, 2)
    registry.set_status(name, 2, "yanked", who="ana")
    assert registry.rollback(name, "prod", who="ana").main.version == 1
    assert resolved(registry, "acme/support@prod") == 1


def test_rollback_to_a_version_by_name(registry: Registry, new_draft: Drafts, name: AdapterName) -> None:
    prod_after(registry, name, new_draft, 1, 2, 3, 4)
    assert registry.rollback(name, "prod", to=2, who="ana").main.version == 2
    assert registry.rollback(name, "prod", who="ana").main.version == 1
    registry.set_status(name, 4, "yanked", who="ana")
    with pytest.raises(Gone):
        registry.rollback(name, "prod", to=4, who="ana")


def test_rollback_to_what_never_was_deployed_keeps_the_history(
    registry: Registry, new_draft: Drafts, name: AdapterName
) -> None:
    prod_after(registry, name, new_draft, 2, 3)
    assert registry.rollback(name, "prod", to=1, who="ana").main.version == 1
    assert registry.rollback(name, "prod", who="ana").main.version == 2


# ── looks at everything ──────────────────────────────────────────────────────────────────────────────────────────────


def test_an_overview_tells_of_every_adapter(registry: Registry, new_draft: Drafts, name: AdapterName) -> None:
    assert registry.overview("acme") == []
    other, apart = AdapterName("acme", "support-2"), AdapterName("acmes", "support")
    publish(registry, new_draft("one"), name, team="x")
    publish(registry, new_draft(), name)
    for adapter in (other, apart):
        publish(registry, new_draft(), adapter)
    registry.set_channel(name, "prod", {2: 100}, who="ana")
    registry.set_channel(name, "prod", {1: 90, 2: 10}, who="ana")
    registry.set_status(name, 2, "deprecated", who="ana")
    for score in (0.25, 0.5):
        registry.add_evaluation(name, 1, suite="heldout", metrics={"score": score}, who="ana")
    registry.add_evaluation(name, 1, suite="toxic", metrics={"share": 0.125}, who="ana")
    support, second = registry.overview("acme")
    assert (support.name, second.name) == (name, other)
    assert [(v.version, v.status) for v in support.versions] == [(2, "deprecated"), (1, "active")]
    assert [(t.version, t.weight) for t in support.channels["prod"]] == [(1, 90), (2, 10)]
    one, record = support.versions[1], registry.version(name, 1).record
    assert (one.digest, one.created, one.author, one.labels) == (record.digest, record.created, "ana", {"team": "x"})
    assert (one.size, one.rank, one.base) == (record.manifest.size, 4, "")
    assert one.evaluations == {"heldout": {"score": 0.5}, "toxic": {"share": 0.125}}
    assert (second.versions[0].evaluations, second.channels) == ({}, {})


def test_an_overview_is_as_fresh_as_its_versions(registry: Registry, new_draft: Drafts, name: AdapterName) -> None:
    publish(registry, new_draft(), name)
    assert [v.version for v in registry.overview("acme")[0].versions] == [1]
    publish(registry, new_draft(), name)
    assert [v.version for v in registry.overview("acme")[0].versions] == [2, 1]
    registry.set_status(name, 1, "yanked", who="ana")
    registry.set_channel(name, "prod", {2: 100}, who="ana")
    registry.add_evaluation(name, 2, suite="heldout", metrics={"score": 1}, who="ana")
    (seen,) = registry.overview("acme")
    assert [v.status for v in seen.versions] == ["active", "yanked"]
    assert seen.channels["prod"][0].version == 2
    assert seen.versions[0].evaluations == {"heldout": {"score": 1}}
    registry.set_status(name, 1, "active", who="ana")
    assert registry.overview("acme")[0].versions[1].status == "active"


def test_logs_tell_all_that_happened_or_the_newest(registry: Registry, new_draft: Drafts, name: AdapterName) -> None:
    with pytest.raises(NotFound):
        registry.logs(name)
    for _ in range(3):
        publish(registry, new_draft(), name)
    assert registry.logs(name) == Logs()
    for version in (1, 2, 3):
        registry.set_channel(name, "prod", {version: 100}, who="ana")
        registry.add_evaluation(name, 2, suite="heldout", metrics={"score": version}, who="ana")
    registry.set_channel(name, "canary", {3: 100}, who="ben")
    registry.set_status(name, 1, "yanked", who="ana")
    logs = registry.logs(name)
    assert logs.moves == {c: tuple(registry.channel_log(name, c)) for c in ("canary", "prod")}
    assert logs.statuses == {1: tuple(registry.status_log(name, 1))}
    assert logs.evaluations == {2: tuple(registry.evaluations(name, 2))}
    newest = registry.logs(name, limit=1)
    assert [move.seq for moves in newest.moves.values() for move in moves] == [1, 3]
    assert [e.seq for e in newest.evaluations[2]] == [3]
    assert [v.record.version for v in registry.versions(name, limit=2)] == [3, 2]


# ── changes ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_changes_tell_of_every_commit(registry: Registry, new_draft: Drafts, name: AdapterName) -> None:
    start = registry.changes("acme").cursor
    publish(registry, new_draft(), name)
    registry.set_channel(name, "prod", {1: 100}, who="ana")
    registry.set_status(name, 1, "yanked", who="ana")
    registry.add_evaluation(name, 1, suite="heldout", metrics={"loss": 1.5}, who="ana")
    told = registry.changes("acme", start)
    assert {e.what for e in told.events} == {"publish", "channel prod", "status 1", "evaluation 1"}
    assert {e.adapter for e in told.events} == {name}
    assert registry.changes("beta", registry.changes("beta").cursor).events == ()


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_files_come_back_as_they_were(registry: Registry, new_draft: Drafts, name: AdapterName, tmp_path: Path) -> None:
    record = registry.publish(new_draft("weights"), name=name, author="ana")
    registry.fetch_file(record, "adapter_model.safetensors", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"weights"


@pytest.mark.parametrize("kept", [b"", b"we", b"weights"])
def test_a_fetch_goes_on_where_a_killed_one_stopped(
    registry: Registry, new_draft: Drafts, name: AdapterName, tmp_path: Path, kept: bytes
) -> None:
    record = registry.publish(new_draft("weights"), name=name, author="ana")
    (tmp_path / "file").write_bytes(kept)
    told: list[int] = []
    registry.fetch_file(record, "adapter_model.safetensors", tmp_path / "file", progress=told.append)
    assert (tmp_path / "file").read_bytes() == b"weights"
    assert sum(told) == len(b"weights")


@pytest.mark.parametrize("kept", [b"x", b"weightx", b"weights and more"])
def test_a_wrong_start_is_fetched_again_from_nothing(
    registry: Registry, new_draft: Drafts, name: AdapterName, tmp_path: Path, kept: bytes
) -> None:
    record = registry.publish(new_draft("weights"), name=name, author="ana")
    (tmp_path / "file").write_bytes(kept)
    registry.fetch_file(record, "adapter_model.safetensors", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"weights"


def test_a_file_that_no_manifest_names_is_not_fetched(
    registry: Registry, new_draft: Drafts, name: AdapterName, tmp_path: Path
) -> None:
    record = registry.publish(new_draft(), name=name, author="ana")
    with pytest.raises(NotFound):
        registry.fetch_file(record, "../../registry.json", tmp_path / "file")
    with pytest.raises(NotFound):
        registry.check_file(record, "../../registry.json")
    assert not (tmp_path / "file").exists()
