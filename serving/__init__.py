"""Serving: one vLLM process holds the base once, and answers for every adapter of the registry.

    ah serve --base Qwen/Qwen3-0.6B            the base and all adapters, on http://127.0.0.1:8000/v1

    from adapterhub.serving.arguments import ServeOptions
    from adapterhub.serving.engine.engine import Engine

    options = ServeOptions(base="Qwen/Qwen3-0.6B", registry="file:///srv/adapters", cache=Path("/var/cache/ah"))
    with Engine(options) as server:
        client = openai.OpenAI(base_url=server.base_url, api_key="single-user")
        client.chat.completions.create(model="acme/support@prod", messages=[...])

The room `engine` is `ah serve`'s own process: it starts vLLM and stops it, starts it again when it ends by itself, with
a stand-in on its port meanwhile, and lets requests finish before it goes. What makes it ours runs inside
vLLM's own process, on its extension points, so every replica is a whole server and no hop is added:

    request ─► middleware ──► tenancy     which route, which model, what of the body; pure. tenants/: who, and how much
                   │
                   ├────────► rollout/    acme/support@prod ─► the version that is ready here; watches the registry
                   │
                   ├────────► admission/  whose turn it is: fairness, one line a tenant
                   │
                   ├────────► adapters/   a lease until the last byte; loads, and forgets what nobody uses
                   ▼
                vLLM, under the immutable name acme/support@3, streaming untouched
                   │
                   └────────► bill/ (its tokens) ─► telemetry/: the bill, Prometheus, the log, traces

A version never changes and its folder is named after its digest, so nothing that vLLM caches by name or path is ever
stale. A channel that moves is loaded first and flipped after; requests under way finish on the old version.

Where next: `tenancy` (the rules), `adapters.residency` and `rollout.rollout` (the two that keep state), `plugin` (how
vLLM finds us), `replica` (all of it put together), `selftest` (what is proved before the server calls itself ready).
"""
