"""The clients that people have, pointed at a real server: it understands what they send, and they its answers.

OpenAI's and Anthropic's always; LangChain, LiteLLM and OpenAI for Node where they are installed (`make compat`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel

pytestmark = pytest.mark.engine

PROD = "acme/support@prod"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city",
    "strict": True,  # else the arguments are whatever the model makes up
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TOOL: Any = {"type": "function", "function": WEATHER}
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


class Capital(BaseModel):
    city: Literal["Paris", "Rome"]
    is_capital: bool


@pytest.fixture(scope="module")
def client(served: Any) -> Any:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def claude(served: Any) -> Any:
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


def ask(client: Any, model: str = "base", **options: Any) -> Any:
    options = {"messages": QUESTION, "max_tokens": 12, "temperature": 0} | options
    return client.chat.completions.create(model=model, **options)


class TestChat:
    def test_an_answer_its_usage_and_the_version_that_gave_it(self, client: Any) -> None:
        raw = client.chat.completions.with_raw_response.create(
            model=PROD, messages=QUESTION, max_completion_tokens=5, extra_body={"ignore_eos": True}
        )
        answer = raw.parse()
        assert raw.headers["x-adapterhub-version"] == answer.model == "acme/support@1"
        assert answer.choices[0].message.content
        assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (5, answer.usage.prompt_tokens + 5)
        assert ask(client).choices[0].message.content == "The capital of France is Paris."

    def test_a_stream_is_the_same_and_ends_with_its_usage(self, client: Any) -> None:
        whole = ask(client, PROD)
        chunks = list(ask(client, PROD, stream=True, stream_options={"include_usage": True}))
        assert (
            "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
        )
        assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
        assert all(c.usage is None for c in chunks[:-1])
        assert not any(c.usage for c in ask(client, PROD, stream=True))

    def test_several_answers_and_stops(self, client: Any) -> None:
        several = ask(client, n=3, temperature=1, seed=7, max_tokens=4)
        assert [choice.index for choice in several.choices] == [0, 1, 2]
        chunks = ask(client, n=2, stream=True, max_tokens=4, temperature=1)
        assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1}
        stopped = ask(client, stop=[" Paris", "\n\n"]).choices[0]
        assert (stopped.message.content, stopped.finish_reason) == ("The capital of France is", "stop")

    def test_probabilities(self, client: Any) -> None:
        told = ask(client, PROD, logprobs=True, top_logprobs=3, max_tokens=3).choices[0].logprobs.content
        assert len(told) == 3
        assert all(len(t.top_logprobs) == 3 and t.logprob == t.top_logprobs[0].logprob <= 0 for t in told)

    def test_json_by_a_schema(self, client: Any) -> None:
        options = {"messages": QUESTION, "max_tokens": 60, "temperature": 0, "response_format": Capital}
        for model in ("base", PROD):  # an adapter that babbles babbles by the schema
            parsed = client.chat.completions.parse(model=model, **options).choices[0].message.parsed
            assert isinstance(parsed, Capital)
        with client.chat.completions.stream(model=PROD, **options) as stream:
            assert isinstance(stream.get_final_completion().choices[0].message.parsed, Capital)

    def test_tools(self, client: Any) -> None:
        """By the base: a loud adapter babbles between the tokens of a call until its tokens are used up."""
        for choice in (NAMED, "required"):
            message = ask(client, tools=[TOOL], tool_choice=choice, max_tokens=60).choices[0].message
            call = message.tool_calls[0]
            assert call.function.name == "get_weather" and "city" in json.loads(call.function.arguments)
        chunks = ask(client, tools=[TOOL], tool_choice=NAMED, max_tokens=60, stream=True)
        deltas = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices and c.choices[0].delta.tool_calls]
        assert "city" in json.loads("".join(d.function.arguments or "" for d in deltas))
        told = [*QUESTION, message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
        assert ask(client, messages=told, tools=[TOOL], tool_choice="none").choices[0].message.content
        assert ask(client, tools=[TOOL]).choices[0].finish_reason

    def test_what_newer_clients_send_beside(self, client: Any) -> None:
        """Fields that are for OpenAI's own service do no harm here."""
        options = {"user": "ana", "store": False, "metadata": {"a": "b"}, "parallel_tool_calls": True, "tools": [TOOL]}
        assert ask(client, **options, tool_choice="none").choices[0].message.content
        parts = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
        assert "Paris" in ask(client, messages=parts).choices[0].message.content
        developer = [{"role": "developer", "content": "Be brief."}, *QUESTION]
        assert ask(client, messages=developer).choices[0].message.content


class TestTheOtherRoutes:
    def test_completions(self, client: Any) -> None:
        options = {"prompt": "The capital of France is", "max_tokens": 5, "temperature": 0}
        whole = client.completions.create(model=PROD, n=1, logprobs=2, echo=False, **options)
        assert len(whole.choices[0].logprobs.tokens) == whole.usage.completion_tokens
        chunks = client.completions.create(model=PROD, stream=True, **options)
        assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
        for prompts in (["a", "b"], [[1, 2], [3]]):
            assert len(client.completions.create(model="base", **options | {"prompt": prompts}).choices) == 2

    def test_responses(self, client: Any) -> None:
        options = {"input": "What is the capital of France?", "max_output_tokens": 12, "temperature": 0}
        answer = client.responses.create(model="base", **options)
        assert answer.output_text == "The capital of France is Paris." and answer.usage.output_tokens > 3
        events = list(client.responses.create(model="base", stream=True, **options))
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == answer.output_text
        assert events[-1].type == "response.completed"
        parsed = client.responses.parse(model=PROD, text_format=Capital, **options | {"max_output_tokens": 60})
        assert isinstance(parsed.output_parsed, Capital)
        tool = {"type": "function", **WEATHER}
        called = client.responses.create(
            model="base", tools=[tool], tool_choice="required", **options | {"max_output_tokens": 60}
        )
        assert [item.name for item in called.output if item.type == "function_call"] == ["get_weather"]

    def test_models(self, client: Any) -> None:
        assert {"base", "acme/support", PROD} <= {model.id for model in client.models.list()}

    def test_mistakes_are_the_exceptions_that_people_catch(self, client: Any) -> None:
        with pytest.raises(openai.NotFoundError, match="acme/nope does not exist"):
            ask(client, "acme/nope")
        with pytest.raises(openai.BadRequestError, match="is not a tenant name"):
            ask(client, "../../etc")
        with pytest.raises(openai.BadRequestError):
            ask(client, temperature=-1)
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="base", input="x")

    async def _two_at_once(self, url: str) -> list[str]:
        import asyncio

        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(ask(client, "base"), ask(client, PROD))
        return [answer.model for answer in answers]

    def test_asynchronously(self, served: Any) -> None:
        import asyncio

        assert asyncio.run(self._two_at_once(served.url)) == ["base", "acme/support@1"]


class TestAnthropic:
    # the client of today knows no temperature any more, and sends what it is given
    OPTIONS: Any = {"messages": QUESTION, "max_tokens": 12, "extra_body": {"temperature": 0}}  # noqa: RUF012

    def test_a_message_and_a_stream(self, claude: Any) -> None:
        answer = claude.messages.create(model="base", **self.OPTIONS)
        assert answer.content[0].text == "The capital of France is Paris."
        assert answer.usage.output_tokens > 3 and answer.stop_reason == "end_turn"
        with claude.messages.stream(model="base", **self.OPTIONS) as stream:
            assert "".join(stream.text_stream) == answer.content[0].text
            assert stream.get_final_message().usage.output_tokens == answer.usage.output_tokens
        adapter = claude.messages.create(model=PROD, system="Be brief.", metadata={"user_id": "ana"}, **self.OPTIONS)
        assert adapter.model == "acme/support@1" and adapter.content[0].text != answer.content[0].text

    def test_stops_tools_and_counting(self, claude: Any) -> None:
        stopped = claude.messages.create(model="base", stop_sequences=[" Paris"], **self.OPTIONS)
        assert stopped.content[0].text == "The capital of France is"
        assert claude.messages.count_tokens(model=PROD, messages=QUESTION).input_tokens > 10
        tool = {"name": "get_weather", "description": "of a city", "input_schema": WEATHER["parameters"]}
        called = claude.messages.create(
            model="base",
            tools=[tool],
            tool_choice={"type": "tool", "name": "get_weather"},
            **self.OPTIONS | {"max_tokens": 60},
        )
        used = next(block for block in called.content if block.type == "tool_use")
        assert used.name == "get_weather" and "city" in used.input

    def test_mistakes(self, claude: Any) -> None:
        with pytest.raises(anthropic.NotFoundError, match="acme/nope does not exist"):
            claude.messages.create(model="acme/nope", **self.OPTIONS)
        with pytest.raises(anthropic.BadRequestError):
            claude.messages.create(model=PROD, **self.OPTIONS | {"extra_body": {"temperature": -5}})


class TestTheAdaptersOwnTemplate:
    TEMPLATE = "{% for m in messages %}<<{{ m['content'] }}>>{% endfor %}"
    PROMPT = "<<What is the capital of France?>>"

    def test_it_is_what_the_prompt_is_made_by_on_every_route(self, served: Any, client: Any, claude: Any) -> None:
        served.publish("acme/own", seed=50, template=self.TEMPLATE)
        body = {"model": "acme/own", "messages": QUESTION}
        ids = served.http.post("/tokenize", json=body).json()["tokens"]
        back = served.http.post("/detokenize", json={"model": "acme/own", "tokens": ids}).json()["prompt"]
        assert back == self.PROMPT
        raw = {"model": "acme/own", "prompt": self.PROMPT, "max_tokens": 12, "temperature": 0}
        expected = served.http.post("/v1/completions", json=raw).json()
        text, tokens = expected["choices"][0]["text"], expected["usage"]["prompt_tokens"]
        chat = ask(client, "acme/own")
        assert (chat.choices[0].message.content, chat.usage.prompt_tokens) == (text, tokens)
        message = claude.messages.create(model="acme/own", **TestAnthropic.OPTIONS)
        assert (message.content[0].text, message.usage.input_tokens) == (text, tokens)
        assert claude.messages.count_tokens(model="acme/own", messages=QUESTION).input_tokens == tokens
        options = {"input": QUESTION[0]["content"], "max_output_tokens": 12, "temperature": 0}
        answer = client.responses.create(model="acme/own", **options)
        assert (answer.output_text, answer.usage.input_tokens) == (text, tokens)
        assert ask(client).choices[0].message.content == "The capital of France is Paris."


@pytest.mark.filterwarnings("ignore")  # of the packages themselves
class TestOthers:
    """Heavy packages: `make compat` installs them and runs these."""

    def test_langchain(self, served: Any) -> None:
        langchain = pytest.importorskip("langchain_openai", reason="make compat installs langchain-openai")
        model = langchain.ChatOpenAI(
            base_url=f"{served.url}/v1", api_key="none", model="base", temperature=0, max_tokens=60, max_retries=0
        )
        answer = model.invoke("What is the capital of France?")
        assert answer.content == "The capital of France is Paris." and answer.usage_metadata["output_tokens"] > 3
        assert "".join(c.content for c in model.stream("What is the capital of France?")) == answer.content
        assert isinstance(model.with_structured_output(Capital).invoke("Paris?"), Capital)
        called = model.bind_tools([TOOL], tool_choice="get_weather", strict=True).invoke("The weather in Paris?")
        assert called.tool_calls[0]["name"] == "get_weather"

    def test_litellm(self, served: Any) -> None:
        litellm = pytest.importorskip("litellm", reason="make compat installs litellm")
        options = {"messages": QUESTION, "max_tokens": 12, "temperature": 0, "api_key": "none"}
        openai_like = options | {"model": f"openai/{PROD}", "api_base": f"{served.url}/v1"}
        answer = litellm.completion(**openai_like)
        assert answer.model.endswith("acme/support@1") and answer.usage.completion_tokens > 0
        text = "".join(c.choices[0].delta.content or "" for c in litellm.completion(**openai_like, stream=True))
        assert text == answer.choices[0].message.content
        claude_like = options | {"model": f"anthropic/{PROD}", "api_base": served.url}
        assert litellm.completion(**claude_like).choices[0].message.content == text
        with pytest.raises(litellm.NotFoundError):
            litellm.completion(**openai_like | {"model": "openai/acme/nope"})

    def test_openai_for_node(self, served: Any) -> None:
        modules = os.environ.get("AH_NODE_MODULES", "")
        if shutil.which("node") is None or not (Path(modules) / "openai").is_dir():
            pytest.skip("make compat installs OpenAI's client for Node, where there is a node")
        program = Path(__file__).with_name("openai_client.mjs")
        done = subprocess.run(
            ["node", program, f"{served.url}/v1", PROD, str(Path(modules) / "openai" / "index.mjs")],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["model"] == "acme/support@1"
