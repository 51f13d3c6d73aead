"""The pages are checked text: every command they name exists and takes those options, every link leads somewhere.

A code block below the line ``<!-- tested -->`` is run for real, in one registry after the other blocks of its page.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from adapterhub import errors
from adapterhub.cli.main import build
from adapterhub.serving import tenancy
from adapterhub.serving.arguments import OWNED
from adapterhub.trainers.dialect import keys

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "deploy/*.md", "examples/*/*.md")
    for page in ROOT.glob(pattern)
)  # fmt: skip
SOURCES = sorted(
    f for folder in ("adapterhub", "registry", "serving", "trainers") for f in (ROOT / folder).rglob("*.py")
)
SHELL_BLOCK = re.compile(r"(?P<tested><!-- tested -->\n)?^```(?:sh|bash)\n(?P<code>.*?)^```$", re.M | re.S)
COMMANDS = typer.main.get_command(build())
GAP = "…"  # stands for what a page leaves out, or a value known at run time

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


# ── reading pages and sources ────────────────────────────────────────────────────────────────────────────────


def shell_commands(code: str) -> Iterator[list[str]]:
    """The simple commands of a shell snippet, as words: comments, pipes and line continuations taken apart."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=";|&")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";|&"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def ah_arguments(words: list[str]) -> list[str] | None:
    """What follows `ah` in a command, also behind ``NAME=value`` or a container's ``exec``; None for other commands."""
    front = [w for w in words if not re.match(r"[A-Z_]+=", w)]
    if front[:1] == ["ah"]:
        return front[1:]
    return words[words.index("ah") + 1 :] if words[0] == "docker" and "ah" in words else None


def commands_in_pages() -> list[Any]:
    found = []
    for page in PAGES:
        text, name = page.read_text(), page.relative_to(ROOT).as_posix()
        for block in SHELL_BLOCK.finditer(text):
            for words in shell_commands(block["code"]):
                if (arguments := ah_arguments(words)) is not None:
                    found.append(pytest.param(arguments, True, id=f"{name}: ah {' '.join(arguments)}"))
        for inline in re.findall(r"`ah ([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)):
            found.append(pytest.param(inline.split(), False, id=f"{name}: ah {inline}"))
    return found


def commands_in_hints() -> list[Any]:
    """Every ``hint="ah …"`` of the sources; a value that is filled in stands as a gap."""
    found = []
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.keyword) and node.arg in ("hint", "next"):
                for text in spelled(node.value):
                    if text.startswith("ah "):
                        words = re.split(r", | #|  ", text)[0].split()[1:]  # a remark may follow
                        found.append(pytest.param(words, id=f"{file.relative_to(ROOT).as_posix()}: {text}"))
    return found


def spelled(node: ast.expr) -> Iterator[str]:
    """The texts that an expression of literals, f-strings and ``a if b else c`` can spell."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(p.value if isinstance(p, ast.Constant) else GAP for p in node.values)
    elif isinstance(node, ast.IfExp):
        yield from spelled(node.body)
        yield from spelled(node.orelse)


# ── checking a command against the real command tree ─────────────────────────────────────────────────────────


def complaint(arguments: list[str], *, whole: bool) -> str | None:
    """What is wrong with ``ah ARGUMENTS``. ``whole``: the arguments that the command requires must be there too."""
    node: Any = COMMANDS
    rest = list(arguments)
    while hasattr(node, "commands") and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name not in node.commands:
            return f"there is no command {name!r}"
        node = node.commands[name]
    rest = rest[: rest.index("--")] if "--" in rest else rest
    takes_value = {
        option: not getattr(parameter, "is_flag", False)
        for parameter in node.params
        if parameter.param_type_name == "option"
        for option in (*parameter.opts, *parameter.secondary_opts)
    } | {"-h": False, "--help": False}
    positional, words = 0, iter(rest)
    for word in words:
        option, equals, _ = word.partition("=")
        if not word.startswith("-"):
            positional += 1
        elif GAP not in word:
            if option not in takes_value:
                return f"there is no option {option}"
            if takes_value[option] and not equals and next(words, None) is None:
                return f"{option} has no value"
    declared = [p for p in node.params if p.param_type_name == "argument"]
    if whole and not {"-h", "--help", "--version"} & set(rest):
        if hasattr(node, "commands"):
            return "it names no command"
        if positional < sum(p.required for p in declared):
            return "an argument is missing"
        if positional > len(declared) and all(p.nargs != -1 for p in declared):
            return "there are more arguments than it takes"
    return None


def test_the_check_sees_what_is_wrong() -> None:
    assert complaint(["fly"], whole=True) == "there is no command 'fly'"
    assert complaint(["ls", "--fly"], whole=True) == "there is no option --fly"
    assert complaint(["ls", "--registry"], whole=True) == "--registry has no value"
    assert complaint(["yank"], whole=True) == "an argument is missing"
    assert complaint(["ls", "a/b", "c/d", "e/f"], whole=True) == "there are more arguments than it takes"
    assert complaint(["channel"], whole=True) == "it names no command"
    assert complaint(["ls", "--json"], whole=True) is None


@pytest.mark.parametrize(("arguments", "whole"), commands_in_pages())
def test_every_command_in_a_page_exists_with_its_options(arguments: list[str], whole: bool) -> None:
    assert complaint(arguments, whole=whole) is None


@pytest.mark.parametrize("arguments", commands_in_hints())
def test_every_command_that_an_error_tells_to_type_exists(arguments: list[str]) -> None:
    assert complaint(arguments, whole=False) is None


@every_page
def test_every_make_target_in_a_page_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for block in SHELL_BLOCK.finditer(page.read_text()):
        for words in shell_commands(block["code"]):
            if words[0] == "make":
                assert {w for w in words[1:] if "=" not in w} <= targets


# ── links ────────────────────────────────────────────────────────────────────────────────────────────────────


@every_page
def test_every_link_inside_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|mailto:", target):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get on the usual hosts."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


# ── pages that repeat what the code says ─────────────────────────────────────────────────────────────────────


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its header."""
    _, found, below = (ROOT / page).read_text().partition(f"\n## {heading}\n")
    assert found, f"{page} has no heading {heading!r}"
    match = re.search(r"^\|[- |]+\|\n((?:\|.*\|\n)+)", below, re.M)
    assert match, f"no table below {heading!r}"
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in match[1].splitlines()]


def test_the_table_of_errors_is_the_tree() -> None:
    tree = {
        (c.__name__, str(c.exit_code), str(c.status))
        for c in vars(errors).values()
        if isinstance(c, type) and issubclass(c, errors.AdapterHubError) and c is not errors.AdapterHubError
    }
    assert {(row[0].strip("`"), row[1], row[2]) for row in table("docs/errors.md", "The errors")} == tree


def test_every_route_of_the_page_is_open() -> None:
    for cells in table("docs/serving.md", "Routes"):
        method = cells[0].strip("`").split()[0]
        for path in re.findall(r"/[\w/]+", cells[0]):
            assert tenancy.find_route(method, path.encode(), path).path == path


def test_the_list_of_owned_flags_is_the_code_s() -> None:
    listed = {
        flag for row in table("docs/serving.md", "Flags for vLLM") for flag in re.findall(r"`--([\w-]+)`", row[0])
    }
    assert listed == set(OWNED)


def test_flags_that_are_refused_as_ah_serve_s_own_are_its_options() -> None:
    own = [flag for flag, why in OWNED.items() if "`ah serve` itself" in why]
    assert len(own) >= 2
    for flag in own:
        assert complaint(["serve", f"--{flag}", "1"], whole=True) is None


def test_the_list_of_keys_is_the_dialect_s() -> None:
    listed = [key for row in table("docs/training.md", "The keys") for key in re.findall(r"`(\w+)`", row[0])]
    assert sorted(listed) == sorted([*keys.KEYS, "datasets", "test_datasets", "adapterhub"])


# ── what is run for real ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if "<!-- tested -->" in p.read_text()], ids=lambda p: p.name)
def test_the_tested_commands_of_a_page_work(page: Path, tmp_path: Path, adapter_factory: Callable[..., Path]) -> None:
    for number in (1, 2, 3):
        adapter_factory(f"support-{number}", seed=number)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for block in SHELL_BLOCK.finditer(page.read_text()):
        if block["tested"]:
            command = ["bash", "-euo", "pipefail", "-c", block["code"]]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{block['code']}\n{done.stdout}\n{done.stderr}"
