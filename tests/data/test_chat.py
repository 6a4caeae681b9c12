from functools import cache

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_rl.data.chat import PromptFormat, encode_conversation, encode_prompt
from nemo_rl.data.processors import TaskProcessor
from nemo_rl.data.types import Message, Task
from nemo_rl.errors import DataError
from tiny_models import embedded_folder

CONVERSATION: tuple[Message, ...] = (
    {"role": "system", "content": "Count."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": " Two: naïve ✓"},
    {"role": "user", "content": "And 2 + 2?"},
    {"role": "assistant", "content": "4"},
)

MARKED_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Shows only the last answer in full, as templates do that drop earlier reasoning.
FORGETFUL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] if loop.last or message['role'] != 'assistant' else '...' }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def smollm() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_folder())


def with_template(template: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    tokenizer.chat_template = template
    return tokenizer


def test_a_prompt_ends_where_the_policy_speaks() -> None:
    ids = encode_prompt(smollm(), CONVERSATION[:2])
    assert ids.dtype == torch.int64
    assert smollm().decode(ids) == (
        "<|im_start|>system\nCount.<|im_end|>\n<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_mask_covers_each_answer_with_its_end_token_and_nothing_else() -> None:
    ids, mask = encode_conversation(smollm(), CONVERSATION)
    assert ids.tolist() == smollm().apply_chat_template(list(CONVERSATION), tokenize=True)["input_ids"]
    assert smollm().decode(ids[mask]) == " Two: naïve ✓<|im_end|>4<|im_end|>"
    assert not mask[-1], "the newline after the last end token is never sampled"
    # Training sees the tokens that sampling would see: the prompt is a prefix of the conversation.
    prompt = encode_prompt(smollm(), CONVERSATION[:4])
    assert torch.equal(ids[: len(prompt)], prompt)
    assert not mask[len(prompt) - 1]
    assert mask[len(prompt)]


def test_templates_with_generation_markers_give_the_same_mask_as_the_prefix_difference() -> None:
    ids, mask = encode_conversation(with_template(MARKED_TEMPLATE), CONVERSATION)
    plain_ids, plain_mask = encode_conversation(smollm(), CONVERSATION)
    assert torch.equal(ids, plain_ids)
    assert torch.equal(mask, plain_mask)


def test_any_role_can_be_marked_and_a_default_system_prompt_belongs_to_nobody() -> None:
    ids, mask = encode_conversation(smollm(), CONVERSATION[1:], roles={"user"})
    assert "helpful" in smollm().decode(ids)
    assert smollm().decode(ids[mask]) == "What is 1 + 1?<|im_end|>And 2 + 2?<|im_end|>"
    _, all_roles = encode_conversation(smollm(), CONVERSATION, roles={"user", "assistant", "system"})
    assert all_roles.sum() > mask.sum()


def test_a_template_that_rewrites_history_is_refused_instead_of_masked_wrongly() -> None:
    tokenizer = with_template(FORGETFUL_TEMPLATE)
    with pytest.raises(DataError, match=r"message 2 \(assistant\) differently.*generation"):
        encode_conversation(tokenizer, CONVERSATION)
    ids, mask = encode_conversation(tokenizer, CONVERSATION[:3])
    assert tokenizer.decode(ids[mask]) == " Two: naïve ✓<|im_end|>"


def test_a_tokenizer_without_template_says_which_setting_gives_it_one() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"policy\.tokenizer\.chat_template"):
        encode_prompt(tokenizer, CONVERSATION[:2])


def test_a_prompt_format_wraps_the_problem_and_leaves_other_braces_alone() -> None:
    examples: tuple[Message, ...] = ({"role": "user", "content": "0 + 1"}, {"role": "assistant", "content": "1"})
    prompt_format = PromptFormat(r"Put {} in \boxed{x}.", system_prompt="Be brief.", examples=examples)
    assert prompt_format.apply([{"role": "user", "content": r"$\frac{1}{2}$"}]) == (
        {"role": "system", "content": "Be brief."},
        *examples,
        {"role": "user", "content": r"Put $\frac{1}{2}$ in \boxed{x}."},
    )
    own_system = PromptFormat(examples=examples).apply(CONVERSATION[:2])
    assert [message["role"] for message in own_system] == ["system", "user", "assistant", "user"]
    with pytest.raises(DataError, match="system message"):
        prompt_format.apply(CONVERSATION[:2])
    with pytest.raises(DataError, match="0 places"):
        PromptFormat("no place")


def test_a_processor_adds_tokens_and_holds_prompts_to_the_limit() -> None:
    task = Task(({"role": "user", "content": "What is 1 + 1?"},), "math", {"ground_truth": "2"}, index=17)
    processed = TaskProcessor(smollm(), PromptFormat("{} Answer:"))(task)
    assert processed is not None
    assert processed.token_ids is not None
    assert "What is 1 + 1? Answer:" in smollm().decode(processed.token_ids)
    assert (processed.index, processed.extra, processed.environment) == (17, {"ground_truth": "2"}, "math")
    length = len(processed.token_ids)
    assert TaskProcessor(smollm(), PromptFormat("{} Answer:"), max_input_length=length)(task) is not None
    short = TaskProcessor(smollm(), PromptFormat("{} Answer:"), max_input_length=length - 1)
    with pytest.raises(DataError, match=rf"task 17 has {length} tokens.*max_input_seq_length is {length - 1}"):
        short(task)
    assert TaskProcessor(smollm(), max_input_length=5, too_long="skip")(task) is None


def test_the_braces_of_a_latex_command_are_no_place_for_the_problem() -> None:
    form = PromptFormat(prompt=r"{} Put the answer in \boxed{}.")
    assert form.apply([Message(role="user", content=r"\1?")])[-1]["content"] == r"\1? Put the answer in \boxed{}."


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("Put it in \\boxed{{}}:\n{}\n\nThink", "Put it in \\boxed{}:\n{Q}\n\nThink"),
        ("{{{}}}", "{{Q}}"),
        ("Question{} {{x}}", "Question{Q} {x}"),
        ("{} in \\boxed{...}, not x^{2} or \\text{}", "{Q} in \\boxed{...}, not x^{2} or \\text{}"),
        ("x^{n^{2}} {}", "x^{n^{2}} {Q}"),
    ],
)
def test_doubled_braces_are_those_of_a_format_string(template: str, said: str) -> None:
    question = Message(role="user", content="{Q}")
    assert PromptFormat(template).apply([question])[-1]["content"] == said


@pytest.mark.parametrize(("template", "places"), [("\\boxed{{}}", 0), ("\\boxed{} {{}} {}", 2), ("{} {}", 2)])
def test_a_template_of_either_form_has_one_place(template: str, places: int) -> None:
    with pytest.raises(DataError, match=f"has {places} places"):
        PromptFormat(template)
