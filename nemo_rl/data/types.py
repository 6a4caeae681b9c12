"""The types that travel between the data, the environments, the samplers and the algorithms.

Shape letters: n tokens of one completion, T tokens of one rollout, N tokens of a batch, B sequences, G group size.
Every per-token column is aligned to the token itself: `logprobs[t]` is the log-probability of token t given all before
it.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, Protocol, TypedDict

from torch import Tensor


class Message(TypedDict):
    """One message of a conversation in the OpenAI chat format."""

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]


type Tool = dict[str, Any]
"""Description of a tool that the assistant may call: a JSON schema as in the OpenAI chat format."""


IMAGE = "<image>"
"""Where in the words of a message an image belongs; the images themselves travel beside the messages."""

type EncodedImage = bytes
"""A PNG, JPEG or other image file as it is."""

type TooLong = Literal["error", "skip", "filter"]
"""What happens to what is above a limit: `error` stops, `skip` passes over it, `filter` leaves it out beforehand."""


type StopReason = Literal["stop", "length"]
"""`stop`: a stop token or string; `length`: the token budget."""


@dataclass(frozen=True, slots=True)
class Task:
    """One problem to be solved by the policy.

    Attributes:
        messages: the conversation so far; its last message is the one to answer.
        environment: name of the environment (a key of the `env` section) that judges it.
        extra: what the environment needs, e.g. `{"ground_truth": "12"}`.
        index: position in the data set, the task's identity in logs and checkpoints.
        token_ids: int64 [P], the prompt as tokens; None until a `TaskProcessor` has applied the chat template.
        template: what surrounds the problem, with `{}` for it; None is what the run has for all tasks.
        system_prompt: the system message; None is the run's.
        images: for each `IMAGE` in the messages, in order, the image.
    """

    messages: tuple[Message, ...]
    environment: str
    extra: dict[str, Any] = field(default_factory=dict)
    index: int = 0
    token_ids: Tensor | None = None
    template: str | None = None
    system_prompt: str | None = None
    images: tuple[EncodedImage, ...] = ()


@dataclass(frozen=True, slots=True)
class Chat:
    """One conversation to learn from.

    Attributes:
        messages: the whole conversation.
        tools: the tools that the assistant could call in it.
        index: position in the data set, the record's identity in logs and checkpoints.
        desirable: whether its last answer is a good one; None where nobody judged it.
        template: what surrounds the first words of the user, as in `Task`.
        system_prompt: the system message, as in `Task`.
        images: for each `IMAGE` in the messages, in order, the image.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    index: int = 0
    desirable: bool | None = None
    template: str | None = None
    system_prompt: str | None = None
    images: tuple[EncodedImage, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatPair:
    """Two answers to one prompt, of which the first is preferred.

    Attributes:
        prompt: the conversation so far.
        chosen: the messages of the preferred answer.
        rejected: the messages of the other one.
        tools: the tools that the assistant could call.
        margin: by how much the first is preferred, in the unit of the data set; 0 where it does not say.
        index: position in the data set.
        template: what surrounds the first words of the user, as in `Task`.
        system_prompt: the system message, as in `Task`.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    margin: float = 0.0
    index: int = 0
    template: str | None = None
    system_prompt: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence of tokens to learn from.

    Attributes:
        token_ids: int64 [T].
        loss_mask: bool [T], true on the tokens to learn; never on the first, which nothing predicts.
        index: position of its record in the data set.
        desirable: whether the answer is a good one; None where nobody judged it.
    """

    token_ids: Tensor
    loss_mask: Tensor
    index: int = 0
    desirable: bool | None = None


@dataclass(frozen=True, slots=True)
class Preference:
    """Two sequences that begin with the same prompt, of which the first is preferred; see `ChatPair`."""

    chosen: Example
    rejected: Example
    margin: float = 0.0
    index: int = 0


class ItemDataset[Item](Protocol):
    """Items by position; item i has index i. It must pickle, for loader processes."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Item: ...

    @property
    def fingerprint(self) -> str:
        """Equal for equal contents: how a resumed run notices that its data changed."""
        ...


class TaskDataset(ItemDataset[Task], Protocol):
    """Problems for the policy to solve."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample; every field is set explicitly, none is taken from a model's own generation config.

    Attributes:
        max_new_tokens: budget of one completion; reaching it stops with reason `length`.
        temperature: divides the logits; 0 is greedy.
        top_p: keep the smallest set of tokens whose probability reaches it (1 keeps all).
        top_k: keep the k most likely tokens (0 keeps all).
        min_p: keep tokens with at least this share of the best token's probability (0 keeps all).
        stop_token_ids: any of these ends the completion and is kept as its last token.
        stop_strings: the completion ends with the token that completes any of these.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One completion wanted: `prompt_ids` int64 [P], and the seed that alone decides its random draws."""

    prompt_ids: Tensor
    sampling: SamplingParams
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """What a sampler returns for one request.

    Attributes:
        token_ids: int64 [n], the sampled tokens, the stop token included.
        logprobs: float32 [n], of the distribution actually sampled from (temperature, top-p, top-k applied).
        stop_reason: why it ended.
        policy_version: version of the weights that sampled it.
    """

    token_ids: Tensor
    logprobs: Tensor
    stop_reason: StopReason
    policy_version: int


@dataclass(frozen=True, slots=True)
class Rollout:
    """One conversation between the policy and an environment, as one training sequence.

    Attributes:
        token_ids: int64 [T], prompt, completions and environment messages in order.
        loss_mask: bool [T], true on tokens the policy sampled.
        rollout_logprobs: float32 [T], the sampler's, 0 where `loss_mask` is false.
        rewards: named rewards; the training reward is their sum.
        stop_reason: of the last completion.
        policy_version: of the weights that sampled it.
        messages: the conversation as text, for people.
        metrics: extra figures of the environment.
        details: what the environment saw, as text, for logs and people, e.g. `{"extracted": "12"}`.
    """

    token_ids: Tensor
    loss_mask: Tensor
    rollout_logprobs: Tensor
    rewards: dict[str, float]
    stop_reason: StopReason
    policy_version: int
    messages: tuple[Message, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)

    @property
    def reward(self) -> float:
        """The reward trained on: the sum of the named ones."""
        return sum(self.rewards.values())


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The G rollouts of one task."""

    task: Task
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an environment answers to one policy turn.

    Attributes:
        rewards: named rewards of this turn (a plain number is stored under `reward`).
        done: whether the conversation ends here.
        messages: the environment's messages before the policy's next turn.
        state: handed back to the environment at the next turn; must pickle.
        metrics: extra figures, e.g. `{"timed_out": 1.0}`.
        details: what the environment saw, as text, for logs and people, e.g. `{"extracted": "12"}`.
    """

    rewards: dict[str, float]
    done: bool = True
    messages: tuple[Message, ...] = ()
    state: Any = None
    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
