"""Which versions were made from which: a graph over digests. No I/O.

A parent is named by its digest, so the graph holds across registries and copies; versions of one digest are one node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from adapterhub.registry.base import Overview, Summary


@dataclass(frozen=True)
class Node:
    """One content."""

    digest: str
    versions: tuple[Summary, ...]  # that have it; none: a parent that was not published here
    parents: tuple[str, ...]
    children: tuple[str, ...]


@dataclass(frozen=True)
class Branch:
    """A line of the drawn tree."""

    node: Node
    depth: int
    last: tuple[bool, ...]  # of each level from 1 to ``depth``: whether its node is the last child there
    again: bool = False  # it was drawn above, with its children


Graph = Mapping[str, Node]


def graph(overviews: Iterable[Overview]) -> Graph:
    """Digest → node, of all versions and of the parents that they name; in the order of names and numbers."""
    versions: dict[str, list[Summary]] = {}
    parents: dict[str, tuple[str, ...]] = {}
    children: dict[str, list[str]] = {}
    for overview in sorted(overviews, key=lambda o: o.name):
        for summary in reversed(overview.versions):
            versions.setdefault(summary.digest, []).append(summary)
            parents[summary.digest] = tuple(dict.fromkeys(summary.parents))
    for digest, its in list(parents.items()):
        for parent in its:
            children.setdefault(parent, []).append(digest)
            parents.setdefault(parent, ())
    return {
        digest: Node(digest, tuple(versions.get(digest, ())), its, tuple(children.get(digest, ())))
        for digest, its in parents.items()
    }


def family(graph: Graph, digests: Iterable[str]) -> Graph:
    """What these were made from, and what was made from them."""
    chosen = list(digests)
    kept = _reached(graph, chosen, lambda node: node.parents) | _reached(graph, chosen, lambda node: node.children)
    return {
        digest: Node(
            digest,
            node.versions,
            tuple(parent for parent in node.parents if parent in kept),
            tuple(child for child in node.children if child in kept),
        )
        for digest, node in graph.items()
        if digest in kept
    }


def _reached(graph: Graph, start: Iterable[str], step: Callable[[Node], Iterable[str]]) -> set[str]:
    seen: set[str] = set()
    ahead = [digest for digest in start if digest in graph]
    while ahead:
        digest = ahead.pop()
        if digest not in seen:
            seen.add(digest)
            ahead += step(graph[digest])
    return seen


def drawn(graph: Graph) -> Iterator[Branch]:
    """Depth first from what has no parents. What has several parents is below each, its children only once."""
    seen: set[str] = set()
    ahead = [Branch(node, 0, ()) for node in graph.values() if not node.parents][::-1]
    while ahead:  # no recursion: adapters that are trained on every night make chains of thousands
        branch = ahead.pop()
        digest, children = branch.node.digest, branch.node.children
        if digest in seen and children:
            yield Branch(branch.node, branch.depth, branch.last, again=True)
            continue
        seen.add(digest)
        yield branch
        ahead += [
            Branch(graph[child], branch.depth + 1, (*branch.last, place == len(children)))
            for place, child in enumerate(children, start=1)
        ][::-1]
