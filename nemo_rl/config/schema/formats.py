"""How the records of a file or of a hub data set are laid out: which field holds what.

A key may lead into a field, as in `reward_model.ground_truth` or `answers.text.0`.
"""

from typing import Annotated, Literal

from pydantic import Field

from nemo_rl.config.schema.base import Section


class MessagesFormat(Section):
    """A whole conversation: `{"messages": [{"role": "user", "content": "Hi"}, ...]}`."""

    type: Literal["messages"] = "messages"
    """Kind of record."""

    messages_key: str = "messages"
    """Field of the list of messages."""

    role_key: str = "role"
    """Field of a message that says who speaks."""

    content_key: str = "content"
    """Field of a message that holds the words."""

    tools_key: str = "tools"
    """Field of the tools on offer, as JSON schemas; records may lack it."""


class CompletionFormat(Section):
    """A prompt and its answer: `{"prompt": "2 + 2?", "completion": "4"}`."""

    type: Literal["completion"] = "completion"
    """Kind of record."""

    prompt_key: str = "prompt"
    """Field of the prompt: text, or a list of messages."""

    completion_key: str = "completion"
    """Field of the answer: text, or a list of messages."""

    context_key: str | None = None
    """Field of a text that follows the prompt after a blank line; records may lack it."""

    system_key: str | None = None
    """Field of the system message; records may lack it."""


class JudgedFormat(Section):
    """A prompt, an answer and whether it is a good one: `{"prompt": ..., "completion": ..., "label": true}`."""

    type: Literal["judged"] = "judged"
    """Kind of record."""

    prompt_key: str = "prompt"
    """Field of the prompt: text, or a list of messages."""

    completion_key: str = "completion"
    """Field of the answer: text, or a list of messages."""

    label_key: str = "label"
    """Field that says whether the answer is good: true or false, 1 or 0."""


class PairFormat(Section):
    """A prompt and two answers: `{"prompt": ..., "chosen": ..., "rejected": ...}`."""

    type: Literal["pair"] = "pair"
    """Kind of record."""

    prompt_key: str | None = "prompt"
    """Field of the prompt: text, or a list of messages; not needed where the answers are whole conversations."""

    chosen_key: str = "chosen"
    """Field of the preferred answer: text, or a list of messages with or without the prompt."""

    rejected_key: str = "rejected"
    """Field of the other answer, in the same form."""

    margin_key: str | None = None
    """Field of the number that says by how much the first is preferred."""


class ChoiceFormat(Section):
    """Two answers and a signed preference, as in HelpSteer3: below 0 for the first, above 0 for the second."""

    type: Literal["choice"] = "choice"
    """Kind of record."""

    prompt_key: str = "context"
    """Field of the prompt: text, or a list of messages."""

    first_key: str = "response1"
    """Field of the first answer."""

    second_key: str = "response2"
    """Field of the second answer."""

    preference_key: str = "overall_preference"
    """Field of the preference; records with 0 are left out. Its size becomes the margin."""


class RankingFormat(Section):
    """Ranked answers, the best of which is compared with the worst.

    `{"context": [...], "completions": [{"rank": 0, "completion": [...]}, {"rank": 1, "completion": [...]}]}`
    """

    type: Literal["ranking"] = "ranking"
    """Kind of record."""

    prompt_key: str = "context"
    """Field of the prompt: text, or a list of messages."""

    completions_key: str = "completions"
    """Field of the list of answers."""

    completion_key: str = "completion"
    """Field of an answer that holds it: text, or a list of messages."""

    rank_key: str = "rank"
    """Field of an answer's rank; the lowest is the best."""


type ChatFormat = MessagesFormat | CompletionFormat
type PreferenceFormat = PairFormat | ChoiceFormat | RankingFormat
type RecordFormat = Annotated[
    MessagesFormat | CompletionFormat | JudgedFormat | PairFormat | ChoiceFormat | RankingFormat,
    Field(discriminator="type"),
]
