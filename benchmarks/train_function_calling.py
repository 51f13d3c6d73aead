"""The example's order desk: how many of its held-out prompts get a valid call of the right function?

`ah train` with the example's own configuration, then `ah eval` with the scorer below, base and adapter in one run.
Valid is what a client can act on: one call, JSON, arguments that fit the tool's schema in ``tools.json``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "function-calling"
BAR = 0.9
CALL = re.compile(r"<tool_call>(.+)</tool_call>", re.DOTALL)


def valid_call(answer: str, reference: str) -> float:
    """A scorer for `ah eval`: 1 for a valid call of the reference's function."""
    from jsonschema import Draft202012Validator

    schemas = {
        tool["function"]["name"]: tool["function"]["parameters"]
        for tool in json.loads((EXAMPLE / "tools.json").read_text())
    }
    found, wanted = CALL.fullmatch(answer.strip()), CALL.fullmatch(reference.strip())
    assert wanted is not None
    try:
        call = json.loads(found[1]) if found else {}
    except ValueError:
        return 0.0
    name = json.loads(wanted[1])["name"]
    if not isinstance(call, dict) or call.get("name") != name:
        return 0.0
    return float(Draft202012Validator(schemas[name]).is_valid(call.get("arguments")))


def main() -> None:
    from machine import machine
    from trainings import small_base, write_rows

    base = small_base()
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        ah("train", EXAMPLE / "config.yml", "--base", base, "--out", run)
        rows = [json.loads(line) for line in (EXAMPLE / "eval.jsonl").read_text().splitlines()]
        calls = [row for row in rows if CALL.fullmatch(row["messages"][-1]["content"])]
        held_out = write_rows(Path(scratch) / "calls.jsonl", calls)
        score = ["--score", f"{__file__}:valid_call", "--score", "tool_call", "--max-tokens", "80", "--json"]
        scores = json.loads(ah("eval", run, "--base", base, "--data", held_out, *score))["scores"]
    ours, peer = (scores[side]["valid_call"] for side in (str(run), "base"))
    exact = scores[str(run)]["tool_call"]
    what = f"function calling: valid calls of the right function, {len(calls)} prompts (to the letter: {exact:.0%})"
    print(
        json.dumps(
            {
                "name": what,
                "ours": ours,
                "peer": peer,
                "ratio": None,
                "unit": "share; peer: the base",
                "bar": f"≥ {BAR:g}",
                "met": ours >= BAR,
                "machine": machine(),
            }
        )
    )


def ah(*words: Any) -> str:
    command = [sys.executable, "-m", "adapterhub.cli.main", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
