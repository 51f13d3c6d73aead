"""Our own routes: who is ready, which models there are, what this replica holds."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from adapterhub.serving import admin
from adapterhub.serving.models import base_card
from adapterhub.serving.replica import Replica
from adapterhub.serving.tenants.callers import CALLER, Caller


def attach(app: FastAPI) -> None:
    """Add the routes. Two replace vLLM's: ``GET /v1/models``, which shows paths, and ``GET /health``, which knows only
    of an engine that ended, and not of one that hangs.
    """
    started = int(time.time())
    app.add_api_route("/v1/models", _models(started), methods=["GET"])
    app.add_api_route("/health", health, methods=["GET"], response_model=None)
    app.add_api_route("/ready", ready, methods=["GET"], response_model=None)
    admin.attach(app)


def _replica(request: Request) -> Replica:
    replica: Replica = request.app.state.adapterhub
    return replica


def caller_of(request: Request) -> Caller:
    """Who asks, as the middleware found out."""
    caller: Caller = request.scope[CALLER]
    return caller


def _models(started: int) -> Any:
    async def models(request: Request) -> dict[str, Any]:
        limit = request.app.state.openai_serving_models.model_config.max_model_len
        caller = caller_of(request)
        base = [base_card(created=started, max_model_len=limit)] if caller.base else []
        cards = [*base, *await _replica(request).models(caller)]
        return {"object": "list", "data": cards}

    return models


async def health(request: Request) -> Response:
    """200 as long as its engine works: with 503 a new start is what helps."""
    reason = _replica(request).why_not_healthy
    return JSONResponse({"reason": reason}, status_code=503) if reason else Response()


async def ready(request: Request) -> Response:
    """200 once this replica answers requests, and as long as its engine lives."""
    reason = _replica(request).why_not_ready
    return JSONResponse({"ready": not reason, "reason": reason or None}, status_code=503 if reason else 200)
