import pickle
from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.examples import ChatEncoder, mismatched
from nemo_rl.data.packing import build_stream
from nemo_rl.data.types import Chat, ChatPair, Example, Message, Preference
from nemo_rl.errors import DataError
from nemo_rl.objectives.preference import pair_indices
from tiny_models import embedded_folder

PROMPT: tuple[Message, ...] = (
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Red."},
    {"role": "user", "content": "Another one."},
)
GOOD: Message = {"role": "assistant", "content": "Blue."}
BAD: Message = {"role": "assistant", "content": "Blue, or maybe a horse."}
PAIR = ChatPair(PROMPT, (GOOD,), (BAD,), margin=2.0, index=5)


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_folder())


def words(example: Example) -> str:
    return str(tokenizer().decode(example.token_ids[example.loss_mask]))


def example(chat: Chat, **settings: object) -> Example:
    made = ChatEncoder(tokenizer(), **settings).example(chat)
    assert made is not None
    return made


def preference(pair: ChatPair) -> Preference:
    made = ChatEncoder(tokenizer()).preference(pair)
    assert made is not None
    return made


def test_every_answer_of_a_conversation_is_learnt_and_of_a_judged_one_the_last() -> None:
    chat = Chat((*PROMPT, GOOD), index=3)
    assert words(example(chat)) == "Red.<|im_end|>Blue.<|im_end|>"
    assert example(chat).index == 3
    judged = example(replace(chat, desirable=False))
    assert words(judged) == "Blue.<|im_end|>"
    assert judged.desirable is False


def test_roles_are_chosen_and_the_first_token_is_never_learnt() -> None:
    everyone = example(Chat((*PROMPT, GOOD)), roles=frozenset({"user", "assistant"}))
    assert words(everyone) == "Name a colour.<|im_end|>Red.<|im_end|>Another one.<|im_end|>Blue.<|im_end|>"
    bare = ChatEncoder(
        with_template("{% for message in messages %}{{ message.content + '|' }}{% endfor %}"), frozenset({"user"})
    )
    made = bare.example(Chat((PROMPT[0], GOOD)))
    assert made is not None
    assert not made.loss_mask[0]
    assert words(made) == " a colour.|"


def with_template(template: str) -> PreTrainedTokenizerBase:
    changed = AutoTokenizer.from_pretrained(embedded_folder())
    changed.chat_template = template
    return changed


def test_a_pair_shares_its_prompt_and_only_the_two_answers_are_learnt() -> None:
    pair = preference(PAIR)
    assert (words(pair.chosen), words(pair.rejected)) == ("Blue.<|im_end|>", "Blue, or maybe a horse.<|im_end|>")
    assert (pair.margin, pair.index) == (2.0, 5)
    batch = TokenBatch.from_preferences([pair, pair])
    assert batch.group_ids.tolist() == [0, 0, 1, 1]
    assert batch.sequence_columns["chosen"].tolist() == [True, False, True, False]
    assert batch.sequence_columns["margins"].tolist() == [2.0, 2.0, 2.0, 2.0]
    chosen, rejected = pair_indices(batch)
    assert (chosen.tolist(), rejected.tolist()) == ([0, 2], [1, 3])
    one = TokenBatch.from_preferences([pair])
    prompt = int(pair.chosen.loss_mask.int().argmax())
    stream = build_stream(one)
    # Both answers begin with "Blue"; neither's last token enters, and what follows the end marker does not either.
    assert len(stream.input_ids) == prompt + 1 + int(one.token_columns["loss_mask"].sum()) - 2 - 2
    assert len(stream.target) == int(one.token_columns["loss_mask"].sum())


def test_examples_side_by_side_are_judged_all_or_none() -> None:
    plain = example(Chat((*PROMPT, GOOD)))
    batch = TokenBatch.from_examples([plain, plain])
    assert batch.group_ids.tolist() == [0, 1]
    assert batch.sequence_columns == {}
    assert torch.equal(batch.token_columns["loss_mask"], plain.loss_mask.repeat(2))
    judged = TokenBatch.from_examples([replace(plain, desirable=True), replace(plain, desirable=False)])
    assert judged.sequence_columns["chosen"].tolist() == [True, False]
    with pytest.raises(DataError, match="only 1 of 2 examples are judged"):
        TokenBatch.from_examples([plain, replace(plain, desirable=False)])
    with pytest.raises(DataError, match="at least one example"):
        TokenBatch.from_examples([])
    with pytest.raises(DataError, match=r"example 0 has .* and 2 loss_mask values"):
        TokenBatch.from_examples([replace(plain, loss_mask=plain.loss_mask[:2])])


def test_mismatched_prompts_get_the_next_answer() -> None:
    chats = [Chat(({"role": "user", "content": ask}, {"role": "assistant", "content": say})) for ask, say in
             [("One?", "Uno."), ("And then, after that one?", "Dos, and more."), ("Three?", "Tres.")]]  # fmt: skip
    examples = [replace(example(chat), desirable=True) for chat in chats]
    crossed = mismatched(examples, 999)
    longest = max(len(item.token_ids) for item in crossed) - 1
    assert [words(item) for item in crossed] == ["Dos, and more.<|im_end|>", "Tres.<|im_end|>", "Uno.<|im_end|>"]
    assert ["One?" in tokenizer().decode(item.token_ids) for item in crossed] == [True, False, False]
    assert all(len(item.token_ids) == len(item.loss_mask) for item in crossed)
    for item, cut in zip(crossed, mismatched(examples, longest), strict=True):  # no longer than any record may be
        assert len(cut.token_ids) == len(cut.loss_mask) == min(longest, len(item.token_ids))
        assert torch.equal(cut.token_ids, item.token_ids[:longest]) and cut.loss_mask.any()
    with pytest.raises(DataError, match="at least 2 examples"):
        mismatched(examples[:1], longest)


def test_long_records_are_an_error_or_skipped() -> None:
    chat = Chat((*PROMPT, GOOD), index=9)
    length = len(example(chat).token_ids)
    assert ChatEncoder(tokenizer(), max_length=length).example(chat) is not None
    with pytest.raises(DataError, match=rf"record 9 has {length} tokens and the limit is {length - 1}.*too_long=skip"):
        ChatEncoder(tokenizer(), max_length=length - 1).example(chat)
    skipping = ChatEncoder(tokenizer(), max_length=length, too_long="skip")
    assert skipping.example(replace(chat, messages=(*PROMPT, BAD))) is None
    assert skipping.preference(PAIR) is None, "the rejected answer alone is too long"


def test_a_record_with_nothing_to_learn_is_named() -> None:
    with pytest.raises(DataError, match="record 4 has no words of assistant to learn"):
        ChatEncoder(tokenizer()).example(Chat(PROMPT[:1], index=4))
    empty: Message = {"role": "assistant", "content": " \n"}
    with pytest.raises(DataError, match="record 4 has an empty assistant message"):
        ChatEncoder(tokenizer()).example(Chat((PROMPT[0], empty), index=4))
    with pytest.raises(DataError, match="record 5 has an empty assistant message"):
        ChatEncoder(tokenizer()).preference(replace(PAIR, rejected=(empty,)))
    with pytest.raises(DataError, match="record 5 has two answers that are the same tokens"):
        ChatEncoder(tokenizer()).preference(replace(PAIR, rejected=PAIR.chosen))
    unmarked = ChatEncoder(with_template("{% for message in messages %}{{ message.content }}{% endfor %}"))
    with pytest.raises(DataError, match=r"record 4: the chat template writes message 1 .* any marker of who speaks"):
        unmarked.example(Chat((*PROMPT, GOOD), index=4))


def test_an_encoder_pickles_for_loader_processes() -> None:
    encoder = pickle.loads(pickle.dumps(ChatEncoder(tokenizer(), max_length=64)))
    assert torch.equal(encoder.example(Chat((*PROMPT, GOOD))).token_ids, example(Chat((*PROMPT, GOOD))).token_ids)
