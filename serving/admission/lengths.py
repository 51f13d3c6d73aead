"""How long prompts and answers may be, and how many tokens a request may come to. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterhub.errors import UsageError

MAX_ANSWERS = 128  # `n`, as OpenAI takes it
_COMPLETIONS_DEFAULT = 16  # tokens of an answer of /v1/completions where nothing is said, by the API
_ANSWER_FIELDS: Mapping[str, tuple[str, ...]] = {  # the first is the one that is written where none was sent
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
}
_GUESS = 256  # tokens of an answer whose request does not say


def check_answers(body: Mapping[str, Any]) -> None:
    """Raises UsageError for a number of answers or tokens that is none."""
    for field in ("n", "best_of", *{name for names in _ANSWER_FIELDS.values() for name in names}):
        value = body.get(field)
        if value is not None and (type(value) is not int or value < (1 if field in ("n", "best_of") else 0)):
            raise UsageError(f"`{field}` must be a whole number", why="it is counted in answers or tokens")
    if max(body.get("n") or 1, body.get("best_of") or 1) > MAX_ANSWERS:
        raise UsageError("`n` is too large", why=f"at most {MAX_ANSWERS} answers to one request")


def asked(body: Mapping[str, Any], path: str) -> int | None:
    """The longest answer that a request asks for, in tokens; None where it does not say."""
    named = [body[field] for field in _ANSWER_FIELDS.get(path, ()) if body.get(field) is not None]
    return max(named, default=None)


def with_output(body: Mapping[str, Any], path: str, most: int | None) -> dict[str, Any]:
    """``body`` with its answer bounded to ``most`` tokens. Raises UsageError where it asks for more."""
    fields = _ANSWER_FIELDS.get(path)
    if most is None or fields is None:
        return dict(body)
    wanted = asked(body, path)
    if wanted is not None:
        if wanted > most:
            raise UsageError(f"an answer of {wanted} tokens is not allowed", why=f"at most {most} with this key")
        return dict(body)
    default = min(most, _COMPLETIONS_DEFAULT) if path == "/v1/completions" else most
    return {**body, fields[0]: default}


def room(*, context: int, prompt: int) -> int:
    """What is left for the answer, in tokens. Raises UsageError where there is nothing."""
    if prompt >= context:
        raise UsageError(f"the prompt is too long: {prompt} tokens", why=f"at most {context} with its answer")
    return context - prompt


def guess(body: Mapping[str, Any], path: str, *, prompt: int, answers: int) -> int:
    """Tokens that a request may come to, about: what is held of the minute until it is known."""
    wanted = asked(body, path)
    answer = (wanted if wanted is not None else _GUESS) if path in _ANSWER_FIELDS else 0
    return prompt + answers * answer


def counting_requests(body: Mapping[str, Any], path: str) -> list[tuple[str, dict[str, Any]]]:
    """What to ask the engine for the exact length of a prompt: paths and bodies, whose largest count is it."""
    model = {"model": body.get("model")}
    if path == "/v1/messages":
        kept = {k: body[k] for k in ("messages", "system", "tools") if k in body}
        return [("/v1/messages/count_tokens", model | kept)]
    if path in ("/v1/completions", "/v1/embeddings"):
        prompts = body.get("prompt" if path == "/v1/completions" else "input")
        texts = [p for p in (prompts if isinstance(prompts, list) else [prompts]) if isinstance(p, str)]
        return [("/tokenize", model | {"prompt": text}) for text in texts]
    names = ("messages", "tools", "chat_template", "chat_template_kwargs", "add_generation_prompt")
    kept = {k: body[k] for k in names if k in body}
    if path == "/v1/responses":
        kept = {"messages": _messages(body)}
    return [("/tokenize", model | kept)]


def ids_length(body: Mapping[str, Any]) -> int:
    """Of prompts that are token ids: the longest."""
    prompts = [body.get("prompt"), body.get("input")]
    lists = [p for prompt in prompts if isinstance(prompt, list) for p in (prompt, *prompt) if isinstance(p, list)]
    return max((len(ids) for ids in lists if ids and all(isinstance(i, int) for i in ids)), default=0)


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The input of ``/v1/responses`` as chat messages: all text of it, to be counted."""
    system = body.get("instructions")
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if isinstance(system, str) else []
    given = body.get("input")
    items = given if isinstance(given, list) else [{"role": "user", "content": given}]
    for item in items:
        if isinstance(item, dict):
            role = item.get("role") if item.get("role") in ("system", "user", "assistant") else "user"
            messages.append({"role": role, "content": _text(item.get("content") or item.get("output") or item)})
    return messages


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(_text(part) for part in content)
    if isinstance(content, dict):
        return str(content.get("text") or content)
    return str(content)
