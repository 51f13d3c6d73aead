"""The registry against a model of it: any sequence of commands gives what a few lines of dictionaries give."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from adapterhub.errors import Gone, NotFound
from adapterhub.manifest import FileEntry, LoraShape, Manifest, Verdict, Verdicts
from adapterhub.refs import AdapterName
from adapterhub.registry import Draft, ObjectRegistry
from adapterhub.registry.memory import MemoryStore

NAME = AdapterName("acme", "support")
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
USABLE = {"active", "deprecated"}
channels = st.sampled_from(["prod", "canary"])
pick = st.integers(0, 100)


class RegistryModel(RuleBasedStateMachine):
    """``status`` by version (index 0 is version 1); ``stacks`` of deployments by channel, the present one last."""

    @initialize()
    def start(self) -> None:
        self.registry = ObjectRegistry(MemoryStore())
        self.folder = tempfile.TemporaryDirectory()
        (Path(self.folder.name) / "empty").touch()
        self.status: list[str] = []
        self.contents: list[int] = []
        self.stacks: dict[str, list[int]] = {}

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(content=st.integers(0, 3))
    def publish(self, content: int) -> None:
        shape = LoraShape(rank=content + 1, alpha=8, target_modules=(), parameters=1, dtype="F32")
        yes = Verdict("yes")
        manifest = Manifest(files=(FileEntry("empty", 0, EMPTY),), lora=shape)
        draft = Draft(Path(self.folder.name), manifest, Verdicts(yes, yes, yes))
        record = self.registry.publish(draft, name=NAME, author="ana")
        self.status.append("active")
        self.contents.append(content)
        assert record.version == len(self.status)

    @precondition(lambda self: self.status)
    @rule(which=pick, status=st.sampled_from(["active", "deprecated", "yanked", "deleted"]))
    def change_status(self, which: int, status: Any) -> None:
        version = which % len(self.status) + 1
        if self.status[version - 1] == "deleted" != status:
            self._refused(Gone, lambda: self.registry.set_status(NAME, version, status, who="ana"))
            return
        self.registry.set_status(NAME, version, status, who="ana")
        self.status[version - 1] = status

    @precondition(lambda self: self.status)
    @rule(channel=channels, which=pick)
    def set_channel(self, channel: str, which: int) -> None:
        version = which % len(self.status) + 1
        if not self._usable(version):
            self._refused(Gone, lambda: self.registry.set_channel(NAME, channel, {version: 100}, who="ana"))
            return
        self.registry.set_channel(NAME, channel, {version: 100}, who="ana")
        self.stacks.setdefault(channel, []).append(version)

    @precondition(lambda self: self.stacks)
    @rule(channel=channels)
    def rollback(self, channel: str) -> None:
        stack = self.stacks.get(channel, [])
        present = stack[-1] if stack else 0
        below = stack[:-1]
        while below and (below[-1] == present or not self._usable(below[-1])):
            below.pop()
        if not below:
            self._refused(NotFound, lambda: self.registry.rollback(NAME, channel, who="ana"))
            return
        assert self.registry.rollback(NAME, channel, who="ana").main.version == below[-1]
        self.stacks[channel] = below

    @precondition(lambda self: self.status)
    @invariant()
    def it_answers_like_the_model(self) -> None:
        listed = {v.record.version: v.status for v in self.registry.versions(NAME)}
        assert listed == dict(enumerate(self.status, start=1))
        active = [version for version in listed if listed[version] == "active"]
        self._resolves("latest", max(active, default=None))
        for channel, stack in self.stacks.items():
            self._resolves(channel, stack[-1] if self._usable(stack[-1]) else None)
        for content in set(self.contents):
            same = [n for n, c in enumerate(self.contents, start=1) if c == content]
            digest = next(v.record.digest for v in self.registry.versions(NAME) if v.record.version == same[0])
            self._resolves(digest, max((n for n in same if self._usable(n)), default=None))

    def _resolves(self, selector: str, version: int | None) -> None:
        if version is None:
            self._refused(Gone, lambda: self.registry.resolve(NAME.at(selector)))
        else:
            assert self.registry.resolve(NAME.at(selector)).record.version == version

    def _usable(self, version: int) -> bool:
        return self.status[version - 1] in USABLE

    @staticmethod
    def _refused(error: type[Exception], action: Any) -> None:
        try:
            action()
        except error:
            return
        raise AssertionError(f"{error.__name__} was expected")


def test_a_registry_is_its_model() -> None:
    """Short runs, for every edit."""
    run_state_machine_as_test(RegistryModel, settings=settings(max_examples=12, stateful_step_count=15, deadline=None))


@pytest.mark.slow
def test_a_registry_is_its_model_for_long() -> None:
    run_state_machine_as_test(RegistryModel, settings=settings(max_examples=60, stateful_step_count=25, deadline=None))
