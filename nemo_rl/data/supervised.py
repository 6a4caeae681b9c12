"""From the data section of an algorithm that learns from given answers to what its loop draws from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, cast

from nemo_rl.config.schema.examples import ExampleDataConfig
from nemo_rl.data.datasets.registry import load_chats, load_pairs
from nemo_rl.data.datasets.streams import ItemStream, Source, held
from nemo_rl.data.examples import ChatEncoder
from nemo_rl.data.lengths import UNCACHED, LengthCache, LengthFilter
from nemo_rl.data.loader import Loader, one_pass
from nemo_rl.data.processors import read_prompt_format
from nemo_rl.data.scored import ScoreEncoder
from nemo_rl.data.types import Chat, ChatPair, Example, Preference
from nemo_rl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Supervision[Item, Ready]:
    """What a run learns from; `validation` is empty where there is none."""

    loader: Loader[Item, Ready]
    validation: tuple[Ready, ...]


def prepare_examples(
    data: ExampleDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    max_val_samples: int | None = None,
    lengths: LengthCache = UNCACHED,
) -> Supervision[Chat, Example]:
    """Build what supervised fine-tuning learns from; answers that are judged bad are left out.

    Args:
        data: the section of the configuration.
        tokenizer: whose chat template is applied.
        batch_size: conversations in one batch.
        max_length: the most tokens of a sequence where the section does not say.
        seed: decides the order and the records split off for validation.
        max_val_samples: the most conversations of a validation; None takes all.
        lengths: keeps the token counts of `too_long: filter`.

    Raises:
        DataError: the data are missing or malformed, or nothing is left for validation.
    """
    encoder = _encoder(data, tokenizer, max_length)
    sources = load_chats(data, seed=seed)
    return _prepare_chats(data, encoder, encoder.example, sources, batch_size, seed, max_val_samples, lengths)


def prepare_judged(
    data: ExampleDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    max_val_samples: int | None = None,
    lengths: LengthCache = UNCACHED,
) -> Supervision[Chat, Example]:
    """Build what KTO learns from, judged answers of which a batch has at least two; see above."""
    encoder = _encoder(data, tokenizer, max_length)
    sources = load_chats(data, seed=seed, judged=True)
    ready = _prepare_chats(data, encoder, encoder.judged, sources, batch_size, seed, max_val_samples, lengths)
    if len(ready.validation) == 1:
        raise DataError(
            "kto compares each prompt with another one's answer, and the validation set has a single record; give "
            "data.validation more, or raise dpo.max_val_samples"
        )
    return ready


def prepare_preferences(
    data: ExampleDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    max_val_samples: int | None = None,
    lengths: LengthCache = UNCACHED,
) -> Supervision[ChatPair, Preference]:
    """Build what preference training learns from: batches of `batch_size` pairs; see above."""
    encoder = _encoder(data, tokenizer, max_length)
    pairs = load_pairs(data, seed=seed)
    return _prepare_pairs(data, encoder, pairs, tokenizer, batch_size, seed, max_val_samples, lengths)


def prepare_scored(
    data: ExampleDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    max_val_samples: int | None = None,
    lengths: LengthCache = UNCACHED,
    margins_wanted: bool = False,
) -> Supervision[ChatPair, Preference]:
    """Build what reward models learn from: batches of `batch_size` pairs, each answer with its score to be; see above.

    The model takes the tokenizer's padding token for its own. With `margins_wanted` the pairs must state margins.
    """
    pad = cast("int | None", tokenizer.pad_token_id)
    encoder = ScoreEncoder(
        tokenizer,
        pad,
        max_length=data.max_input_seq_length or max_length,
        too_long=data.too_long,
        prompt_format=read_prompt_format(data.prompt, data.prompt_file, data.system_prompt_file),
    )
    pairs = load_pairs(data, seed=seed)
    if margins_wanted and not any(pair.margin for pair in one_pass(pairs[0], _as_it_is)):
        raise DataError(
            "rm.margin_scale asks for margins, and no pair of data.train states one; set it to 0, or margin_key in the "
            "format of the data"
        )
    return _prepare_pairs(data, encoder, pairs, tokenizer, batch_size, seed, max_val_samples, lengths)


def _prepare_chats(
    data: ExampleDataConfig,
    encoder: ChatEncoder,
    encode: Callable[[Chat], Example | None],
    sources: tuple[Source[Chat], Source[Chat] | None],
    batch_size: int,
    seed: int,
    max_val_samples: int | None,
    lengths: LengthCache,
) -> Supervision[Chat, Example]:
    train, validation = sources
    if data.too_long == "filter" and encoder.max_length is not None:
        shorter = LengthFilter(encoder.max_length, encoder.tokenizer, lengths, data.num_workers)
        train = shorter.fitting(held(train, "too_long=filter cannot measure"), encoder.example_length, encoder.about)
    loader = _loader(data, train, encode, batch_size=batch_size, seed=seed)
    return Supervision(loader, _encoded(validation, encode, max_val_samples))


def _prepare_pairs(
    data: ExampleDataConfig,
    encoder: ChatEncoder | ScoreEncoder,
    sources: tuple[Source[ChatPair], Source[ChatPair] | None],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    seed: int,
    max_val_samples: int | None,
    lengths: LengthCache,
) -> Supervision[ChatPair, Preference]:
    train, validation = sources
    if data.too_long == "filter" and encoder.max_length is not None:
        shorter = LengthFilter(encoder.max_length, tokenizer, lengths, data.num_workers)
        train = shorter.fitting(held(train, "too_long=filter cannot measure"), encoder.preference_length, encoder.about)
    loader = _loader(data, train, encoder.preference, batch_size=batch_size, seed=seed)
    return Supervision(loader, _encoded(validation, encoder.preference, max_val_samples))


def _as_it_is(pair: ChatPair) -> ChatPair:
    return pair


def _encoder(data: ExampleDataConfig, tokenizer: PreTrainedTokenizerBase, max_length: int) -> ChatEncoder:
    return ChatEncoder(
        tokenizer,
        roles=frozenset[str](data.roles),
        max_length=data.max_input_seq_length or max_length,
        too_long=data.too_long,
        prompt_format=read_prompt_format(data.prompt, data.prompt_file, data.system_prompt_file),
    )


def _loader[Item, Ready](
    data: ExampleDataConfig,
    dataset: Source[Item],
    encode: Callable[[Item], Ready | None],
    *,
    batch_size: int,
    seed: int,
) -> Loader[Item, Ready]:
    encode(next(dataset.once()) if isinstance(dataset, ItemStream) else dataset[0])  # fails now, if the template does
    return Loader(dataset, batch_size, encode, shuffle=data.shuffle, seed=seed, num_workers=data.num_workers)


def _encoded[Item, Ready](
    dataset: Source[Item] | None, encode: Callable[[Item], Ready | None], limit: int | None
) -> tuple[Ready, ...]:
    if dataset is None:
        return ()
    usable = tuple(islice(one_pass(dataset, encode), limit))
    if not usable:
        raise DataError("all records of the validation set are too long; raise data.max_input_seq_length")
    return usable
