"""Records that compare answers: how each layout becomes a `ChatPair`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from nemo_rl.config.schema.formats import ChoiceFormat, PairFormat, RankingFormat
from nemo_rl.data.chat import check_spoken
from nemo_rl.data.datasets.chats import answer_in
from nemo_rl.data.datasets.records import Record, field_of, messages_of
from nemo_rl.data.types import ChatPair, Message
from nemo_rl.errors import DataError


@dataclass(frozen=True, slots=True)
class PairReader:
    """Turns records of one layout into pairs."""

    fields: PairFormat | ChoiceFormat | RankingFormat

    def read(self, record: Record, index: int, where: str) -> ChatPair:
        """Turn one record into pair `index`.

        Raises:
            DataError: a field is missing or of another kind, an answer is empty, both are equal, neither is preferred,
                or they answer different prompts.
        """
        match self.fields:
            case PairFormat() as fields:
                chosen = answer_in(record, fields.chosen_key, where, setting="chosen_key")
                rejected = answer_in(record, fields.rejected_key, where, setting="rejected_key")
                margin = 0.0 if fields.margin_key is None else _number(record, fields.margin_key, where, "margin_key")
            case ChoiceFormat() as fields:
                first = answer_in(record, fields.first_key, where, setting="first_key")
                second = answer_in(record, fields.second_key, where, setting="second_key")
                preference = _number(record, fields.preference_key, where, "preference_key")
                if not preference:
                    raise DataError(f"{where} prefers neither answer; remove it")
                chosen, rejected = (first, second) if preference < 0 else (second, first)
                margin = abs(preference)
            case RankingFormat() as fields:
                chosen, rejected = _best_and_worst(record, fields, where)
                margin = 0.0
        if chosen == rejected:
            raise DataError(f"{where} has the same chosen and rejected answer, so neither is preferred; remove it")
        prompt, chosen, rejected = _apart(_prompt(record, self.fields, where), chosen, rejected, where)
        return ChatPair(prompt, chosen, rejected, margin=margin, index=index)


def _prompt(record: Record, fields: PairFormat | ChoiceFormat | RankingFormat, where: str) -> tuple[Message, ...]:
    key = fields.prompt_key
    return () if key is None else messages_of(field_of(record, key, where, setting="prompt_key"), "user", where)


def _best_and_worst(
    record: Record, fields: RankingFormat, where: str
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    value = field_of(record, fields.completions_key, where, setting="completions_key")
    if not isinstance(value, list) or not all(isinstance(answer, Mapping) for answer in value):
        raise DataError(f"{where} has {fields.completions_key!r} that is not a list of answers with ranks; correct it")
    answers = cast("Sequence[Mapping[str, Any]]", value)
    ranked = sorted(answers, key=lambda answer: _number(answer, fields.rank_key, where, "rank_key"))
    if len(ranked) < 2 or ranked[0][fields.rank_key] == ranked[-1][fields.rank_key]:
        raise DataError(f"{where} has no two answers of different rank, so none is preferred; remove it")
    best, worst = (
        answer_in(ranked[place], fields.completion_key, where, setting="completion_key") for place in (0, -1)
    )
    return best, worst


def _apart(
    prompt: tuple[Message, ...], chosen: tuple[Message, ...], rejected: tuple[Message, ...], where: str
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """Tell the common prompt from the two answers, whether or not the answers repeat it.

    Raises:
        DataError: there is no common prompt, or what follows it is not an assistant's answer.
    """
    if chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant":
        prompt = ()  # they are whole conversations
    chosen, rejected = (*prompt, *chosen), (*prompt, *rejected)
    longest = min(len(chosen), len(rejected)) - 1
    size = next((place for place in range(longest) if chosen[place] != rejected[place]), longest)
    if not size or chosen[size]["role"] != "assistant" or rejected[size]["role"] != "assistant":
        raise DataError(
            f"{where} does not hold two answers of the assistant to one prompt: the chosen and the rejected messages "
            f"part at message {size}; correct or remove it"
        )
    check_spoken([message for message in (*chosen[size:], *rejected[size:]) if message["role"] == "assistant"], where)
    return chosen[:size], chosen[size:], rejected[size:]


def _number(record: Record, key: str, where: str, setting: str) -> float:
    value = field_of(record, key, where, setting=setting)
    if not isinstance(value, int | float):
        raise DataError(f"{where} has {key} {value!r}, which is not a number; correct it")
    return float(value)
