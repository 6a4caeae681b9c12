"""How the records of a data set are laid out: recognised by their fields, or said by a format."""

from nemo_rl.config.schema.formats import (
    ChoiceFormat,
    CompletionFormat,
    JudgedFormat,
    MessagesFormat,
    PairFormat,
    RankingFormat,
)
from nemo_rl.data.datasets.chats import ChatReader
from nemo_rl.data.datasets.preference import PairReader
from nemo_rl.data.datasets.record_streams import RecordStream
from nemo_rl.data.datasets.records import Record, Table, check_not_empty
from nemo_rl.errors import DataError

type AnyFormat = MessagesFormat | CompletionFormat | JudgedFormat | PairFormat | ChoiceFormat | RankingFormat

CHAT_LAYOUTS: tuple[tuple[tuple[str, ...], ChatReader], ...] = (
    (("messages",), ChatReader(MessagesFormat())),
    (
        ("conversations",),
        ChatReader(MessagesFormat(messages_key="conversations", role_key="from", content_key="value")),
    ),
    (("prompt", "completion", "label"), ChatReader(JudgedFormat())),
    (("prompt", "completion"), ChatReader(CompletionFormat())),
    (
        ("instruction", "output"),
        ChatReader(CompletionFormat(prompt_key="instruction", completion_key="output", context_key="input")),
    ),
    (("input", "output"), ChatReader(CompletionFormat(prompt_key="input", completion_key="output"))),
)
"""Fields by which the layout of conversations is recognised; the first that a record has all of."""

PAIR_LAYOUTS: tuple[tuple[tuple[str, ...], PairReader], ...] = (
    (("prompt", "chosen", "rejected"), PairReader(PairFormat())),
    (("chosen", "rejected"), PairReader(PairFormat(prompt_key=None))),
    (("context", "response1", "response2", "overall_preference"), PairReader(ChoiceFormat())),
    (("context", "completions"), PairReader(RankingFormat())),
)
"""Fields by which the layout of pairs is recognised."""


def chat_reader(opened: Table | RecordStream, fields: AnyFormat | None) -> ChatReader:
    """Find out how conversations are read; None for `fields` recognises the layout.

    Raises:
        DataError: the format is one of pairs, or the layout is none of the usual ones.
    """
    match fields:
        case None:
            return _recognised(opened, CHAT_LAYOUTS)
        case MessagesFormat() | CompletionFormat() | JudgedFormat():
            return ChatReader(fields)
        case _:
            raise DataError(
                f"the data set {opened.source} has format {fields.type}, which holds pairs of answers, and "
                "conversations are needed; choose messages, completion or judged"
            )


def pair_reader(opened: Table | RecordStream, fields: AnyFormat | None) -> PairReader:
    """Find out how pairs are read; see `chat_reader`."""
    match fields:
        case None:
            return _recognised(opened, PAIR_LAYOUTS)
        case PairFormat() | ChoiceFormat() | RankingFormat():
            return PairReader(fields)
        case _:
            raise DataError(
                f"the data set {opened.source} has format {fields.type}, which holds conversations, and pairs of "
                "answers are needed; choose pair, choice or ranking"
            )


def _recognised[Reader](opened: Table | RecordStream, layouts: tuple[tuple[tuple[str, ...], Reader], ...]) -> Reader:
    """Find the layout by the names of the first record's fields."""
    where, record = _first(opened)
    for keys, reader in layouts:
        if all(key in record for key in keys):
            return reader
    known = "; ".join(", ".join(keys) for keys, _ in layouts)
    raise DataError(
        f"{where} has the fields {sorted(record)}, and none of the usual sets is among them ({known}); set "
        "format to say which field holds what"
    )


def _first(opened: Table | RecordStream) -> tuple[str, Record]:
    """Name and content of the first record."""
    if isinstance(opened, Table):
        check_not_empty(len(opened.records), opened.source)
        return opened.where(0), opened.records[0]
    found = next(opened.open(), None)
    check_not_empty(0 if found is None else 1, opened.source)
    assert found is not None
    return found
