"""From a data section of the configuration to data sets of problems, of conversations or of pairs."""

import logging
from collections.abc import Callable

from nemo_rl.config.schema.data import (
    ArithmeticDataConfig,
    BuiltinDataConfig,
    CustomDataConfig,
    DataSpec,
    HubDataConfig,
    LocalDataConfig,
    TaskMixtureConfig,
)
from nemo_rl.config.schema.examples import (
    ExampleDataConfig,
    ExampleMixtureConfig,
    ExampleSpec,
    HubExamplesConfig,
    LocalExamplesConfig,
)
from nemo_rl.config.schema.formats import (
    ChoiceFormat,
    CompletionFormat,
    JudgedFormat,
    MessagesFormat,
    PairFormat,
    RankingFormat,
)
from nemo_rl.data.datasets.arithmetic import ArithmeticDataset, unrepeatable_questions
from nemo_rl.data.datasets.arithmetic_answers import ArithmeticChats, ArithmeticPairs
from nemo_rl.data.datasets.builtin import BUILTIN, open_builtin
from nemo_rl.data.datasets.chats import ChatReader, threads
from nemo_rl.data.datasets.combine import mixture, repeated, split_off
from nemo_rl.data.datasets.custom import load_custom
from nemo_rl.data.datasets.hub import open_hub
from nemo_rl.data.datasets.local import open_local
from nemo_rl.data.datasets.preference import PairReader
from nemo_rl.data.datasets.records import Record, RecordDataset, RecordFields, Table, check_not_empty, optional_field
from nemo_rl.data.types import Chat, ChatPair, ItemDataset, Task, TaskDataset
from nemo_rl.errors import DataError

_log = logging.getLogger(__name__)

type _AnyFormat = MessagesFormat | CompletionFormat | JudgedFormat | PairFormat | ChoiceFormat | RankingFormat

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


def build_dataset(spec: DataSpec, split: str, *, held_out: TaskDataset | None = None) -> TaskDataset:
    """Build the problems that a spec describes.

    Args:
        spec: its section of the configuration.
        split: `train`, `validation` or `test`; generated data sets draw every split from a random stream of its own.
        held_out: a generated data set whose repeatable problems this one must not contain.

    Raises:
        DataError: the data are missing, empty or malformed.
        ConfigError: a custom data set cannot be imported.
    """
    match spec:
        case ArithmeticDataConfig():
            return _arithmetic(spec, split, held_out)
        case LocalDataConfig():
            fields = RecordFields(spec.prompt_key, spec.answer_key, spec.environment)
            return RecordDataset(open_local(spec.path), fields)
        case HubDataConfig():
            fields = RecordFields(spec.prompt_key, spec.answer_key, spec.environment)
            return RecordDataset(open_hub(spec.path, split=spec.split, subset=spec.subset), fields)
        case BuiltinDataConfig():
            return _builtin_problems(spec, split)
        case CustomDataConfig():
            return load_custom(spec.path, spec.kwargs, Task)
        case TaskMixtureConfig():
            parts = [build_dataset(part.data, split, held_out=held_out) for part in spec.datasets]
            return repeated(mixture(parts, [part.weight for part in spec.datasets]), spec.repeat)


def build_chats(spec: ExampleSpec, split: str) -> ItemDataset[Chat]:
    """Build the conversations that a spec describes; those of a judged layout say whether they are desirable.

    Raises:
        DataError: the data are missing, empty, malformed or of another kind.
        ConfigError: a custom data set cannot be imported.
    """
    match spec:
        case ArithmeticDataConfig():
            return ArithmeticChats(_arithmetic(spec, split))
        case LocalExamplesConfig():
            return _chats(open_local(spec.path), spec.format)
        case HubExamplesConfig():
            return _chats(open_hub(spec.path, split=spec.split, subset=spec.subset), spec.format)
        case BuiltinDataConfig():
            builtin = BUILTIN[spec.name]
            if builtin.chats is None:
                raise _no_layout(spec, "conversations", [name for name, known in BUILTIN.items() if known.chats])
            table = open_builtin(spec.name, split, path=spec.path, chosen_split=spec.split)
            return _chats(threads(table) if builtin.in_messages else table, builtin.chats)
        case CustomDataConfig():
            return load_custom(spec.path, spec.kwargs, Chat)
        case ExampleMixtureConfig():
            parts = [build_chats(part.data, split) for part in spec.datasets]
            return repeated(mixture(parts, [part.weight for part in spec.datasets]), spec.repeat)


def build_pairs(spec: ExampleSpec, split: str) -> ItemDataset[ChatPair]:
    """Build the pairs of answers that a spec describes.

    Raises:
        DataError: the data are missing, empty, malformed or of another kind.
        ConfigError: a custom data set cannot be imported.
    """
    match spec:
        case ArithmeticDataConfig():
            return ArithmeticPairs(_arithmetic(spec, split))
        case LocalExamplesConfig():
            return _pairs(open_local(spec.path), spec.format)
        case HubExamplesConfig():
            return _pairs(open_hub(spec.path, split=spec.split, subset=spec.subset), spec.format)
        case BuiltinDataConfig():
            pairs = BUILTIN[spec.name].pairs
            if pairs is None:
                raise _no_layout(spec, "pairs of answers", [name for name, known in BUILTIN.items() if known.pairs])
            return _pairs(open_builtin(spec.name, split, path=spec.path, chosen_split=spec.split), pairs)
        case CustomDataConfig():
            return load_custom(spec.path, spec.kwargs, ChatPair)
        case ExampleMixtureConfig():
            parts = [build_pairs(part.data, split) for part in spec.datasets]
            return repeated(mixture(parts, [part.weight for part in spec.datasets]), spec.repeat)


def load_chats(data: ExampleDataConfig, *, seed: int) -> tuple[ItemDataset[Chat], ItemDataset[Chat] | None]:
    """Build the conversations to learn from, and those for validation if there are any.

    Raises:
        DataError: the data are missing, empty or malformed, or validation is asked for twice.
    """
    train = build_chats(data.train, "train")
    if _is_split_off(data):
        return split_off(train, data.split_validation_size, seed=seed)
    return train, None if data.validation is None else build_chats(data.validation, "validation")


def load_pairs(data: ExampleDataConfig, *, seed: int) -> tuple[ItemDataset[ChatPair], ItemDataset[ChatPair] | None]:
    """Build the pairs to learn from, and those for validation if there are any; see `load_chats`."""
    train = build_pairs(data.train, "train")
    if _is_split_off(data):
        return split_off(train, data.split_validation_size, seed=seed)
    return train, None if data.validation is None else build_pairs(data.validation, "validation")


def _is_split_off(data: ExampleDataConfig) -> bool:
    if data.split_validation_size and data.validation is not None:
        raise DataError("data.validation and data.split_validation_size are both set; keep one")
    return data.split_validation_size > 0


def _arithmetic(spec: ArithmeticDataConfig, split: str, held_out: TaskDataset | None = None) -> ArithmeticDataset:
    return ArithmeticDataset(
        spec.num_samples,
        seed=spec.seed,
        split=split,
        mix=dict[str, float](spec.mix.items()),
        exclude=unrepeatable_questions(held_out) if isinstance(held_out, ArithmeticDataset) else frozenset(),
        environment=spec.environment,
    )


def _builtin_problems(spec: BuiltinDataConfig, split: str) -> TaskDataset:
    columns = BUILTIN[spec.name].problems
    if columns is None:
        raise _no_layout(spec, "problems with answers", [name for name, known in BUILTIN.items() if known.problems])
    table = open_builtin(spec.name, split, path=spec.path, chosen_split=spec.split)
    if columns.without_answer:
        table = _leave_out(
            table, lambda record: optional_field(record, columns.answer_key) in columns.without_answer, "no answer"
        )
    fields = RecordFields(columns.prompt_key, columns.answer_key, spec.environment, columns.answer_after)
    return RecordDataset(table, fields)


def _chats(table: Table, fields: _AnyFormat | None) -> ItemDataset[Chat]:
    match fields:
        case None:
            return RecordDataset(table, _recognised(table, CHAT_LAYOUTS))
        case MessagesFormat() | CompletionFormat() | JudgedFormat():
            return RecordDataset(table, ChatReader(fields))
        case _:
            raise DataError(
                f"the data set {table.source} has format {fields.type}, which holds pairs of answers, and conversations"
                " are needed; choose messages, completion or judged"
            )


def _pairs(table: Table, fields: _AnyFormat | None) -> ItemDataset[ChatPair]:
    reader = _recognised(table, PAIR_LAYOUTS) if fields is None else None
    match fields if reader is None else reader.fields:
        case ChoiceFormat() as choice:
            kept = _leave_out(table, lambda record: optional_field(record, choice.preference_key) == 0, "no preference")
            return RecordDataset(kept, PairReader(choice))
        case (PairFormat() | RankingFormat()) as comparison:
            return RecordDataset(table, PairReader(comparison))
        case other:
            raise DataError(
                f"the data set {table.source} has format {other.type if other else None}, which holds conversations, "
                "and pairs of answers are needed; choose pair, choice or ranking"
            )


def _recognised[Reader](table: Table, layouts: tuple[tuple[tuple[str, ...], Reader], ...]) -> Reader:
    """Find the layout by the names of the first record's fields."""
    check_not_empty(len(table.records), table.source)
    record = table.records[0]
    for keys, reader in layouts:
        if all(key in record for key in keys):
            return reader
    known = "; ".join(", ".join(keys) for keys, _ in layouts)
    raise DataError(
        f"{table.where(0)} has the fields {sorted(record)}, and none of the usual sets is among them ({known}); set "
        "format to say which field holds what"
    )


def _leave_out(table: Table, unwanted: Callable[[Record], bool], why: str) -> Table:
    """Leave unwanted records out, and say how many."""
    kept = [index for index in range(len(table.records)) if not unwanted(table.records[index])]
    if left_out := len(table.records) - len(kept):
        _log.info("%s: %d of %d records have %s and are left out", table.source, left_out, len(table.records), why)
    return table.select(kept)


def _no_layout(spec: BuiltinDataConfig, kind: str, others: list[str]) -> DataError:
    return DataError(f"the data set {spec.name} holds no {kind}; use one of {', '.join(others)}, or data of your own")
