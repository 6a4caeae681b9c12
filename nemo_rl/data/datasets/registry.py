"""From a data section of the configuration to data sets of problems, of conversations or of pairs."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from nemo_rl.config.schema.data import (
    ArithmeticDataConfig,
    BuiltinDataConfig,
    DataConfig,
    DataSpec,
    HubDataConfig,
    LocalDataConfig,
    RecordsConfig,
    TaskMixtureConfig,
)
from nemo_rl.config.schema.examples import (
    ExampleDataConfig,
    ExampleMixtureConfig,
    ExampleSpec,
    HubExamplesConfig,
    LocalExamplesConfig,
)
from nemo_rl.config.schema.formats import ChoiceFormat, JudgedFormat
from nemo_rl.config.schema.sources import CustomDataConfig, LoadingConfig, SourceConfig
from nemo_rl.data.datasets.arithmetic import ArithmeticDataset, unrepeatable_questions
from nemo_rl.data.datasets.arithmetic_answers import ArithmeticChats, ArithmeticJudged, ArithmeticPairs
from nemo_rl.data.datasets.builtin import BUILTIN, Builtin, open_builtin
from nemo_rl.data.datasets.chats import threads
from nemo_rl.data.datasets.combine import mixture, repeated, split_off, split_off_parts
from nemo_rl.data.datasets.custom import ProcessedReader, load_custom
from nemo_rl.data.datasets.hub import open_hub, stream_hub
from nemo_rl.data.datasets.layouts import chat_reader, pair_reader
from nemo_rl.data.datasets.local import open_local
from nemo_rl.data.datasets.pictures import PictureChats, PictureProblems
from nemo_rl.data.datasets.preference import PairReader
from nemo_rl.data.datasets.prompts import Prompted, prompted
from nemo_rl.data.datasets.record_streams import RecordStream, stream_local
from nemo_rl.data.datasets.records import Reader, RecordDataset, RecordFields, Table, Unwanted, check_not_empty
from nemo_rl.data.datasets.streams import ItemStream, Source, held
from nemo_rl.data.types import Chat, ChatPair, Task
from nemo_rl.errors import DataError

_log = logging.getLogger(__name__)

type _FiledConfig = LocalDataConfig | LocalExamplesConfig | HubDataConfig | HubExamplesConfig | BuiltinDataConfig


def build_dataset(spec: DataSpec, split: str, *, held_out: Source[Task] | None = None) -> Source[Task]:
    """Build the problems that a spec describes.

    Args:
        spec: its section of the configuration.
        split: `train`, `validation` or `test`; generated data sets draw every split from a random stream of its own.
        held_out: a generated data set whose repeatable problems this one must not contain.

    Raises:
        DataError: the data are missing, empty or malformed.
        ConfigError: a custom data set or a processor cannot be imported.
    """
    match spec:
        case ArithmeticDataConfig():
            return prompted(_arithmetic(spec, split, held_out), spec)
        case CustomDataConfig():
            return prompted(load_custom(spec.path, spec.kwargs, Task), spec)
        case TaskMixtureConfig():
            parts = [build_dataset(part.data, split, held_out=held_out) for part in spec.datasets]
            return _mixed(parts, [part.weight for part in spec.datasets], spec.repeat)
        case _:
            return _read(spec, split, Task, _problem_reader, lambda known: known.problems or known.pictures)


def build_chats(spec: ExampleSpec, split: str, *, judged: bool = False) -> Source[Chat]:
    """Build the conversations that a spec describes.

    Args:
        spec: of the data set.
        split: `train` or `validation`.
        judged: whether their last answers are to be judged good or bad; if not, those that are judged bad are left out.

    Raises:
        DataError: the data are missing, empty, malformed or of another kind.
        ConfigError: a custom data set or a processor cannot be imported.
    """
    match spec:
        case ArithmeticDataConfig():
            problems = _arithmetic(spec, split)
            return prompted(ArithmeticJudged(ArithmeticPairs(problems)) if judged else ArithmeticChats(problems), spec)
        case CustomDataConfig():
            return prompted(load_custom(spec.path, spec.kwargs, Chat), spec)
        case ExampleMixtureConfig():
            parts = [build_chats(part.data, split, judged=judged) for part in spec.datasets]
            return _mixed(parts, [part.weight for part in spec.datasets], spec.repeat)
        case _:
            choose = partial(_chat_reader, judged=judged)
            return _read(spec, split, Chat, choose, lambda known: known.chats or known.pictures)


def build_pairs(spec: ExampleSpec, split: str) -> Source[ChatPair]:
    """Build the pairs of answers that a spec describes.

    Raises:
        DataError: the data are missing, empty, malformed or of another kind.
        ConfigError: a custom data set or a processor cannot be imported.
    """
    match spec:
        case ArithmeticDataConfig():
            return prompted(ArithmeticPairs(_arithmetic(spec, split)), spec)
        case CustomDataConfig():
            return prompted(load_custom(spec.path, spec.kwargs, ChatPair), spec)
        case ExampleMixtureConfig():
            parts = [build_pairs(part.data, split) for part in spec.datasets]
            return _mixed(parts, [part.weight for part in spec.datasets], spec.repeat)
        case _:
            return _read(spec, split, ChatPair, _pair_reader, lambda known: known.pairs)


def load_tasks(
    data: DataConfig, *, seed: int, held_out: Source[Task] | None = None
) -> tuple[Source[Task], Source[Task] | None]:
    """Build the problems to learn from, and those for validation if there are any.

    Raises:
        DataError: the data are missing, empty or malformed.
    """
    train, drawn = _train_and_drawn(partial(build_dataset, held_out=held_out), data.train, data, seed)
    return train, drawn if data.validation is None else build_dataset(data.validation, "validation")


def load_chats(data: ExampleDataConfig, *, seed: int, judged: bool = False) -> tuple[Source[Chat], Source[Chat] | None]:
    """Build the conversations to learn from, and those for validation if there are any; see `load_tasks`."""
    build = partial(build_chats, judged=judged)
    train, drawn = _train_and_drawn(build, data.train, data, seed)
    return train, drawn if data.validation is None else build(data.validation, "validation")


def load_pairs(data: ExampleDataConfig, *, seed: int) -> tuple[Source[ChatPair], Source[ChatPair] | None]:
    """Build the pairs to learn from, and those for validation if there are any; see `load_tasks`."""
    train, drawn = _train_and_drawn(build_pairs, data.train, data, seed)
    return train, drawn if data.validation is None else build_pairs(data.validation, "validation")


def _train_and_drawn[Spec: (DataSpec, ExampleSpec), Item: (Task, Chat, ChatPair)](
    build: Callable[[Any, str], Source[Item]], spec: Spec, data: LoadingConfig, seed: int
) -> tuple[Source[Item], Source[Item] | None]:
    """What to learn from, and what `split_validation_size` draws from it before anything is mixed or shown again."""
    size = data.split_validation_size
    if not size:
        return build(spec, "train"), None
    reason = "split_validation_size cannot divide"
    if not isinstance(spec, TaskMixtureConfig | ExampleMixtureConfig):
        return split_off(held(build(spec, "train"), reason), size, seed=seed)
    parts = [held(build(part.data, "train"), reason) for part in spec.datasets]
    divided = split_off_parts(parts, size, seed=seed)
    drawn = [some for _, some in divided if some is not None]
    train = _mixed([left for left, _ in divided], [part.weight for part in spec.datasets], spec.repeat)
    return train, mixture(drawn, [None] * len(drawn))


def _arithmetic(spec: ArithmeticDataConfig, split: str, held_out: Source[Task] | None = None) -> ArithmeticDataset:
    known = held_out.dataset if isinstance(held_out, Prompted) else held_out
    return ArithmeticDataset(
        spec.num_samples,
        seed=spec.seed,
        split=split,
        mix=dict[str, float](spec.mix.items()),
        exclude=unrepeatable_questions(known) if isinstance(known, ArithmeticDataset) else frozenset(),
        environment=spec.environment,
    )


def _mixed[Item: (Task, Chat, ChatPair)](
    parts: Sequence[Source[Item]], weights: Sequence[float | None], times: int
) -> Source[Item]:
    whole = [held(part, "a mixture cannot hold") for part in parts]
    return repeated(mixture(whole, weights), times)


class _Choose[Item](Protocol):
    """Finds out how the records are read, and which are left out."""

    def __call__(self, spec: Any, opened: Table | RecordStream) -> tuple[Reader[Item], Unwanted | None]: ...


def _read[Item: (Task, Chat, ChatPair)](
    spec: _FiledConfig,
    split: str,
    kind: type[Item],
    choose: _Choose[Item],
    layout: Callable[[Builtin], object],
) -> Source[Item]:
    """Build the items of a file or of a data set of the hub; `layout` is what a known one needs to hold this kind."""
    if isinstance(spec, BuiltinDataConfig) and spec.processor is None and not layout(BUILTIN[spec.name]):
        others = ", ".join(name for name, known in BUILTIN.items() if layout(known))
        raise DataError(f"the data set {spec.name} holds no {_KINDS[kind]}; use one of {others}, or data of your own")
    opened = _open(spec, split)
    if spec.processor is None:
        reader, unwanted = choose(spec, opened)
    else:
        reader, unwanted = ProcessedReader(spec.processor, kind), None
    return prompted(_items(opened, reader, unwanted, spec), spec)


_KINDS = {Task: "problems with answers", Chat: "conversations", ChatPair: "pairs of answers"}


def _open(spec: _FiledConfig, split: str) -> Table | RecordStream:
    match spec:
        case LocalDataConfig() | LocalExamplesConfig():
            return stream_local(spec.path) if spec.streaming else open_local(spec.path)
        case HubDataConfig() | HubExamplesConfig():
            opened = stream_hub if spec.streaming else open_hub
            return opened(spec.path, split=spec.split, subset=spec.subset)
        case BuiltinDataConfig():
            found = open_builtin(spec, split)
            return threads(found) if isinstance(found, Table) and BUILTIN[spec.name].in_messages else found


def _items[Item](
    opened: Table | RecordStream, reader: Reader[Item], unwanted: Unwanted | None, spec: SourceConfig
) -> Source[Item]:
    if isinstance(opened, Table):
        table = opened if unwanted is None else _leave_out(opened, unwanted)
        return RecordDataset(_readable(table, reader) if spec.malformed == "skip" else table, reader)
    stream = ItemStream(opened, reader, spec.buffer_size, unwanted)
    first = next(stream.once(), None)
    check_not_empty(0 if first is None else 1, opened.source)
    return stream


def _problem_reader(spec: RecordsConfig, opened: Table | RecordStream) -> tuple[Reader[Task], Unwanted | None]:
    match spec:
        case LocalDataConfig() | HubDataConfig():
            settings = ("prompt_key", "answer_key")
            return RecordFields(spec.prompt_key, spec.answer_key, spec.environment, settings=settings), None
        case BuiltinDataConfig():
            known = BUILTIN[spec.name]
        case _:
            raise TypeError(type(spec))
    columns = known.problems
    if columns is None:
        assert known.pictures is not None
        return PictureProblems(known.pictures, spec.environment, spec.image_folder), None
    without = Unwanted(columns.answer_key, columns.without_answer, "no answer") if columns.without_answer else None
    keys = (columns.prompt_key, columns.answer_key)
    return RecordFields(*keys, spec.environment, columns.answer_after, columns.context_key), without


def _chat_reader(
    spec: LocalExamplesConfig | HubExamplesConfig | BuiltinDataConfig, opened: Table | RecordStream, *, judged: bool
) -> tuple[Reader[Chat], Unwanted | None]:
    if not isinstance(spec, BuiltinDataConfig):
        reader = chat_reader(opened, spec.format)
    elif (pictures := BUILTIN[spec.name].pictures) is not None:
        return PictureChats(pictures, spec.image_folder), None
    else:
        reader = chat_reader(opened, BUILTIN[spec.name].chats)
    match reader.fields:
        case JudgedFormat(label_key=label):
            return reader, None if judged else Unwanted(label, (False,), "an answer that is judged bad")
        case _ if judged:
            raise DataError(
                f"kto learns from answers that are judged good or bad, and the records of {opened.source} have no label"
                "; give the data a format of type judged, or choose another dpo.preference_loss"
            )
        case _:
            return reader, None


def _pair_reader(
    spec: LocalExamplesConfig | HubExamplesConfig | BuiltinDataConfig, opened: Table | RecordStream
) -> tuple[PairReader, Unwanted | None]:
    reader = pair_reader(opened, BUILTIN[spec.name].pairs if isinstance(spec, BuiltinDataConfig) else spec.format)
    fields = reader.fields
    return reader, Unwanted(fields.preference_key, (0,), "no preference") if isinstance(fields, ChoiceFormat) else None


def _readable(table: Table, reader: Reader[Any]) -> Table:
    """Leave out what cannot be read, and say how many records that are and what ails the first."""
    kept: list[int] = []
    reason = ""
    for index in range(len(table.records)):
        try:
            reader.read(table.records[index], index, table.where(index))
        except DataError as error:
            reason = reason or str(error)
        else:
            kept.append(index)
    if left_out := len(table.records) - len(kept):
        total = len(table.records)
        _log.info("%s: %d of %d records are malformed and are left out (%s)", table.source, left_out, total, reason)
    return table.select(kept)


def _leave_out(table: Table, unwanted: Unwanted) -> Table:
    """Leave unwanted records out, and say how many."""
    kept = [index for index in range(len(table.records)) if not unwanted(table.records[index])]
    if left_out := len(table.records) - len(kept):
        total = len(table.records)
        _log.info("%s: %d of %d records have %s and are left out", table.source, left_out, total, unwanted.why)
    return table.select(kept)
