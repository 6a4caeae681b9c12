"""Records that hold conversations: how each layout becomes a `Chat`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from nemo_rl.config.schema.formats import CompletionFormat, JudgedFormat, MessagesFormat
from nemo_rl.data.chat import check_spoken
from nemo_rl.data.datasets.records import Record, Table, field_of, messages_of, optional_field
from nemo_rl.data.types import Chat, Message, Tool
from nemo_rl.errors import DataError

_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant"}
"""What other conventions call the two speakers."""


@dataclass(frozen=True, slots=True)
class ChatReader:
    """Turns records of one layout into conversations."""

    fields: MessagesFormat | CompletionFormat | JudgedFormat

    def read(self, record: Record, index: int, where: str) -> Chat:
        """Turn one record into conversation `index`.

        Raises:
            DataError: a field is missing or of another kind, or nobody answers, or an answer is empty.
        """
        match self.fields:
            case MessagesFormat() as fields:
                messages, desirable = _messages(record, fields, where), None
                tools = tuple(cast("Sequence[Tool]", optional_field(record, fields.tools_key) or ()))
            case CompletionFormat() as fields:
                messages, desirable, tools = _completion(record, fields, where), None, ()
            case JudgedFormat() as fields:
                prompt = messages_of(field_of(record, fields.prompt_key, where, setting="prompt_key"), "user", where)
                answer = answer_in(record, fields.completion_key, where, setting="completion_key")
                messages, desirable, tools = (*prompt, *answer), _label(record, fields.label_key, where), ()
        answers = [message for message in messages if message["role"] == "assistant"]
        if not answers:
            raise DataError(f"{where} has no assistant message, so nothing to learn; remove it")
        check_spoken(answers, where)
        return Chat(messages, tools, index, desirable)


def answer_in(record: Record, key: str, where: str, *, setting: str) -> tuple[Message, ...]:
    """Read an answer: text, or a list of messages.

    Raises:
        DataError: it is missing or empty.
    """
    value = field_of(record, key, where, setting=setting)
    answer = (
        (Message(role="assistant", content=value),)
        if isinstance(value, str)
        else messages_of(value, "assistant", where)
    )
    check_spoken([message for message in answer if message["role"] == "assistant"], where)
    return answer


def threads(table: Table) -> Table:
    """Put conversations together from a table of single messages that name their parents, as in OpenAssistant's.

    Every path from a first message to an assistant's message that nobody answers (or whose answers all lead nowhere)
    becomes one record `{"messages": [...]}`. Deleted messages end their path.
    """
    rows = {str(row["message_id"]): row for row in (table.records[i] for i in range(len(table.records)))}
    rows = {key: row for key, row in rows.items() if not row.get("deleted")}
    answered: dict[str, list[str]] = {}
    for key, row in rows.items():
        answered.setdefault(str(row.get("parent_id")), []).append(key)
    paths: dict[tuple[str, ...], None] = {}
    pending: list[tuple[str, ...]] = [(key,) for key in reversed(answered.get("None", []))]
    while pending:
        path = pending.pop()
        replies = answered.get(path[-1], [])
        pending.extend((*path, key) for key in reversed(replies))
        if not replies:
            paths[path if rows[path[-1]]["role"] == "assistant" else path[:-1]] = None
    begun = {path[:size] for path in paths for size in range(len(path))}
    whole = [path for path in paths if path and path not in begun]
    records = [
        {"messages": [{"role": rows[key]["role"], "content": rows[key]["text"]} for key in path]} for path in whole
    ]
    return Table(records, table.source)


def _messages(record: Record, fields: MessagesFormat, where: str) -> tuple[Message, ...]:
    """Read a list of messages under whatever names its fields have."""
    value = field_of(record, fields.messages_key, where, setting="messages_key")
    if not isinstance(value, list | tuple) or not all(isinstance(turn, Mapping) for turn in value):
        raise DataError(f"{where} has {fields.messages_key!r} that is not a list of messages; correct it")
    turns = [_turn(cast("Mapping[str, Any]", turn), fields) for turn in value]
    return messages_of(turns, "assistant", where)


def _turn(turn: Mapping[str, Any], fields: MessagesFormat) -> dict[str, Any]:
    role, content = turn.get(fields.role_key), turn.get(fields.content_key)
    return {"role": _ROLES.get(str(role), role), "content": content, "tool_calls": turn.get("tool_calls")}


def _completion(record: Record, fields: CompletionFormat, where: str) -> tuple[Message, ...]:
    prompt = messages_of(field_of(record, fields.prompt_key, where, setting="prompt_key"), "user", where)
    if context := optional_field(record, fields.context_key):
        last = prompt[-1]
        prompt = (*prompt[:-1], Message(role=last["role"], content=f"{last['content']}\n\n{context}"))
    if system := optional_field(record, fields.system_key):
        prompt = (Message(role="system", content=str(system)), *prompt)
    return (*prompt, *answer_in(record, fields.completion_key, where, setting="completion_key"))


def _label(record: Record, key: str, where: str) -> bool:
    value = field_of(record, key, where, setting="label_key")
    if value not in (0, 1):  # True and False among them
        raise DataError(f"{where} has {key} {value!r}, which is neither true nor false; correct it")
    return bool(value)
