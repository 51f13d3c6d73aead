"""Trained tokens are found from the template itself, whatever it is.

The templates are in the styles that published models use, written for these tests after their published formats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from adapterhub.errors import ConfigError, DataError
from adapterhub.trainers.data import Conversation, Row, Segments, Text, Tokens, with_system
from adapterhub.trainers.labels import templates
from adapterhub.trainers.labels.examples import IGNORED
from adapterhub.trainers.labels.labels import Labeler, coloured


@dataclass(frozen=True)
class Style:
    """A template, the special tokens of its tokenizer, and how an answer "Ahoy" reads where it is trained on."""

    template: str
    specials: tuple[str, ...]
    eos: str
    trained: str = ""  # of the text "Ahoy": empty means "Ahoy" and the eos


STYLES: dict[str, Style] = {
    "chatml": Style(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    "default-system": Style(
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n"
        "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    "llama-2": Style(
        "{% if messages[0].role == 'system' %}{% set sys = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set sys = '' %}{% endif %}"
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}<s>[INST] {{ (sys if loop.first else '') + m.content.strip() }} [/INST]"
        "{% else %} {{ m.content.strip() }} </s>{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        "</s>",
        " Ahoy </s>",
    ),
    "llama-3": Style(
        "<|begin|>{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}",
        ("<|begin|>", "<|header|>", "<|/header|>", "<|eot|>", "<|end_of_text|>"),
        "<|end_of_text|>",
        "Ahoy<|eot|>",
    ),
    "mistral": Style(
        "<s>{% for m in messages %}{% if m.role == 'user' %}"
        "{% if tools and loop.index0 == messages | length - 1 - (1 if messages[-1].role == 'assistant' else 0) %}"
        "[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}[INST]{{ m.content }}[/INST]"
        "{% elif m.role == 'assistant' %}{% if m.tool_calls %}[CALLS]"
        "{{ m.tool_calls | map(attribute='function') | list | tojson }}</s>"
        "{% else %}{{ m.content }}</s>{% endif %}{% endif %}{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOLS]", "[/TOOLS]", "[CALLS]"),
        "</s>",
    ),
    "gemma": Style(
        "<bos>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        "Ahoy<end_of_turn>",
    ),
    "phi": Style(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|endoftext|>",
        "Ahoy<|end|>",
    ),
    "thinking": Style(
        "{% set ns = namespace(last=0) %}{% for m in messages if m.role == 'user' %}{% set ns.user = m %}{% endfor %}"
        "{% for m in messages %}{% if m == ns.user %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% if loop.index0 > ns.last %}<think>\n"
        "{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' }}"
        "\n</think>\n\n{% endif %}{{ text }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    "zephyr": Style(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% if loop.last and add_generation_prompt %}"
        "<|assistant|>\n{% endif %}{% endfor %}",
        ("</s>",),
        "</s>",
    ),
    "alpaca": Style(
        "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
        "{% elif m.role == 'assistant' %}### Response:\n{{ m.content }}\n\n{% else %}{{ m.content }}\n\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}",
        ("</s>",),
        "</s>",
    ),
    "command-r": Style(
        "<BOS>{% for m in messages %}<|START|><|{{ {'user': 'USER', 'assistant': 'BOT', 'system': 'SYS'}[m.role] }}|>"
        "{{ m.content }}<|END|>{% endfor %}{% if add_generation_prompt %}<|START|><|BOT|>{% endif %}",
        ("<BOS>", "<|START|>", "<|END|>", "<|USER|>", "<|BOT|>", "<|SYS|>"),
        "<|END|>",
    ),
    "deepseek": Style(
        "<bos>{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        "<|User|>{{ m.content }}{% elif m.role == 'tool' %}<|out|>{{ m.content }}<|/out|>{% elif m.tool_calls %}"
        "<|Assistant|>{{ m.content }}<|calls|>{% for c in m.tool_calls %}<|call|>{{ c.function.name }}\n"
        "{{ c.function.arguments | tojson }}<|/call|>{% endfor %}<|/calls|><eos>{% else %}"
        "<|Assistant|>{{ m.content }}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|>{% endif %}",
        ("<bos>", "<eos>", "<|User|>", "<|Assistant|>", "<|calls|>", "<|/calls|>", "<|call|>", "<|/call|>"),
        "<eos>",
    ),
    "granite": Style(
        "{% for m in messages %}<|role|>{{ m.role }}<|/role|>{{ m.content }}<|eot|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|role|>assistant<|/role|>{% endif %}",
        ("<|role|>", "<|/role|>", "<|eot|>"),
        "<|eot|>",
    ),
    "no-generation-prompt": Style(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}",
        ("</s>",),
        "</s>",
        "<|assistant|>Ahoy</s>",
    ),
}

# Ours, by the name in a config: the tokenizer's end of sequence, and what is trained on of "Ahoy".
ENDS = {
    "alpaca": ("</s>", "Ahoy</s>"),
    "aya": ("<|END_OF_TURN_TOKEN|>", ""),
    "chatml": ("<|im_end|>", ""),
    "cohere": ("<|END_OF_TURN_TOKEN|>", ""),
    "deepseek_v2": ("<｜end▁of▁sentence｜>", " Ahoy<｜end▁of▁sentence｜>"),
    "deepseek_v3": ("<｜end▁of▁sentence｜>", ""),
    "gemma": ("<eos>", "Ahoy<end_of_turn>"),
    "gemma3": ("<eos>", "Ahoy<end_of_turn>"),
    "granite": ("<|end_of_text|>", ""),
    "granitemoe": ("<|end_of_text|>", ""),
    "llama3": ("<|end_of_text|>", "Ahoy<|eot_id|>"),
    "mistral_v1": ("</s>", " Ahoy</s>"),
    "mistral_v2v3": ("</s>", " Ahoy</s>"),
    "mistral_v3_tekken": ("</s>", ""),
    "phi_3": ("<|endoftext|>", "Ahoy<|end|>"),
    "phi_35": ("<|endoftext|>", "Ahoy<|end|>"),
    "phi_4": ("<|endoftext|>", "Ahoy<|im_end|>"),
    "zephyr": ("</s>", ""),
}
STYLES |= {
    f"chat_template: {name}": Style(templates.NAMED[name].text, (*templates.NAMED[name].tokens, eos), eos, trained)
    for name, (eos, trained) in ENDS.items()
}


def test_every_template_that_a_config_can_name_is_among_these() -> None:
    assert set(ENDS) == set(templates.NAMED)


def tokenizer_for(*specials: str, eos: str, template: str | None = None) -> Any:
    """One token a byte, and the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in specials])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, clean_up_tokenization_spaces=False)
    fast.chat_template = template
    return fast


def labeler_for(style: str, **options: Any) -> Labeler:
    chosen = STYLES[style]
    tokenizer = tokenizer_for(*chosen.specials, eos=chosen.eos)
    return Labeler(tokenizer, template=chosen.template, **options)


def turns(*texts: str, tools: tuple[Any, ...] = (), trained: tuple[int, ...] | None = None) -> Conversation:
    messages = tuple({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts))
    return Conversation(messages, "rows.jsonl:1", tools, trained)


def trained(labeler: Labeler, row: Row, **options: Any) -> list[str]:
    """The pieces that are trained on, as text."""
    return [text for text, on in coloured(labeler.label(row, **options), labeler.tokenizer) if on]


def answer(style: str, text: str = "Ahoy") -> str:
    chosen = STYLES[style]
    return (chosen.trained or "Ahoy" + chosen.eos).replace("Ahoy", text)


@pytest.mark.parametrize("style", sorted(STYLES))
def test_one_answer_and_its_end_are_trained_on_and_nothing_else(style: str) -> None:
    thought = "<think>\n\n</think>\n\n" if style == "thinking" else ""
    assert trained(labeler_for(style), turns("Hi", "Ahoy")) == [thought + answer(style)]


@pytest.mark.parametrize("style", sorted(set(STYLES) - {"alpaca", "thinking"}))
def test_every_answer_of_a_conversation_is_trained_on(style: str) -> None:
    row = turns("Hi", "Ahoy", "Who are you?", "A sailor.", "Bye", "Fair winds!")
    found = trained(labeler_for(style), row)
    assert found == [answer(style, text) for text in ("Ahoy", "A sailor.", "Fair winds!")]


@pytest.mark.parametrize("style", sorted(STYLES))
def test_the_prompt_that_serving_sends_is_a_prefix_of_what_is_trained(style: str) -> None:
    labeler = labeler_for(style)
    row = turns("Hi", "Ahoy", "Who?", "A sailor.")
    prompt = labeler.tokenizer(labeler.prompt(row.messages[:3]), add_special_tokens=False)["input_ids"]
    example = labeler.label(row)
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[len(prompt)] == example.input_ids[len(prompt)]
    assert example.labels[len(prompt) - 1] == IGNORED


@pytest.mark.parametrize("style", sorted(set(STYLES) - {"gemma"}))
def test_a_system_message_changes_nothing(style: str) -> None:
    system = {"role": "system", "content": "Be a sailor."}
    row = turns("Hi", "Ahoy")
    with_system = Conversation((system, *row.messages), row.where)
    labeler = labeler_for(style)
    assert trained(labeler, with_system) == trained(labeler, row)


@pytest.mark.parametrize("style", sorted(STYLES))
def test_texts_that_repeat_each_other_or_the_template_are_not_mixed_up(style: str) -> None:
    labeler = labeler_for(style)
    found = trained(labeler, turns("Ahoy", "Ahoy", "Ahoy", "Ahoy"))
    assert "".join(found).count("Ahoy") == 2
    assert len(found) == 2


def test_a_template_without_an_end_gets_the_tokenizers_after_the_last_turn() -> None:
    found = trained(labeler_for("alpaca"), turns("Hi", "Ahoy", "Bye", "Fair winds!"))
    assert found == ["Ahoy", "Fair winds!</s>"]


def test_thoughts_are_trained_on_where_the_template_keeps_them() -> None:
    labeler = labeler_for("thinking")
    row = turns("Hi", "<think>\nA guest.\n</think>\n\nAhoy", "Bye", "<think>\nThey leave.\n</think>\n\nFair winds!")
    first, last = trained(labeler, row)
    assert first == "Ahoy<|im_end|>"
    assert last == "<think>\nThey leave.\n</think>\n\nFair winds!<|im_end|>"


def test_the_models_own_end_token_counts_where_the_tokenizer_names_another() -> None:
    style = STYLES["phi"]
    template = style.template + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    tokenizer = tokenizer_for(*style.specials, eos=style.eos)
    ends = tokenizer.convert_tokens_to_ids(["<|end|>"])
    assert trained(Labeler(tokenizer, template=template, end_ids=ends), turns("Hi", "Ahoy")) == ["Ahoy<|end|>"]


CALL = {"type": "function", "function": {"name": "find_store", "arguments": {"city": "Rome", "open": True}}}
TOOLS = ({"type": "function", "function": {"name": "find_store", "parameters": {"type": "object"}}},)


def test_tool_calls_are_trained_on_up_to_the_end_of_the_turn() -> None:
    messages = (
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "Via Appia 1"},
        {"role": "assistant", "content": "Via Appia 1."},
    )
    found = trained(labeler_for("deepseek"), Conversation(messages, "rows.jsonl:1"))
    call = 'find_store\n{"city": "Rome", "open": true}'
    assert found == [f"<|calls|><|call|>{call}<|/call|><|/calls|><eos>", "Via Appia 1.<eos>"]


def test_a_template_that_moves_its_tools_is_followed() -> None:
    row = turns("Rome?", "Via Appia 1.", "And Ostia?", "No store.", tools=TOOLS)
    assert trained(labeler_for("mistral"), row) == ["Via Appia 1.</s>", "No store.</s>"]


def test_tools_and_calls_that_the_template_leaves_out_are_refused() -> None:
    labeler = labeler_for("chatml")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template does not write tools"):
        labeler.label(turns("Rome?", "Via Appia 1.", tools=TOOLS))
    messages = ({"role": "user", "content": "Rome?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template does not write tool calls"):
        labeler.label(Conversation(messages, "rows.jsonl:1"))


def test_what_a_template_refuses_is_named_with_its_row() -> None:
    row = Conversation(({"role": "system", "content": "x"}, *turns("Hi", "Ahoy").messages), "rows.jsonl:7")
    with pytest.raises(DataError, match=r"rows\.jsonl:7: the chat template refuses") as caught:
        labeler_for("gemma").label(row)
    assert "no system role" in caught.value.why


def test_an_assistant_may_speak_first() -> None:
    messages = ({"role": "assistant", "content": "Welcome."}, *turns("Hi", "Ahoy").messages)
    found = trained(labeler_for("chatml"), Conversation(messages, "rows.jsonl:1"))
    assert found == ["Welcome.<|im_end|>", "Ahoy<|im_end|>"]


def test_only_the_completion_of_a_conversation_can_be_trained_on() -> None:
    row = turns("Hi", "Ahoy", "Bye", "Fair winds!", trained=(3,))
    assert trained(labeler_for("chatml"), row) == ["Fair winds!<|im_end|>"]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ("turn", ["Ahoy<|im_end|>", "Fair winds!<|im_end|>"]),
        ("none", ["Ahoy", "Fair winds!"]),
        ("last", ["Ahoy", "Fair winds!<|im_end|>"]),
        ("all", ["<|im_end|>", "Ahoy<|im_end|>", "<|im_end|>", "Fair winds!<|im_end|>"]),
    ],
)
def test_train_on_eos_says_which_ends_are_trained_on(ends: Any, expected: list[str]) -> None:
    row = replace(turns("Hi", "Ahoy", "Bye", "Fair winds!"), ends=ends)
    assert trained(labeler_for("chatml"), row) == expected


@pytest.mark.parametrize("style", ["chatml", "llama-3", "gemma", "phi", "zephyr"])
def test_users_can_be_trained_on(style: str) -> None:
    row = turns("Hi", "Ahoy", "Bye", "Fair winds!", trained=(0, 2))
    assert trained(labeler_for(style), row) == [answer(style, "Hi"), answer(style, "Bye")]


def test_the_end_of_a_turn_can_be_named() -> None:
    style = STYLES["phi"]
    template = style.template + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    tokenizer = tokenizer_for(*style.specials, eos=style.eos)
    row = turns("Hi", "Ahoy")
    assert trained(Labeler(tokenizer, template=template, eot_tokens=("<|end|>",)), row) == ["Ahoy<|end|>"]
    assert Labeler(tokenizer, template=template).end_of_turn() == "<|endoftext|>"
    with pytest.raises(ConfigError, match=r"eot_tokens: the chat template ends a turn with <\|end\|>, not with"):
        Labeler(tokenizer, template=style.template, eot_tokens=("<|user|>",))


def test_a_system_message_for_those_without_moves_what_is_trained_on() -> None:
    row = turns("Hi", "Ahoy", "Bye", "Fair winds!", trained=(3,))
    given = with_system(row, "Be a sailor.")
    assert isinstance(given, Conversation)
    assert given.messages[0] == {"role": "system", "content": "Be a sailor."}
    assert trained(labeler_for("chatml"), given) == ["Fair winds!<|im_end|>"]
    assert with_system(given, "Be somebody else.") == given
    text = Text("2+2=", "4", "rows.jsonl:1")
    assert with_system(text, "Count.") == text


def test_segments_are_trained_on_as_they_say() -> None:
    row = Segments((("Q: 2+2 ", False), ("A: 4", True), (" bye", False)), "rows.jsonl:1")
    for options in ({}, {"train_on_inputs": True}):
        assert trained(labeler_for("chatml", **options), row) == ["A: 4"]


def test_token_ids_are_taken_as_they_are() -> None:
    labeler = labeler_for("chatml")
    example = labeler.label(Tokens((5, 6, 7), (IGNORED, 6, IGNORED), "rows.jsonl:1"))
    assert (example.input_ids, example.labels) == ([5, 6], [IGNORED, 6])
    with pytest.raises(DataError, match=r"rows\.jsonl:3: input_ids holds 100000"):
        labeler.label(Tokens((5, 100_000), (5, 100_000), "rows.jsonl:3"))


def test_running_text_becomes_several_rows_and_loses_nothing() -> None:
    labeler = labeler_for("zephyr")
    row = Text("", "one two three four five six seven eight nine ten", "rows.jsonl:1", splits=True)
    whole = labeler.label(row)
    parts = list(labeler.examples([row], max_length=10))
    assert len(parts) > 1
    assert [i for part in parts for i in part.input_ids] == whole.input_ids
    assert all(len(part.input_ids) <= 10 and not part.truncated for part in parts)
    assert parts[-1].labels[-1] == labeler.tokenizer.eos_token_id
    assert list(labeler.examples([row], max_length=1000)) == [whole]


def test_train_on_inputs_trains_on_all() -> None:
    example = labeler_for("chatml", train_on_inputs=True).label(turns("Hi", "Ahoy"))
    assert example.labels == example.input_ids


def test_nothing_is_kept_after_the_last_trained_token() -> None:
    labeler = labeler_for("chatml")
    example = labeler.label(turns("Hi", "Ahoy", "Bye"))
    assert example.labels[-1] != IGNORED
    assert labeler.tokenizer.decode(example.input_ids).endswith("Ahoy<|im_end|>")


def test_long_rows_are_cut_and_say_so() -> None:
    labeler = labeler_for("chatml")
    whole, cut = labeler.label(turns("Hi", "Ahoy")), labeler.label(turns("Hi", "Ahoy"), max_length=10)
    assert not whole.truncated
    assert (cut.truncated, cut.input_ids, cut.length) == (True, whole.input_ids[:10], len(whole.input_ids))
    assert len(cut.labels) == 10


def test_text_trains_on_the_completion_and_the_end() -> None:
    labeler = labeler_for("zephyr")
    assert trained(labeler, Text("2+2=", "4", "rows.jsonl:1")) == ["4</s>"]
    assert trained(labeler, Text("2+2=", "4</s>", "rows.jsonl:1")) == ["4</s>"]


def test_blanks_at_a_boundary_belong_to_the_answer() -> None:
    assert trained(labeler_for("chatml"), turns("Hi", "  Ahoy  ")) == ["  Ahoy  <|im_end|>"]


def test_other_scripts_are_trained_on_whole() -> None:
    assert trained(labeler_for("chatml"), turns("Привет", "Ура 🎉!")) == ["Ура 🎉!<|im_end|>"]


def test_chat_without_a_template_is_refused() -> None:
    labeler = Labeler(tokenizer_for("</s>", eos="</s>"), template=None)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: chat data needs a chat template"):
        labeler.label(turns("Hi", "Ahoy"))


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match="no character offsets"):
        Labeler(Slow(), template="x")
