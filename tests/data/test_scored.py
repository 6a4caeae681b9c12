"""Conversations for a reward model: where the score is read, and what cannot be scored."""

from functools import cache

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.packing import build_stream
from nemo_rl.data.scored import ScoreEncoder
from nemo_rl.data.types import ChatPair, Message, Preference
from nemo_rl.errors import DataError
from tiny_models import embedded_folder

PROMPT: tuple[Message, ...] = (Message(role="user", content="Name a colour."),)
GOOD, BAD = (Message(role="assistant", content=words) for words in ("Blue.", "Blue, or maybe a horse."))
PAIR = ChatPair(PROMPT, (GOOD,), (BAD,), margin=2.0, index=5)
PASS_THROUGH = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
ENDS_WITH_PADDING = PASS_THROUGH + "{{ eos_token }}{{ eos_token }}"


@cache
def tokenizer(template: str | None = None) -> PreTrainedTokenizerBase:
    loaded = AutoTokenizer.from_pretrained(embedded_folder())
    loaded.chat_template = template or loaded.chat_template
    return loaded


def encoder(template: str | None = None, **settings: object) -> ScoreEncoder:
    return ScoreEncoder(tokenizer(template), tokenizer().pad_token_id, **settings)


def test_one_placeholder_behind_the_whole_conversation_carries_the_score() -> None:
    example = encoder().encode((*PROMPT, GOOD))
    rendered = tokenizer().apply_chat_template([*PROMPT, GOOD], tokenize=False)
    assert tokenizer().decode(example.token_ids[:-1]) == rendered
    assert example.loss_mask.nonzero()[:, 0].tolist() == [len(example.token_ids) - 1]


def test_padding_at_the_end_is_cut_because_classifiers_read_before_it() -> None:
    example = encoder(ENDS_WITH_PADDING).encode((*PROMPT, GOOD))
    assert tokenizer().decode(example.token_ids[:-1]) == "Name a colour.Blue."
    whole = ScoreEncoder(tokenizer(ENDS_WITH_PADDING), None).encode((*PROMPT, GOOD))
    assert tokenizer().decode(whole.token_ids[:-1]) == "Name a colour.Blue.<|im_end|><|im_end|>"


def test_a_template_that_tells_no_roles_apart_will_do_and_the_prompt_is_shared() -> None:
    pair = encoder(PASS_THROUGH).preference(PAIR)
    assert isinstance(pair, Preference) and (pair.margin, pair.index) == (2.0, 5)
    stream = build_stream(TokenBatch.from_preferences([pair]), min_shared=1)
    shared = tokenizer()("Name a colour.Blue", add_special_tokens=False)["input_ids"]
    lengths = [len(example.token_ids) - 1 for example in (pair.chosen, pair.rejected)]
    assert len(stream.input_ids) == sum(lengths) - len(shared)
    assert len(stream.predictor) == 2


@pytest.mark.parametrize(
    ("pair", "template", "message"),
    [
        (ChatPair(PROMPT, (Message(role="assistant", content=" "),), (BAD,), index=5), None, "empty assistant message"),
        (ChatPair(PROMPT, (GOOD,), (GOOD,), index=5), None, "two answers that are the same tokens"),
        (PAIR, "{{ eos_token }}", "record 5: the chat template writes nothing"),
        (PAIR, "{{ raise_exception('no') }}", "record 5: the chat template cannot write"),
    ],
)
def test_what_cannot_be_compared_is_named(pair: ChatPair, template: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encoder(template).preference(pair)


def test_the_limit_counts_the_conversation_alone() -> None:
    length = max(len(encoder().encode((*PROMPT, answer)).token_ids) - 1 for answer in (GOOD, BAD))
    assert encoder(max_length=length).preference(PAIR) is not None
    assert encoder(max_length=length - 1, too_long="skip").preference(PAIR) is None
    with pytest.raises(DataError, match=f"record 5 has {length} tokens and the limit is {length - 1}"):
        encoder(max_length=length - 1).preference(PAIR)


def test_a_batch_of_pairs_keeps_its_margins() -> None:
    pair = encoder().preference(PAIR)
    assert pair is not None
    batch = TokenBatch.from_preferences([pair])
    assert torch.equal(batch.sequence_columns["margins"], torch.tensor([2.0, 2.0]))
