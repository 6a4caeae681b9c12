"""What ends a conversation for NeMo RL ends it in a migrated run, so that the model learns to stop."""

from copy import deepcopy
from functools import cache
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_rl.config.nemo.translate import translate
from nemo_rl.config.schema.sft import SFTConfig
from nemo_rl.config.sources import Tree
from nemo_rl.data.chat import encode_conversation, encode_prompt
from nemo_rl.data.types import Message
from nemo_rl.errors import ConfigError
from tiny_models import embedded_folder  # pyright: ignore[reportImplicitRelativeImport]

ASK: Message = {"role": "user", "content": "2 + 2?"}
SAY: Message = {"role": "assistant", "content": "4"}
CONTEXT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ ' Question: ' + message['content'] + ' Answer: ' }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}\n"
)
LINES = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = "{% for message in messages %}{% generation %}{{ message['content'] }}{% endgeneration %}{% endfor %}"


def migrated(template: str | None, algorithm: str = "sft", **data: bool) -> tuple[Any, tuple[str, ...]]:
    tree = Tree({"policy": {"tokenizer": {"chat_template": template}}, "data": {"add_system_prompt": False, **data}})
    notes = translate(tree, SFTConfig, algorithm)
    return tree.values["policy"]["tokenizer"].get("chat_template") if "policy" in tree.values else None, notes


@cache
def smollm() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_folder())


def tokenizer_with(template: str) -> PreTrainedTokenizerBase:
    tokenizer = deepcopy(smollm())
    tokenizer.chat_template = template
    tokenizer.bos_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
    return tokenizer


@pytest.mark.parametrize(
    ("template", "whole", "learnt"),
    [
        (CONTEXT, "<|endoftext|> Question: 2 + 2? Answer: 4<|im_end|>", "4<|im_end|>"),
        (LINES, "<|endoftext|>user: 2 + 2?\nassistant: 4<|im_end|>", "4<|im_end|>"),
        (CHATML, "<|endoftext|><|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>", "4<|im_end|>"),
        (None, "<|endoftext|>2 + 2?4<|im_end|>", "4<|im_end|>"),
    ],
)
def test_the_migrated_template_begins_and_ends_as_nemo_rl_does(template: str | None, whole: str, learnt: str) -> None:
    written, notes = migrated(template, add_bos=True, add_eos=True)
    assert [note.split(" ")[0] for note in notes] == ["data.add_system_prompt"]
    tokenizer = tokenizer_with(written)
    token_ids, loss_mask = encode_conversation(tokenizer, (ASK, SAY))
    assert tokenizer.decode(token_ids) == whole
    assert tokenizer.decode(token_ids[loss_mask]) == learnt
    assert not tokenizer.decode(encode_prompt(tokenizer, (ASK,))).endswith("4<|im_end|>")
    assert tokenizer.decode(encode_prompt(tokenizer, (ASK,))).count("<|im_end|>") == (template is CHATML)


def test_the_words_alone_and_chat_markers_hold_several_turns() -> None:
    for template in (None, CHATML):
        tokenizer = tokenizer_with(migrated(template)[0])
        token_ids, loss_mask = encode_conversation(tokenizer, (ASK, SAY, ASK, SAY))
        ends = 1 if template is None else 2
        assert tokenizer.decode(token_ids[loss_mask]).count("4") == 2
        assert tokenizer.decode(token_ids[loss_mask]).count("<|im_end|>") == ends


def test_false_adds_nothing() -> None:
    assert migrated(LINES, add_bos=False, add_eos=False)[0] == LINES
    plain = tokenizer_with(migrated(None, add_bos=False, add_eos=False)[0])
    assert plain.decode(encode_conversation(plain, (ASK, SAY))[0]) == "2 + 2?4"


def test_the_template_of_the_tokenizer_stays_and_a_note_says_so() -> None:
    template, notes = migrated("default", add_eos=True)
    assert template is None
    assert "data.add_eos" in notes[-1] and "the tokenizer's own chat template says" in notes[-1]


def test_a_marked_template_has_to_write_the_end_itself() -> None:
    with pytest.raises(ConfigError, match="write eos_token into it behind the words of the assistant"):
        migrated(MARKED)
    own = MARKED.replace("{% endgeneration", "{{ eos_token }}{% endgeneration")
    assert migrated(own)[0] == own


def test_problems_are_put_without_an_end() -> None:
    assert "eos_token" not in migrated(None, "grpo")[0]
