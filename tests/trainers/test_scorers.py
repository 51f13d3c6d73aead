"""Scores of answers, and requirements: two texts or two numbers in, a verdict out."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.errors import RunFailed, UsageError
from adapterhub.scorers import scorer
from adapterhub.trainers.evaluation.requirement import parse_requirement, unmet

CALL = '<tool_call>\n{"name": "find", "arguments": {"id": 7}}\n</tool_call>'


@pytest.mark.parametrize(
    ("written", "answer", "reference", "expected"),
    [
        ("exact_match", " yes\n", "yes", 1),
        ("exact_match", "Yes", "yes", 0),
        ("contains", "It is Paris.", "Paris", 1),
        ("contains", "It is paris.", "Paris", 0),
        ("json", '{"a": [1]}', "", 1),
        ("json", "Sure: {}", "", 0),
        ("tool_name", '{"name": "find", "parameters": {"id": 8}}', CALL, 1),
        ("tool_name", '{"name": "lose", "arguments": {"id": 7}}', CALL, 0),
        ("tool_name", "I do not know.", CALL, 0),
        ("tool_name", "I do not know.", "Neither do I.", 1),
        ("tool_call", '[{"name": "find", "arguments": {"id": 7}}]', CALL, 1),
        ("tool_call", '{"name": "find", "arguments": {"id": 8}}', CALL, 0),
        ("tool_call", "<tool_call>{broken</tool_call>", CALL, 0),
        (r"regex:\bA\w+", "say Ahoy", "", 1),
        (r"regex:\bA\w+", "say nothing", "", 0),
    ],
)
def test_scores(written: str, answer: str, reference: str, expected: float) -> None:
    _, score = scorer(written)
    assert score(answer, reference) == expected


def test_a_scorer_of_your_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def near(answer, reference):\n    return len(answer) / len(reference)\n")
    name, score = scorer(f"{file}:near")
    assert (name, score("ab", "abcd")) == ("near", 0.5)
    with pytest.raises(RunFailed, match=r"near of .* failed"):
        score("ab", "")
    with pytest.raises(UsageError, match="has no function far"):
        scorer(f"{file}:far")
    file.write_text("def near(:")
    with pytest.raises(UsageError, match="cannot be run"):
        scorer(f"{file}:near")


@pytest.mark.parametrize("written", ["exact", "regex:(", "none.py:score", ""])
def test_a_scorer_that_is_none_is_named(written: str) -> None:
    with pytest.raises(UsageError):
        scorer(written)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("eval_loss < base", True),
        ("eval_loss < base * 0.5", False),
        ("eval_loss<=1.5 and exact_match >= 0.8", True),
        ("eval_loss < 1e-3", False),
        ("exact_match > acme/support@3", True),
        ("exact_match == 0.9", True),
        ("eval_loss < base and exact_match > 0.95", False),
    ],
)
def test_requirements(text: str, holds: bool) -> None:
    ours = {"eval_loss": 1.5, "exact_match": 0.9}
    others = {"base": {"eval_loss": 2.0, "exact_match": 0.1}, "acme/support@3": {"exact_match": 0.8}}
    failed = unmet(parse_requirement(text), ours, others)
    assert (not failed) is holds


@pytest.mark.parametrize(
    "text",
    ["", "eval_loss", "eval_loss < ", "< base", "a < b < c", "eval_loss < base *", "__import__('os')", "a < 1 or b"],
)
def test_what_is_outside_the_grammar_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        parse_requirement(text)


def test_a_metric_that_was_not_measured_is_named() -> None:
    with pytest.raises(UsageError, match="'bleu' was not measured"):
        unmet(parse_requirement("bleu > 1"), {"eval_loss": 1.0}, {})
