"""Chat templates by Axolotl's names, each written here after the format that its models publish.

A template that is named in a config travels with the adapter, and serving renders with it. Names whose models carry
the template in their own tokenizer are taken for that one (`OWN`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT, JINJA = "tokenizer_default", "jinja"
FALLBACK = "tokenizer_default_fallback_"  # the tokenizer's own where it has one, else the named


@dataclass(frozen=True)
class Template:
    """``tokens``: what the base's vocabulary must have, or the format would fall apart into pieces of words."""

    text: str
    tokens: tuple[str, ...]


def _turns(*, before: str = "", turn: str, prompt: str) -> str:
    """A template that writes every message alike."""
    return (
        f"{before}{{% for message in messages %}}{turn}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


def _instructions(user: str, answer: str, *, before: str = "") -> str:
    """A template without a system turn: the system message stands before the first user's text, in its turn."""
    return (
        "{% if messages and messages[0]['role'] == 'system' %}"
        "{% set system, rest = messages[0]['content'] + '\n\n', messages[1:] %}"
        "{% else %}{% set system, rest = '', messages %}{% endif %}"
        + before
        + "{% for message in rest %}{% if message['role'] == 'user' %}"
        "{% set text = (system if loop.first else '') + message['content'] %}"
        + user
        + "{% elif message['role'] == 'assistant' %}"
        + answer
        + "{% else %}{{ raise_exception('the template has no role ' + message['role']) }}{% endif %}{% endfor %}"
    )


_COHERE = (
    "<BOS_TOKEN>{% for message in messages %}<|START_OF_TURN_TOKEN|>"
    "{% if message['role'] == 'system' %}<|SYSTEM_TOKEN|>{% elif message['role'] == 'assistant' %}<|CHATBOT_TOKEN|>"
    "{% elif message['role'] == 'user' %}<|USER_TOKEN|>"
    "{% else %}{{ raise_exception('the template has no role ' + message['role']) }}{% endif %}"
    "{{ message['content'] | trim }}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
_GEMMA = (
    _instructions(
        "<start_of_turn>user\n{{ text | trim }}<end_of_turn>\n",
        "<start_of_turn>model\n{{ message['content'] | trim }}<end_of_turn>\n",
        before="<bos>",
    )
    + "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
_COHERE_TOKENS = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")

CHATML = _turns(
    turn="{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}",
    prompt="{{ '<|im_start|>assistant\n' }}",
)
_LLAMA3 = _turns(
    before="<|begin_of_text|>",
    turn="<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>",
    prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
)
_PHI = _turns(turn="<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n", prompt="<|assistant|>\n")
_GRANITE = _turns(
    turn="<|start_of_role|>{{ message['role'] }}<|end_of_role|>{{ message['content'] }}<|end_of_text|>\n",
    prompt="<|start_of_role|>assistant<|end_of_role|>",
)

NAMED: Mapping[str, Template] = {
    "chatml": Template(CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama3": Template(_LLAMA3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral_v1": Template(
        _instructions("[INST] {{ text }} [/INST]", " {{ message['content'] | trim }}</s>", before="<s>"),
        ("<s>", "</s>"),
    ),
    "mistral_v2v3": Template(
        _instructions("[INST] {{ text }}[/INST]", " {{ message['content'] | trim }}</s>", before="<s>"),
        ("<s>", "</s>", "[INST]", "[/INST]"),
    ),
    "mistral_v3_tekken": Template(
        _instructions("[INST]{{ text }}[/INST]", "{{ message['content'] }}</s>", before="<s>"),
        ("<s>", "</s>", "[INST]", "[/INST]"),
    ),
    "gemma": Template(_GEMMA, ("<bos>", "<start_of_turn>", "<end_of_turn>")),
    "gemma3": Template(_GEMMA, ("<bos>", "<start_of_turn>", "<end_of_turn>")),
    "cohere": Template(_COHERE, _COHERE_TOKENS),
    "aya": Template(_COHERE, _COHERE_TOKENS),
    "phi_3": Template(_PHI, ("<|user|>", "<|assistant|>", "<|end|>")),
    "phi_35": Template(_PHI, ("<|user|>", "<|assistant|>", "<|end|>")),
    "phi_4": Template(
        _turns(
            turn="<|im_start|>{{ message['role'] }}<|im_sep|>{{ message['content'] }}<|im_end|>",
            prompt="<|im_start|>assistant<|im_sep|>",
        ),
        ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    ),
    "granite": Template(_GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")),
    "granitemoe": Template(_GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")),
    "deepseek_v2": Template(
        _DEEPSEEK[0]
        + _turns(
            turn="{% if message['role'] == 'user' %}User: {{ message['content'] }}\n\n"
            "{% elif message['role'] == 'assistant' %}Assistant: {{ message['content'] }}" + _DEEPSEEK[1] + "{% else %}"
            "{{ message['content'] }}\n\n{% endif %}",
            prompt="Assistant:",
        ),
        _DEEPSEEK,
    ),
    "deepseek_v3": Template(
        _DEEPSEEK[0]
        + _turns(
            turn="{% if message['role'] == 'user' %}<｜User｜>{{ message['content'] }}"
            "{% elif message['role'] == 'assistant' %}<｜Assistant｜>{{ message['content'] }}"
            + _DEEPSEEK[1]
            + "{% else %}{{ message['content'] }}{% endif %}",
            prompt="<｜Assistant｜>",
        ),
        (*_DEEPSEEK, "<｜User｜>", "<｜Assistant｜>"),
    ),
    "alpaca": Template(
        _turns(
            turn="{% if message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
            "{% elif message['role'] == 'assistant' %}### Response:\n{{ message['content'] + eos_token }}\n\n"
            "{% else %}{{ message['content'] }}\n\n{% endif %}",
            prompt="### Response:\n",
        ),
        (),
    ),
    "zephyr": Template(
        _turns(turn="<|{{ message['role'] }}|>\n{{ message['content'] }}</s>\n", prompt="<|assistant|>\n"), ("</s>",)
    ),
}
# Names of Axolotl's whose models carry the template, with tools and thoughts, in their own tokenizer.
OWN = (
    "command_a", "command_a_rag", "command_a_tool_use", "exaone", "exaone4", "falcon_h1", "gemma3n", "gemma4",
    "jamba", "llama3_2_vision", "llama4", "llava", "metharme", "mistral_v7_tekken", "nemotron_h", "pixtral",
    "qwen_25", "qwen2_vl", "qwen3", "qwen3_5",
)  # fmt: skip


def known(name: str) -> bool:
    """Whether a config may name it so."""
    return name in (DEFAULT, JINJA, *NAMED, *OWN) or name.removeprefix(FALLBACK) in (*NAMED, *OWN)
