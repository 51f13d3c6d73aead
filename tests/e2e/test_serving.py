"""The real engine: who gets which answer, while versions move, clients misbehave and files go away."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from adapterhub.refs import AdapterName

pytestmark = pytest.mark.engine

SPELLINGS = ("{}", "{}/", "/{}", "//{}", "{}?x=1", "/.{}", "/v1/..{}", "{}%2f", "{}%00", "{};x", "{}/.", "/%2e{}")


class TestAnswers:
    def test_two_tenants_and_the_base_each_answer_as_themselves(self, served: Any) -> None:
        models = ["base", "acme/support@prod", "acme/support", "globex/desk@prod"]
        alone = {model: served.text(model) for model in models}
        assert alone["base"] == "The capital of France is Paris."
        assert len(set(alone.values())) == len(models)
        with ThreadPoolExecutor(8) as clients:
            together = list(clients.map(served.text, models * 4))
        assert together == list(alone.values()) * 4

    def test_the_answer_says_which_version_it_is_from(self, served: Any) -> None:
        digest = served.ask("acme/support@1").headers["x-adapterhub-digest"]
        for model in ("acme/support@1", "acme/support@prod", f"acme/support@{digest}"):
            answer = served.ask(model)
            assert answer.headers["x-adapterhub-version"] == answer.json()["model"] == "acme/support@1"
            assert answer.headers["x-adapterhub-digest"] == digest

    def test_every_route_of_the_api_takes_the_names(self, served: Any) -> None:
        prompt = {"model": "acme/support@prod", "prompt": "Hello", "max_tokens": 4, "temperature": 0}
        messages = {"model": "acme/support@prod", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        asked = {
            "/v1/completions": prompt,
            "/v1/responses": {"model": "acme/support@prod", "input": "Hi", "max_output_tokens": 4},
            "/v1/messages": messages,
            "/v1/messages/count_tokens": messages,
            "/tokenize": {"model": "acme/support@prod", "prompt": "Hello"},
            "/detokenize": {"model": "acme/support@prod", "tokens": [1, 2]},
        }
        for path, body in asked.items():
            answer = served.http.post(path, json=body)
            assert answer.status_code == 200, (path, answer.text)
            assert answer.headers["x-adapterhub-version"] == "acme/support@1"

    def test_probabilities_of_prompts_harm_nobody(self, served: Any) -> None:
        """With adapters, vLLM's own LoRA product on CPU ends the engine on these."""
        wishes = [{"prompt_logprobs": 1}, {"logprobs": True, "top_logprobs": 3}, {"n": 2, "temperature": 1}]
        asked = [(model, wish) for model in ("base", "acme/support@1", "globex/desk") for wish in wishes]
        with ThreadPoolExecutor(len(asked)) as clients:
            answers = list(clients.map(lambda a: served.ask(a[0], **a[1]), asked))
        assert [a.status_code for a in answers] == [200] * len(asked)
        assert served.text("base") == "The capital of France is Paris."

    def test_models_are_listed_without_paths(self, served: Any) -> None:
        answer = served.http.get("/v1/models")
        assert {"base", "acme/support", "acme/support@prod", "acme/support@1", "globex/desk@1"} <= {
            model["id"] for model in answer.json()["data"]
        }
        assert str(served.folder) not in answer.text


class TestRefusals:
    def test_nothing_of_the_engine_is_reached_around_the_list(self, served: Any) -> None:
        """Every route that vLLM told its log of, by many spellings, byte for byte on the wire."""
        routes = {
            line.split("Route: ")[1].split(",")[0] for line in served.log.read_text().splitlines() if "Route: " in line
        }
        allowed = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages",
                   "/v1/messages/count_tokens", "/v1/embeddings", "/tokenize", "/detokenize", "/v1/models", "/health",
                   "/ready", "/version", "/metrics"}  # fmt: skip
        allowed |= {route for route in routes if route.startswith("/adapterhub/")}
        assert allowed - {"/v1/embeddings", "/metrics"} <= routes
        assert {"/invocations", "/ping"} <= routes - allowed
        more = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters", "/openapi.json", "/docs"}
        port = served.http.base_url.port
        for route in sorted((routes - allowed) | more):
            path = route.replace("{response_id}", "resp_1")
            for spelling in SPELLINGS:
                for method in ("GET", "POST"):
                    status = on_the_wire(port, method, spelling.format(path))
                    assert status in (400, 404), (method, spelling.format(path), status)
        for route in sorted(allowed):
            for spelling in SPELLINGS[1:]:
                if "?" not in spelling:
                    assert on_the_wire(port, "POST", spelling.format(route)) in (400, 404)

    def test_what_is_not_there_and_what_is_yanked(self, served: Any) -> None:
        served.publish("acme/bad", seed=20, channel="prod")
        assert served.ask("acme/bad@prod").status_code == 200
        served.registry.set_status(AdapterName.parse("acme/bad"), 1, "yanked", who="tests", why="leaks prices")
        served.until(lambda: served.ask("acme/bad@prod", tokens=1).status_code == 410, seconds=20)
        assert served.ask("acme/bad@1").status_code == 410
        assert "leaks prices" in served.ask("acme/bad@1").json()["error"]["message"]
        for model in ("acme/nope", "nobody/support", "acme/support@9", "acme/support@canary"):
            assert served.ask(model).status_code == 404
        for model in ("../../etc", "/etc/passwd", "acme/support@0", "x" * 5000, "", None, 3, ["base"]):
            assert served.ask(model).status_code == 400

    def test_a_rank_over_the_servers_names_the_flag(self, served: Any) -> None:
        served.publish("acme/wide", seed=21, rank=64)
        answer = served.ask("acme/wide")
        assert answer.status_code == 422
        assert "--max-lora-rank" in answer.json()["error"]["message"]

    @pytest.mark.parametrize(
        "body",
        [
            {"messages": "no list"}, {"messages": [3]}, {"messages": []}, {}, {"messages": None},
            {"max_tokens": "many"}, {"temperature": "hot"}, {"stream": "maybe"}, {"max_tokens": -1}, {"n": 0},
            {"temperature": -3}, {"stop": {"a": 1}}, {"logit_bias": [1]}, {"tools": 5}, {"max_tokens": 10**30},
            {"chat_template": "{{ 7 * 7 }}"}, {"priority": -100}, {"kv_transfer_params": {}}, {"vllm_xargs": {"a": 1}},
            {"chat_template_kwargs": {"chat_template": "x"}}, {"cache_salt": 7}, {"request_id": "mine"},
        ],
    )  # fmt: skip
    def test_odd_bodies_are_the_clients_mistake(self, served: Any, body: dict[str, Any]) -> None:
        request = {"model": "acme/support@1", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1} | body
        if not body:
            del request["messages"]
        answer = served.http.post("/v1/chat/completions", json=request)
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.json()["error"]["message"]

    def test_broken_and_huge_bodies(self, served: Any) -> None:
        json_type = {"content-type": "application/json"}
        for raw in (b"{", b"", b"null", b"\x00" * 100, b"[" * 1_000_000, b'{"model": "base"' + b" " * 40_000_000):
            answer = served.http.post("/v1/chat/completions", content=raw, headers=json_type)
            assert answer.status_code in (400, 413)
        assert served.text("base") == "The capital of France is Paris."


class TestHotSwap:
    def test_a_stream_ends_on_its_version_and_the_next_starts_on_the_new(self, served: Any) -> None:
        served.publish("acme/swap", seed=30, channel="prod")
        one = served.text("acme/swap@prod", tokens=40, ignore_eos=True).rstrip("\ufffd")
        chunks = []
        with served.stream("acme/swap@prod", tokens=200) as (answer, coming):
            chunks += [next(coming) for _ in range(3)]
            served.publish("acme/swap", seed=31, channel="prod")
            served.poll()
            after = served.ask("acme/swap@prod")
            assert after.headers["x-adapterhub-version"] == "acme/swap@2"
            assert {"model": "acme/swap@1", "leases": 1} in served.state()["resident"], "it streams no more"
            chunks += list(coming)
        assert answer.headers["x-adapterhub-version"] == "acme/swap@1"
        assert {chunk["model"] for chunk in chunks} == {"acme/swap@1"}
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
        assert text.startswith(one)
        served.move("acme/swap", "prod", 1)
        served.poll()
        assert served.ask("acme/swap@prod").headers["x-adapterhub-version"] == "acme/swap@1"

    def test_under_load_no_request_fails_and_none_mixes(self, served: Any) -> None:
        served.publish("acme/busy", seed=32, channel="prod")
        served.publish("acme/busy", seed=33)
        alone = {f"acme/busy@{n}": served.text(f"acme/busy@{n}") for n in (1, 2)}
        assert len(set(alone.values())) == 2
        answers: list[tuple[int, str, str]] = []
        stop = threading.Event()

        def client() -> None:
            while not stop.is_set():
                got = served.ask("acme/busy@prod")
                text = got.json()["choices"][0]["message"]["content"] if got.status_code == 200 else got.text
                answers.append((got.status_code, got.headers.get("x-adapterhub-version", ""), text))

        threads = [threading.Thread(target=client) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for version in (2, 1, 2):
                seen = len(answers)
                served.move("acme/busy", "prod", version)
                served.poll()
                served.until(lambda seen=seen, v=version: (200, f"acme/busy@{v}") in {a[:2] for a in answers[seen:]})
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert {status for status, _, _ in answers} == {200}
        assert all(text == alone[version] for _, version, text in answers)
        assert {version for _, version, _ in answers} == set(alone)

    def test_the_watcher_finds_a_move_without_being_told(self, served: Any) -> None:
        served.publish("acme/quiet", seed=34, channel="prod")
        assert served.ask("acme/quiet@prod", tokens=1).headers["x-adapterhub-version"] == "acme/quiet@1"
        served.publish("acme/quiet", seed=35, channel="prod")
        served.until(
            lambda: served.ask("acme/quiet@prod", tokens=1).headers["x-adapterhub-version"] == "acme/quiet@2",
            seconds=20,
        )


class TestShares:
    def test_half_of_the_callers_get_the_candidate_and_each_keeps_its_version(self, served: Any) -> None:
        for seed in (36, 37):
            served.publish("acme/half", seed=seed)
        # three tokens: the fourth is a tie to within 3e-5, which a batch may decide otherwise
        alone = {f"acme/half@{n}": served.text(f"acme/half@{n}", tokens=3) for n in (1, 2)}
        served.registry.set_channel(AdapterName.parse("acme/half"), "prod", {1: 50, 2: 50}, who="tests")
        users = [f"user-{n}" for n in range(12)]

        def versions() -> list[str]:
            with ThreadPoolExecutor(6) as clients:
                answers = list(clients.map(lambda u: served.ask("acme/half@prod", tokens=3, user=u), users))
            for answer in answers:
                text = answer.json()["choices"][0]["message"]["content"]
                assert text == alone[answer.headers["x-adapterhub-version"]]
            return [answer.headers["x-adapterhub-version"] for answer in answers]

        first = versions()
        assert set(first) == set(alone)
        assert versions() == first


class TestResidency:
    def test_clients_that_leave_give_everything_back(self, served: Any) -> None:
        for _ in range(5):
            with served.stream("acme/support@1", tokens=400) as (_, coming):
                next(coming)
        served.until(lambda: all(r["leases"] == 0 for r in served.state()["resident"]), seconds=30)
        assert served.ask("acme/support@1").status_code == 200

    def test_more_adapters_than_there_are_places(self, served: Any) -> None:
        """Each answers as itself, also after it was forgotten and came back."""
        count = served.state()["max_cpu_loras"] + 2
        for n in range(count):
            served.publish(f"many/a{n}", seed=100 + n)
        first = [served.text(f"many/a{n}", tokens=4) for n in range(count)]
        assert len(served.state()["resident"]) == served.state()["max_cpu_loras"]
        again = [served.text(f"many/a{n}", tokens=4) for n in range(count)]
        assert first == again
        assert len(set(first)) > count // 2

    def test_the_cache_is_deleted_while_serving(self, served: Any) -> None:
        """What is loaded goes on; what is not is fetched again; more than the engine holds goes through it after."""
        served.publish("acme/kept", seed=40)
        served.publish("acme/later", seed=41)
        kept = served.text("acme/kept")
        with served.stream("acme/kept", tokens=100) as (_, coming):
            next(coming)
            shutil.rmtree(served.cache / "sha256")
            assert served.text("acme/kept") == kept
            assert served.ask("acme/later").status_code == 200
            assert len(list(coming)) > 50
        for n in range(served.state()["max_cpu_loras"]):
            served.publish(f"gone/a{n}", seed=200 + n)
            assert served.ask(f"gone/a{n}", tokens=1).status_code == 200
        assert served.text("acme/kept") == kept
        assert served.http.get("/ready").status_code == 200


def on_the_wire(port: int, method: str, target: str) -> int:
    """The status of one request whose target no client library has tidied up."""
    body = json.dumps({"model": "base", "messages": [], "lora_name": "x", "lora_path": "/tmp", "name": "x", "src": "/"})
    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        return int(connection.makefile("rb").readline().split()[1])
