"""Well-known data sets by name: where each is on the hub, and what its columns hold."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from nemo_rl.config.schema.data import BuiltinName
from nemo_rl.config.schema.formats import ChoiceFormat, CompletionFormat, MessagesFormat, PairFormat
from nemo_rl.data.datasets.hub import open_hub
from nemo_rl.data.datasets.records import Table
from nemo_rl.errors import DataError


@dataclass(frozen=True, slots=True)
class ProblemColumns:
    """Columns of problems with known answers; see `RecordFields`."""

    prompt_key: str = "problem"
    answer_key: str = "answer"
    answer_after: str = ""
    without_answer: tuple[str | None, ...] = ()
    """What the column holds where there is no answer to compare with; such records are left out."""


@dataclass(frozen=True, slots=True)
class Builtin:
    """One data set; a layout it does not have is None.

    Attributes:
        path: name on the hub.
        subset: subset (configuration) on the hub; None is the default.
        splits: its split for `train`, and for `validation` or `test` if it has one.
        problems: how to read problems for the policy to solve.
        chats: how to read conversations to imitate.
        pairs: how to read pairs of answers.
        in_messages: whether a row is one message of a conversation.
    """

    path: str
    subset: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train"})
    problems: ProblemColumns | None = None
    chats: MessagesFormat | CompletionFormat | None = None
    pairs: PairFormat | ChoiceFormat | None = None
    in_messages: bool = False


BUILTIN: Mapping[BuiltinName, Builtin] = {
    "OpenMathInstruct-2": Builtin(
        "nvidia/OpenMathInstruct-2",
        splits={"train": "train_1M"},
        problems=ProblemColumns(answer_key="expected_answer"),
        chats=CompletionFormat(prompt_key="problem", completion_key="generated_solution"),
    ),
    "DeepScaler": Builtin(
        "agentica-org/DeepScaleR-Preview-Dataset",
        problems=ProblemColumns(),
        chats=CompletionFormat(prompt_key="problem", completion_key="solution"),
    ),
    "DAPOMath17K": Builtin(
        "BytedTsinghua-SIA/DAPO-Math-17k",
        problems=ProblemColumns(prompt_key="prompt", answer_key="reward_model.ground_truth"),
    ),
    "GSM8K": Builtin(
        "openai/gsm8k",
        subset="main",
        splits={"train": "train", "validation": "test", "test": "test"},
        problems=ProblemColumns(prompt_key="question", answer_after="####"),
        chats=CompletionFormat(prompt_key="question", completion_key="answer"),
    ),
    "NuminaMath": Builtin(
        "AI-MO/NuminaMath-1.5",
        problems=ProblemColumns(without_answer=(None, "", "proof", "notfound")),
        chats=CompletionFormat(prompt_key="problem", completion_key="solution"),
    ),
    "OpenR1-Math-220k": Builtin(
        "open-r1/OpenR1-Math-220k",
        subset="default",
        problems=ProblemColumns(),
        chats=MessagesFormat(),
    ),
    "squad": Builtin(
        "rajpurkar/squad",
        splits={"train": "train", "validation": "validation"},
        problems=ProblemColumns(prompt_key="question", answer_key="answers.text.0"),
        chats=CompletionFormat(prompt_key="question", completion_key="answers.text.0", system_key="context"),
    ),
    "open_assistant": Builtin(
        "OpenAssistant/oasst1",
        splits={"train": "train", "validation": "validation"},
        chats=MessagesFormat(),
        in_messages=True,
    ),
    "tulu3_sft_mixture": Builtin("allenai/tulu-3-sft-mixture", chats=MessagesFormat()),
    "tulu3_preference": Builtin(
        "allenai/llama-3.1-tulu-3-8b-preference-mixture",
        pairs=PairFormat(prompt_key=None),
    ),
    "HelpSteer3": Builtin(
        "nvidia/HelpSteer3",
        subset="preference",
        splits={"train": "train", "validation": "validation"},
        pairs=ChoiceFormat(),
    ),
}


def open_builtin(name: BuiltinName, split: str, *, path: str | None = None, chosen_split: str | None = None) -> Table:
    """Open a data set by name.

    Args:
        name: which one.
        split: what it is for: `train`, `validation` or `test`.
        path: a local folder in the hub's layout, of which the default subset is read; None is the hub.
        chosen_split: the split to read; None is the data set's own for that purpose.

    Raises:
        DataError: it has no such split, or cannot be read.
    """
    builtin = BUILTIN[name]
    own = chosen_split or builtin.splits.get(split)
    if own is None:
        raise DataError(
            f"the data set {name} has no {split} split; set its split, e.g. split: {builtin.splits['train']}[:1%]"
        )
    return open_hub(path or builtin.path, split=own, subset=None if path else builtin.subset)
