"""`ah` as a user types it, in this process: words in; exit code, stdout and stderr out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from adapterhub.cli.main import main


@dataclass(frozen=True)
class Done:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Ah = Callable[..., Done]


@pytest.fixture
def ah(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ah:
    """``ah("ls", "acme", "--json").json``."""

    def run(*words: object) -> Done:
        monkeypatch.setattr("sys.argv", ["ah", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        return Done(code, printed.out, printed.err)

    return run
