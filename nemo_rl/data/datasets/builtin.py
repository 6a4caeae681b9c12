"""Well-known data sets by name: where each is on the hub, and what its columns hold."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from nemo_rl.config.schema.data import BuiltinDataConfig, BuiltinName
from nemo_rl.config.schema.formats import ChoiceFormat, CompletionFormat, MessagesFormat, PairFormat
from nemo_rl.data.datasets.hub import open_hub, stream_hub
from nemo_rl.data.datasets.pictures import PictureLayout
from nemo_rl.data.datasets.record_streams import RecordStream
from nemo_rl.data.datasets.records import Table, joined
from nemo_rl.errors import DataError


@dataclass(frozen=True, slots=True)
class ProblemColumns:
    """Columns of problems with known answers; see `RecordFields`."""

    prompt_key: str = "problem"
    answer_key: str = "answer"
    answer_after: str = ""
    context_key: str | None = None
    without_answer: tuple[str | None, ...] = ()
    """What the column holds where there is no answer to compare with; such records are left out."""


@dataclass(frozen=True, slots=True)
class Builtin:
    """One data set; a layout it does not have is None.

    Attributes:
        path: name on the hub.
        subsets: subsets (configurations) on the hub, read one after the other; None is the default.
        splits: its split for `train`, and for `validation` or `test` if it has one.
        problems: how to read problems for the policy to solve.
        chats: how to read conversations to imitate.
        pairs: how to read pairs of answers.
        pictures: how to read problems that show images, also as conversations.
        in_messages: whether a row is one message of a conversation.
    """

    path: str
    subsets: tuple[str | None, ...] = (None,)
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train"})
    problems: ProblemColumns | None = None
    chats: MessagesFormat | CompletionFormat | None = None
    pairs: PairFormat | ChoiceFormat | None = None
    pictures: PictureLayout | None = None
    in_messages: bool = False


_ONE_SPLIT = {"train": "train", "validation": "train", "test": "train"}
"""Of a benchmark, whose only split serves whatever it is asked for."""

BUILTIN: Mapping[BuiltinName, Builtin] = {
    "AIME2024": Builtin("HuggingFaceH4/aime_2024", splits=_ONE_SPLIT, problems=ProblemColumns()),
    "AIME2025": Builtin(
        "opencompass/AIME2025",
        subsets=("AIME2025-I", "AIME2025-II"),
        splits={"train": "test", "validation": "test", "test": "test"},
        problems=ProblemColumns(prompt_key="question"),
    ),
    "DAPOMathAIME2024": Builtin(
        "BytedTsinghua-SIA/AIME-2024",
        splits=_ONE_SPLIT,
        problems=ProblemColumns(prompt_key="prompt", answer_key="reward_model.ground_truth"),
    ),
    "MATH-500": Builtin(
        "HuggingFaceH4/MATH-500",
        splits={"train": "test", "validation": "test", "test": "test"},
        problems=ProblemColumns(),
        chats=CompletionFormat(prompt_key="problem", completion_key="solution"),
    ),
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
        subsets=("main",),
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
        subsets=("default",),
        problems=ProblemColumns(),
        chats=MessagesFormat(),
    ),
    "squad": Builtin(
        "rajpurkar/squad",
        splits={"train": "train", "validation": "validation"},
        problems=ProblemColumns(prompt_key="question", answer_key="answers.text.0", context_key="context"),
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
        subsets=("preference",),
        splits={"train": "train", "validation": "validation"},
        pairs=ChoiceFormat(),
    ),
    "clevr-cogent": Builtin("MMInstruction/Clevr_CoGenT_TrainA_70K_Complex", pictures="clevr"),
    "refcoco": Builtin(
        "jxu124/refcoco",
        splits={"train": "train", "validation": "validation", "test": "test"},
        pictures="refcoco",
    ),
    "geometry3k": Builtin(
        "hiyouga/geometry3k",
        splits={"train": "train", "validation": "validation", "test": "test"},
        pictures="geometry3k",
    ),
}


def open_builtin(spec: BuiltinDataConfig, split: str) -> Table | RecordStream:
    """Open a data set by name.

    Args:
        spec: which one; its `path` is a local folder in the hub's layout, of which the default subset is read.
        split: what it is for: `train`, `validation` or `test`.

    Raises:
        DataError: it has no such split, or cannot be read, or not as a stream.
    """
    builtin = BUILTIN[spec.name]
    own = spec.split or builtin.splits.get(split)
    if own is None:
        raise DataError(
            f"the data set {spec.name} has no {split} split; set its split, e.g. split: {builtin.splits['train']}[:1%]"
        )
    path, decode = spec.path or builtin.path, builtin.pictures is None
    subsets: tuple[str | None, ...] = (None,) if spec.path else builtin.subsets
    if not spec.streaming:
        tables = [open_hub(path, split=own, subset=subset, decode=decode) for subset in subsets]
        return joined(tables, f"{path} (split {own!r})")
    match subsets:
        case (subset,) if not builtin.in_messages:
            return stream_hub(path, split=own, subset=subset, decode=decode)
        case _:
            raise DataError(f"the data set {spec.name} is put together from all its rows; set its streaming to false")
