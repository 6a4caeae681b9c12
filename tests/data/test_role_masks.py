"""Who said what, in the template styles of six model families, written as their makers write them."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_rl.data.chat import encode_conversation
from nemo_rl.data.types import Message
from nemo_rl.errors import DataError
from tiny_models import embedded_folder

QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}
    {%- else %}{{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}{%- endif %}
    {{- "\\n\\n# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}{{- "Today Date: 26 Jul 2024\\n\\n" }}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}{{- ' [INST] ' + message['content'] + ' [/INST]' }}{%- endif %}
    {%- else %}{{- ' ' + message['content'] + eos_token}}{%- endif %}
{%- endfor %}"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""

PHI3 = """\
{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}\
{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'user' %}\
{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'assistant' %}\
{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

# Shows reasoning in the last answer only, even where there is none, as Qwen3's does.
QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}{%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- content }}{%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# template, end of a turn, its special tokens, whether it takes a system message
STYLES = {
    "qwen": (QWEN, "<|im_end|>", (), True),
    "llama3": (LLAMA3, "<|eot_id|>", ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"), True),
    "mistral": (MISTRAL, "<|im_end|>", ("[INST]", "[/INST]"), True),
    "gemma": (GEMMA, "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>"), False),
    "phi3": (PHI3, "<|end|>", ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"), True),
    "zephyr": (ZEPHYR, "<|im_end|>", (), True),
}

CONVERSATION: tuple[Message, ...] = (
    {"role": "system", "content": "Count, and end with end."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "Two: naïve ✓, user end"},
    {"role": "user", "content": "And 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "4"},
    {"role": "assistant", "content": "And 2 + 2?\n\nsystem"},
)


@cache
def tokenizer_in(style: str) -> PreTrainedTokenizerBase:
    template, _, special, _ = STYLES[style]
    return with_template(template, special)


@cache
def smollm() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_folder())


def with_template(template: str, special: tuple[str, ...] = ()) -> PreTrainedTokenizerBase:
    tokenizer = deepcopy(smollm())
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


def marked(template: str) -> str:
    """The same template with generation markers around what the assistant says."""
    said = "message['content'] | trim + '<|eot_id|>'"
    assert said in template
    open_, close = "{%- if message.role == 'assistant' %}{%- generation %}", "{%- endgeneration %}{%- else %}"
    return template.replace(f"{{{{- {said} }}}}", f"{open_}{{{{- {said} }}}}{close}{{{{- {said} }}}}{{%- endif %}}")


def runs(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
    """The text of each run of marked tokens."""
    bounds = mask.int().diff(prepend=torch.zeros(1), append=torch.zeros(1)).nonzero()[:, 0].tolist()
    return [str(tokenizer.decode(ids[start:stop])) for start, stop in zip(bounds[::2], bounds[1::2], strict=True)]


@pytest.mark.parametrize("style", STYLES)
def test_the_marked_tokens_are_the_assistants_words_and_their_end(style: str) -> None:
    _, end, _, takes_system = STYLES[style]
    tokenizer, chat = tokenizer_in(style), CONVERSATION[not takes_system :]
    ids, mask = encode_conversation(tokenizer, chat)
    said = [message["content"] for message in chat if message["role"] == "assistant"]
    assert [run.lstrip(" ") for run in runs(tokenizer, ids, mask)] == [words + end for words in said]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(list(chat), tokenize=False)


@pytest.mark.parametrize("style", STYLES)
def test_the_words_of_other_roles_are_told_apart_too(style: str) -> None:
    _, end, _, takes_system = STYLES[style]
    tokenizer, chat = tokenizer_in(style), CONVERSATION[not takes_system :]
    ids, mask = encode_conversation(tokenizer, chat, roles={"user"})
    said = [message["content"] for message in chat if message["role"] == "user"]
    end = " [/INST]" if style == "mistral" else end
    assert [run.lstrip(" ") for run in runs(tokenizer, ids, mask)] == [words + end for words in said]


@pytest.mark.parametrize("style", STYLES)
def test_messages_that_are_given_are_never_marked(style: str) -> None:
    _, end, _, takes_system = STYLES[style]
    tokenizer, chat = tokenizer_in(style), CONVERSATION[not takes_system :]
    ids, mask = encode_conversation(tokenizer, chat, num_given=len(chat) - 1)
    assert [run.lstrip(" ") for run in runs(tokenizer, ids, mask)] == [chat[-1]["content"] + end]


@pytest.mark.parametrize("num_given", [0, 3, 6])
def test_generation_markers_and_placeholders_agree(num_given: int) -> None:
    plain = tokenizer_in("llama3")
    with_markers = with_template(marked(LLAMA3), STYLES["llama3"][2])
    ids, mask = encode_conversation(plain, CONVERSATION, num_given=num_given)
    marked_ids, marked_mask = encode_conversation(with_markers, CONVERSATION, num_given=num_given)
    assert mask.any()
    assert torch.equal(ids, marked_ids)
    assert torch.equal(mask, marked_mask)


def test_a_tool_call_is_what_the_assistant_said_and_tools_are_nobodys_words() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "integer"}}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    chat: list[Message] = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    ]
    tokenizer = tokenizer_in("qwen")
    ids, mask = encode_conversation(tokenizer, chat, tools=tools)
    text = tokenizer.decode(ids)
    assert '"name": "add", "parameters"' in text
    assert "<tool_response>\n2\n</tool_response>" in text
    assert runs(tokenizer, ids, mask) == [
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
        "Two.<|im_end|>",
    ]


def test_reasoning_that_only_the_last_answer_keeps_is_the_assistants() -> None:
    tokenizer = with_template(QWEN3)
    ids, mask = encode_conversation(tokenizer, CONVERSATION)
    assert [run.partition("<|im_end|>")[0] for run in runs(tokenizer, ids, mask)] == [
        "Two: naïve ✓, user end",
        "4",
        "And 2 + 2?\n\nsystem",
    ]
    reasoned: Message = {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nFour."}
    ids, mask = encode_conversation(tokenizer, (*CONVERSATION[:4], reasoned))
    assert runs(tokenizer, ids, mask) == [
        "Two: naïve ✓, user end<|im_end|>",
        "<think>\nEasy.\n</think>\n\nFour.<|im_end|>",
    ]
    with pytest.raises(DataError, match=r"message 4 \(assistant\) differently.*a record of its own"):
        encode_conversation(tokenizer, (*CONVERSATION[:4], reasoned, *CONVERSATION[5:]))


def test_a_template_that_does_not_say_who_speaks_is_refused() -> None:
    tokenizer = with_template("{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}")
    with pytest.raises(DataError, match=r"message 2 \(assistant\) without any marker of who speaks"):
        encode_conversation(tokenizer, CONVERSATION)
    silent = with_template("{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}")
    with pytest.raises(DataError, match=r"message 2 \(assistant\) differently"):
        encode_conversation(silent, CONVERSATION)


def test_a_conversation_that_the_template_refuses_is_one_sentence() -> None:
    with pytest.raises(DataError, match=r"cannot write a conversation of system, user.*System role not supported"):
        encode_conversation(tokenizer_in("gemma"), CONVERSATION)
    with pytest.raises(DataError, match=r"of user, user.*must alternate"):
        encode_conversation(tokenizer_in("mistral"), [CONVERSATION[1], CONVERSATION[3]])
