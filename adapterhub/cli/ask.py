"""`ah ask`: one question to a running server, or the same question to several models side by side."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterhub.cli.output import JsonOption, err, out, print_json
from adapterhub.errors import AdapterHubError, EngineError, Gone, NotFound, UsageError
from adapterhub.refs import AdapterRef

if TYPE_CHECKING:
    from openai import OpenAI

BASE = "base"
DEFAULT_URL = "http://127.0.0.1:8000/v1"


@dataclass(frozen=True)
class Question:
    """What is asked of each model, greedily unless told otherwise."""

    messages: tuple[dict[str, str], ...]
    max_tokens: int
    temperature: float


@dataclass(frozen=True)
class Answer:
    """What a model said, and which version it was."""

    model: str  # as asked for
    version: str  # as answered: acme/support@3, or base
    text: str


def ask(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL… QUESTION",
            help="An adapter (acme/support, acme/support@2, …@prod) or base; then the question, - for stdin.",
        ),
    ],
    compare: Annotated[
        bool, typer.Option("--compare", help="Ask the base and every named model, and show the answers side by side.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="A system message before the question.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 always takes the likeliest token.")] = 0.0,
    url: Annotated[str | None, typer.Option(help=f"The server; default $AH_URL, then {DEFAULT_URL}.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask an adapter a question; the answer streams to stdout.

    Examples: ah ask acme/support "Where is my parcel?"
    ah ask acme/support@1 acme/support@2 "Where is my parcel?" --compare
    """
    models, text = _models(words, compare=compare), _text(words[-1])
    messages = ({"role": "system", "content": system},) if system else ()
    question = Question((*messages, {"role": "user", "content": text}), max_tokens, temperature)
    client = _client(url or os.environ.get("AH_URL") or DEFAULT_URL)
    if compare or as_json:
        with ThreadPoolExecutor(len(models)) as pool:
            answers = list(pool.map(lambda model: _whole(client, model, question), models))
        _show(answers, as_json=as_json, compare=compare)
    else:
        _stream(client, models[0], question)


def _models(words: list[str], *, compare: bool) -> list[str]:
    """The models to ask. Raises UsageError, InvalidName."""
    models = words[:-1]
    if not models:
        raise UsageError(
            "a model and a question are needed",
            why=f"only {words[-1]!a} was given",
            hint='ah ask acme/support "Where is my parcel?"',
        )
    for model in models:
        if model != BASE:
            AdapterRef.parse(model)
    if compare:
        return list(dict.fromkeys([BASE, *models]))
    if len(models) > 1:
        raise UsageError(
            f"{len(models)} models were named", why="without --compare one is asked", hint="ah ask … --compare"
        )
    return models


def _text(word: str) -> str:
    text = sys.stdin.read() if word == "-" else word
    if not text.strip():
        raise UsageError("the question is empty", hint='ah ask acme/support "Where is my parcel?"')
    return text


def _client(url: str) -> OpenAI:
    from openai import OpenAI

    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{url!a} is not a URL", hint=f"ah ask … --url {DEFAULT_URL}")
    return OpenAI(base_url=url, api_key=os.environ.get("AH_API_KEY") or "none", max_retries=0, timeout=600)


def _whole(client: OpenAI, model: str, question: Question) -> Answer:
    with _told(client, model):
        raw = client.chat.completions.with_raw_response.create(**_request(model, question))
        said = raw.parse().choices[0].message.content or ""
        return Answer(model, raw.headers.get("x-adapterhub-version", model), said)


def _stream(client: OpenAI, model: str, question: Question) -> None:
    with _told(client, model):
        raw = client.chat.completions.with_raw_response.create(**_request(model, question), stream=True)
        finished = False
        for chunk in raw.parse():
            for choice in chunk.choices:
                sys.stdout.write(choice.delta.content or "")
                sys.stdout.flush()
                finished = finished or choice.finish_reason is not None
        sys.stdout.write("\n")
        if not finished:
            raise EngineError("the answer broke off", why="the server closed the stream", hint="ah ask … again")
    err().print(f"[dim]— {raw.headers.get('x-adapterhub-version', model)}[/]")


def _request(model: str, question: Question) -> dict[str, Any]:
    return {"model": model, **asdict(question), "messages": list(question.messages)}


@contextmanager
def _told(client: OpenAI, model: str) -> Iterator[None]:
    """The client's exceptions in our words."""
    import httpx
    import openai

    try:
        yield
    except openai.APITimeoutError as error:
        raise EngineError("the server did not answer in time", why=str(client.base_url)) from error
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        raise _refusal(error.status_code, model, str(body.get("message") or error.message)) from error
    except openai.APIError as error:
        if isinstance(error, openai.APIConnectionError):
            raise EngineError(
                f"no server answers at {client.base_url}",
                why=str(error.__cause__ or error),
                hint="ah serve --base …, or ah ask … --url http://HOST:PORT/v1",
            ) from error
        raise EngineError("the answer broke off", why=error.message, hint="ah ask … again") from error
    except httpx.TransportError as error:
        raise EngineError("the answer broke off", why=str(error), hint="ah ask … again") from error


def _refusal(status: int, model: str, message: str) -> AdapterHubError:
    if status == 404:
        return NotFound(f"{model} was not found", why=message, hint="ah ls")
    if status == 410:
        return Gone(f"{model} is gone", why=message, hint=f"ah show {model.partition('@')[0]}")
    if status >= 500:
        return EngineError(f"the server could not answer ({status})", why=message)
    return UsageError(f"the server refused the request ({status})", why=message)


def _show(answers: list[Answer], *, as_json: bool, compare: bool) -> None:
    if as_json:
        found = [asdict(answer) for answer in answers]
        print_json(found if compare else found[0])
    elif sys.stdout.isatty():
        _panels(answers)
    else:
        sys.stdout.write("\n".join(f"== {answer.version} ==\n{answer.text.strip()}\n" for answer in answers))


def _panels(answers: list[Answer]) -> None:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(expand=True)
    for _ in answers:
        grid.add_column(ratio=1)
    grid.add_row(*(Panel(Text(a.text.strip()), title=Text(a.version), title_align="left") for a in answers))
    out().print(grid)
