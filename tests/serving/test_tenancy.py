"""Who may call what: routes by every spelling, model names, and what a body may say."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.errors import InvalidName, NotFound, UsageError
from adapterhub.refs import AdapterRef
from adapterhub.serving import tenancy
from adapterhub.serving.tenancy import Manner
from adapterhub.serving.tenants.callers import SINGLE_USER, Caller

CHAT = tenancy.find_route("POST", b"/v1/chat/completions", "/v1/chat/completions")
MESSAGES = tenancy.find_route("POST", b"/v1/messages", "/v1/messages")
TOKENIZE = tenancy.find_route("POST", b"/tokenize", "/tokenize")


def rewrite(body: dict[str, object], **options: object) -> dict[str, object]:
    tenancy.check_body(body)
    return tenancy.rewrite(body, **({"route": CHAT, "caller": SINGLE_USER, "model": "acme/support@3"} | options))


class TestRoutes:
    @pytest.mark.parametrize(
        "path",
        [
            "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters", "/adapters/x", "/invocations", "/ping",
            "/metrics/", "/openapi.json", "/docs", "/server_info", "/collective_rpc", "/sleep", "/wake_up",
            "/reset_prefix_cache", "/pause", "/update_weights", "/abort_requests", "/inference/v1/generate",
            "/start_profile", "/scale_elastic_ep", "/v1/responses/resp_1", "/v1/responses/resp_1/cancel",
            "/v1/audio/transcriptions", "/pooling", "/score", "/rerank", "/load", "/tokenizer_info", "/",
        ],
    )  # fmt: skip
    def test_what_is_not_listed_is_not_there(self, path: str) -> None:
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"):
            with pytest.raises(NotFound):
                tenancy.find_route(method, path.encode(), path)

    @pytest.mark.parametrize(
        ("raw", "path"),
        [
            (b"/v1/chat/completions/", "/v1/chat/completions/"),
            (b"//v1/chat/completions", "//v1/chat/completions"),
            (b"/v1/./chat/completions", "/v1/./chat/completions"),
            (b"/v1/x/../chat/completions", "/v1/x/../chat/completions"),
            (b"/v1/chat%2Fcompletions", "/v1/chat/completions"),
            (b"/v1/chat/completion%73", "/v1/chat/completions"),
            (b"/V1/chat/completions", "/V1/chat/completions"),
            (b"/v1/chat/completions;a", "/v1/chat/completions;a"),
            (b"/v1/chat/completions%00", "/v1/chat/completions\0"),
            (b"/v1/chat/completions", "/v1/load_lora_adapter"),
            (b"http://x/v1/chat/completions", "/v1/chat/completions"),
            (b"v1/chat/completions", "v1/chat/completions"),
        ],
    )
    def test_a_route_has_one_spelling(self, raw: bytes, path: str) -> None:
        with pytest.raises(NotFound):
            tenancy.find_route("POST", raw, path)

    def test_a_method_is_part_of_the_route(self) -> None:
        assert tenancy.find_route("GET", b"/v1/models", "/v1/models").kind == "caller"
        for method in ("POST", "get", "HEAD"):
            with pytest.raises(NotFound):
                tenancy.find_route(method, b"/v1/models", "/v1/models")

    @pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "127.8.0.1", "[::1]:80", None])
    def test_loopback_hosts_are_answered(self, host: str | None) -> None:
        tenancy.check_browser(host, None)

    @pytest.mark.parametrize(
        "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io", ""]
    )
    def test_a_name_that_could_point_anywhere_is_not(self, host: str) -> None:
        with pytest.raises(UsageError):
            tenancy.check_browser(host, None)

    @pytest.mark.parametrize("origin", ["http://localhost:3000", "https://127.0.0.1", "http://[::1]:5173"])
    def test_pages_of_this_machine_may_ask(self, origin: str) -> None:
        tenancy.check_browser("localhost:8000", origin)

    @pytest.mark.parametrize(
        "origin", ["https://evil.example", "null", "", "http://localhost.evil.example", "localhost"]
    )
    def test_pages_of_other_sites_may_not(self, origin: str) -> None:
        with pytest.raises(UsageError):
            tenancy.check_browser("localhost:8000", origin)


class TestModel:
    def test_the_base_and_the_references(self) -> None:
        digest = "sha256:" + "a" * 64
        assert tenancy.read_model({"model": "base"}, SINGLE_USER) is None
        for text in ("acme/support@3", "acme/support@prod", "acme/support@latest", f"acme/support@{digest}"):
            assert tenancy.read_model({"model": text}, SINGLE_USER) == AdapterRef.parse(text)
        assert tenancy.read_model({"model": "acme/support"}, SINGLE_USER) == AdapterRef.parse("acme/support@latest")

    @pytest.mark.parametrize("model", [None, "", 3, ["base"], {"a": 1}, True])
    def test_a_request_names_a_model(self, model: object) -> None:
        with pytest.raises(UsageError):
            tenancy.read_model({"model": model}, SINGLE_USER)
        with pytest.raises(UsageError):
            tenancy.read_model({}, SINGLE_USER)

    @pytest.mark.parametrize(
        "model",
        ["../etc", "/etc/passwd", "acme/../globex", "acme/support@../1", "acme/support\0", "a" * 10_000, "BASE",
         "acme/" + "x" * 64, "acme/text", "./base", "base ", "acme/support@0", "acme/support@-1"],
    )  # fmt: skip
    def test_names_outside_the_grammar_are_refused(self, model: str) -> None:
        with pytest.raises(InvalidName) as caught:
            tenancy.read_model({"model": model}, SINGLE_USER)
        assert len(str(caught.value)) < 400

    def test_another_tenants_adapter_looks_like_none(self) -> None:
        acme = Caller("acme")
        assert tenancy.read_model({"model": "acme/support"}, acme) is not None
        with pytest.raises(NotFound) as foreign:
            tenancy.read_model({"model": "globex/desk@1"}, acme)
        assert str(foreign.value) == str(tenancy.not_found(AdapterRef.parse("globex/desk@1")))


class TestBody:
    @pytest.mark.parametrize(
        "raw",
        [b"", b"{", b"[]", b"3", b"null", b'"x"', b"\xff\xfe", b'{"a": NaN}', b'{"a": 1e999}', b'{"a": -Infinity}',
         b'{"model": "\\ud800"}', b"[" * 100_000, b'{"n": ' + b"1" * 10_000 + b"}"],
    )  # fmt: skip
    def test_what_is_no_json_object_is_refused(self, raw: bytes) -> None:
        with pytest.raises(UsageError):
            tenancy.read_body(raw)

    @given(st.binary(max_size=200))
    def test_any_bytes_are_read_or_refused(self, raw: bytes) -> None:
        with contextlib.suppress(UsageError):
            assert isinstance(tenancy.read_body(raw), dict)

    def test_the_last_of_two_equal_keys_is_the_one_that_goes_on(self) -> None:
        body = tenancy.read_body(b'{"model": "base", "model": "acme/support@3"}')
        assert tenancy.read_model(body, SINGLE_USER) == AdapterRef.parse("acme/support@3")
        assert json.loads(json.dumps(rewrite(body)))["model"] == "acme/support@3"

    def test_the_immutable_name_goes_on_and_the_rest_is_kept(self) -> None:
        body = {"model": "acme/support@prod", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
        seen = rewrite(body)
        assert seen["model"] == "acme/support@3"
        assert {k: seen[k] for k in ("messages", "temperature")} == {k: body[k] for k in ("messages", "temperature")}
        assert body["model"] == "acme/support@prod"

    @pytest.mark.parametrize(
        "field",
        ["chat_template", "priority", "kv_transfer_params", "ec_transfer_params", "vllm_xargs", "prompt_embeds",
         "request_id", "previous_response_id", "background"],
    )  # fmt: skip
    def test_what_reaches_past_the_request_is_refused_unless_null(self, field: str) -> None:
        for value in ("x", 1, {"a": 1}, ["a"], True, -5):
            with pytest.raises(UsageError, match=field):
                rewrite({field: value})
        assert field not in rewrite({field: None})

    def test_a_template_cannot_come_through_the_keyword_arguments(self) -> None:
        with pytest.raises(UsageError):
            rewrite({"chat_template_kwargs": {"chat_template": "{{ 7 * 7 }}"}})
        assert rewrite({"chat_template_kwargs": {"enable_thinking": False}})["chat_template_kwargs"] == {
            "enable_thinking": False
        }

    @pytest.mark.parametrize(
        "part",
        [
            {"type": "image_url", "image_url": {"url": "http://10.0.0.1/x.png"}},
            {"type": "image_url", "image_url": "https://x.example/y"},
            {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
            {"image_url": "http://x"},
            {"type": "video_url", "video_url": {"url": "ftp://x"}},
            {"type": "audio_url", "audio_url": {"url": "http://x"}},
            {"type": "input_image", "image_url": "http://x"},
            {"type": "image", "source": {"type": "url", "url": "http://x"}},
            {"type": "input_file", "file_url": "http://x"},
            {"type": "image_url", "uuid": "someone-elses", "image_url": None},
            {"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]},
        ],
    )
    def test_media_are_never_fetched(self, part: dict[str, object]) -> None:
        for body in ({"messages": [{"role": "user", "content": [part]}]}, {"input": [{"content": [part]}]}):
            with pytest.raises(UsageError, match="media"):
                rewrite(body)

    def test_media_inside_the_request_and_links_in_text_are_fine(self) -> None:
        content = [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
            {"type": "text", "text": "look at http://x.example/y.png"},
            {"type": "tool_use", "name": "open", "input": {"image": "http://x.example/y.png"}},
        ]
        assert rewrite({"messages": [{"role": "user", "content": content}]})["messages"][0]["content"] == content

    def test_no_two_tenants_share_a_salt(self) -> None:
        salts = [Caller(t).salt(own) for t in (None, "a", "b", "ab") for own in (None, "", "b", "a", '"a"')]
        assert len(set(salts)) == len(salts)
        assert Caller("a").salt("x") == Caller("a").salt("x")

    def test_the_salt_is_ours_and_only_where_there_is_a_cache(self) -> None:
        assert rewrite({"cache_salt": "mine"})["cache_salt"] == SINGLE_USER.salt("mine")
        assert rewrite({})["cache_salt"] == SINGLE_USER.salt(None)
        assert "cache_salt" not in rewrite({"cache_salt": "mine"}, route=TOKENIZE)
        with pytest.raises(UsageError):
            rewrite({"cache_salt": 3})

    def test_an_adapters_own_ends_are_added_to_the_callers(self) -> None:
        manner = Manner(ends=(7, 9))
        assert rewrite({}, manner=manner)["stop_token_ids"] == [7, 9]
        assert rewrite({"stop_token_ids": [9, 3]}, manner=manner)["stop_token_ids"] == [9, 3, 7]
        assert rewrite({"stop_token_ids": "x"}, manner=manner)["stop_token_ids"] == "x"  # the engine says what is wrong
        assert "stop_token_ids" not in rewrite({}, route=TOKENIZE, manner=manner)
        assert "stop_token_ids" not in rewrite({})

    def test_an_adapters_own_template_goes_with_the_request(self) -> None:
        for route in (CHAT, TOKENIZE):
            assert rewrite({}, route=route, manner=Manner("{{ x }}"))["chat_template"] == "{{ x }}"
        sent = rewrite({"chat_template_kwargs": {"a": 1}}, route=MESSAGES, manner=Manner("{{ x }}"))
        assert sent["chat_template_kwargs"] == {"a": 1, "chat_template": "{{ x }}"}
        assert "chat_template" not in sent, "the engine does not look there on this route"
        assert not rewrite({}, route=MESSAGES).keys() & {"chat_template", "chat_template_kwargs"}


class TestHeaders:
    def test_the_engine_sees_no_header_that_steers_it(self) -> None:
        headers = [(b"X-Request-Id", b"a"), (b"x-vllm-priority", b"-9"), (b"X-data-parallel-rank", b"1"),
                   (b"content-length", b"3"), (b"transfer-encoding", b"chunked"), (b"accept", b"*/*")]  # fmt: skip
        assert tenancy.strip_headers(headers) == [(b"accept", b"*/*")]

    @pytest.mark.parametrize("value", [b"", b"a b", b"x" * 65, b"a\nb", "ü".encode(), b"-x", b"../x"])
    def test_an_odd_request_id_is_not_taken_over(self, value: bytes) -> None:
        assert tenancy.request_id_of({b"x-request-id": value}) is None

    def test_a_plain_one_is(self) -> None:
        assert tenancy.request_id_of({b"x-request-id": b"trace-1.2_3"}) == "trace-1.2_3"
        assert tenancy.request_id_of({}) is None


def test_numbers_keep_their_value() -> None:
    body = tenancy.read_body(b'{"temperature": 1e-3, "seed": 9007199254740993}')
    assert body["seed"] == 9007199254740993
    assert math.isclose(body["temperature"], 0.001)
