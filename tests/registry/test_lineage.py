"""The graph of what was made from what, and how it is drawn."""

from __future__ import annotations

from adapterhub.refs import AdapterName
from adapterhub.registry.base import Overview, Summary
from adapterhub.registry.views.lineage import Graph, drawn, family, graph


def overview(adapter: str, **parents: str) -> Overview:
    """Versions 1, 2, … of these digests, each made from the digests named."""
    name = AdapterName("acme", adapter)
    versions = [
        Summary(name, n, digest, "active", "", "ana", 1, 4, "", "sft", tuple(its.split()), {}, {})
        for n, (digest, its) in enumerate(parents.items(), start=1)
    ]
    return Overview(name, tuple(reversed(versions)), {})


def lines(of: Graph) -> list[str]:
    return ["." * b.depth + b.node.digest + ("*" if b.again else "") for b in drawn(of)]


def test_children_stand_below_their_parents() -> None:
    whole = graph([overview("b", merged="root tuned", gone="elsewhere"), overview("a", root="", tuned="root")])
    assert lines(whole) == ["root", ".tuned", "..merged", ".merged", "elsewhere", ".gone"]
    assert (whole["root"].children, whole["merged"].parents) == (("tuned", "merged"), ("root", "tuned"))
    assert whole["elsewhere"].versions == ()


def test_what_was_drawn_is_not_drawn_again() -> None:
    whole = graph([overview("a", root="", left="root", right="root", merged="left right", last="merged")])
    assert lines(whole) == ["root", ".left", "..merged", "...last", ".right", "..merged*"]
    branches = list(drawn(whole))
    assert [b.last for b in branches[:5]] == [(), (False,), (False, True), (False, True, True), (True,)]


def test_equal_content_is_one_node() -> None:
    whole = graph([overview("a", same=""), overview("b", same="", child="same")])
    assert [f"{v.name}@{v.version}" for v in whole["same"].versions] == ["acme/a@1", "acme/b@1"]
    assert lines(whole) == ["same", ".child"]


def test_a_family_is_ancestors_and_descendants() -> None:
    whole = graph([overview("a", root="", left="root", right="root", merged="left right", apart="")])
    assert lines(family(whole, ["left"])) == ["root", ".left", "..merged"]
    assert lines(family(whole, ["nobody"])) == []


def test_long_chains_are_drawn() -> None:
    chain = {f"d{n}": f"d{n - 1}" for n in range(1, 5000)}
    found = list(drawn(graph([overview("a", d0="", **chain)])))
    assert (len(found), found[-1].depth) == (5000, 4999)
