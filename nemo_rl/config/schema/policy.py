"""Section `policy`: the model, and how it is trained and sampled."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, JsonValue, Tag, model_validator

from nemo_rl.config.schema.base import PositiveFloat, PositiveInt, Section, conflict
from nemo_rl.config.schema.dtensor import DTensorConfig
from nemo_rl.config.schema.generation import GenerationSpec
from nemo_rl.config.schema.moe import MoEConfig


class TokenizerConfig(Section):
    """The tokenizer of a model."""

    name: str | None = None
    """Folder or hub name of the tokenizer; None is the model's own."""

    chat_template: str | None = None
    """Jinja chat template, or a file that holds one; None is the tokenizer's own."""


class OptimizerConfig(Section):
    """A PyTorch optimizer by import path."""

    name: str = "torch.optim.AdamW"
    """Import path of the class."""

    kwargs: dict[str, JsonValue]
    """Its keyword arguments, `lr` among them; one that is not given is PyTorch's own default."""

    @model_validator(mode="after")
    def _has_a_learning_rate(self) -> Self:
        if "lr" not in self.kwargs:
            raise conflict("policy.optimizer.kwargs has no lr, the learning rate: give it one", "kwargs")
        return self


class SchedulerConfig(Section):
    """A PyTorch learning-rate scheduler by import path."""

    name: str
    """Import path of the class."""

    kwargs: dict[str, JsonValue] = Field(default_factory=dict[str, Any])
    """Its keyword arguments; steps are optimizer steps."""


class MilestonesConfig(Section):
    """Where a chain of schedulers passes on."""

    milestones: Annotated[tuple[PositiveInt, ...], Field(strict=False)]
    """Optimizer steps at which the next scheduler of the chain takes over, one fewer than schedulers."""


def _link_tag(link: object) -> str:
    return (
        "milestones"
        if isinstance(link, MilestonesConfig) or (isinstance(link, dict) and "milestones" in link)
        else "scheduler"
    )


type SchedulerLink = Annotated[
    Annotated[SchedulerConfig, Tag("scheduler")] | Annotated[MilestonesConfig, Tag("milestones")],
    Discriminator(_link_tag),
]


type PackingAlgorithm = Literal["first_fit_decreasing", "modified_first_fit_decreasing", "concatenative"]


class SequencePackingConfig(Section):
    """How sequences are put together in micro-batches."""

    algorithm: PackingAlgorithm = "first_fit_decreasing"
    """`first_fit_decreasing` puts the largest group first, each into the first micro-batch with room for it;
    `modified_first_fit_decreasing` also finds company for groups of more than half a micro-batch first; `concatenative`
    keeps the order of the batch. None changes a result."""


class ModelConfig(Section):
    """A model, and how it scores tokens."""

    model_name: str
    """`embedded:NAME`, a local folder or a name on the Hugging Face hub."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer of the model."""

    logprob_mb_tokens: PositiveInt = 8192
    """Tokens of one micro-batch of a forward pass without gradient."""

    precision: Literal["auto", "float32", "bfloat16", "bfloat16_autocast"] = "bfloat16"
    """`bfloat16`: weights in bfloat16 (with float32 master copies where they are trained); `bfloat16_autocast`: float32
    weights, arithmetic in bfloat16; `auto`: `bfloat16` where the hardware computes in it, `float32` elsewhere."""

    share_prefixes: bool = True
    """Compute a prompt once for all its answers."""

    min_shared_prefix: PositiveInt = 8
    """Shortest common prefix in tokens that is worth sharing."""

    sequence_packing: SequencePackingConfig = SequencePackingConfig()
    """How sequences are put together in micro-batches."""

    logprob_chunk_size: PositiveInt | None = None
    """Tokens whose logits are held at a time in the language-model head; None is as many as 64 MiB (GPU: 2 GiB)
    hold, at least 256."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model lives; `auto` is the GPU when there is one."""

    num_threads: PositiveInt | None = None
    """CPU threads of the model's arithmetic, which its ranks on a node divide; None is PyTorch's own choice."""

    def head_rows(self, vocab_size: int, *, on_gpu: bool) -> int:
        """Tokens whose logits the head holds at a time, `logprob_chunk_size` or its default."""
        return self.logprob_chunk_size or max(256, (2**31 if on_gpu else 2**26) // (4 * vocab_size))


class TrainedPolicyConfig(ModelConfig):
    """The model, and how it is trained."""

    train_global_batch_size: PositiveInt
    """Conversations, judged answers or pairs of one optimizer step."""

    train_mb_tokens: PositiveInt = 4096
    """Tokens of one training micro-batch as computed, shared prefixes counted once; bounds memory, never changes a
    result."""

    max_total_sequence_length: PositiveInt
    """Longest sequence in tokens, prompt and answer together."""

    compile: bool = False
    """Compile the model's layers with `torch.compile`, which takes a minute at the first step and saves a fifth of the
    later ones on a GPU."""

    max_grad_norm: PositiveFloat | None = 1.0
    """Clip the gradient to this norm; None never clips."""

    optimizer: OptimizerConfig
    """The optimizer."""

    scheduler: Annotated[tuple[SchedulerLink, ...], Field(strict=False)] = ()
    """A chain of schedulers with one `milestones` entry, or a single scheduler; empty keeps the learning rate."""

    dtensor_cfg: DTensorConfig = DTensorConfig()
    """How the model is spread over several ranks, and which part of it is trained."""

    moe: MoEConfig = MoEConfig()
    """How a mixture of experts is trained; a dense model ignores it."""

    @model_validator(mode="after")
    def _chain_is_whole(self) -> Self:
        milestones = [link for link in self.scheduler if isinstance(link, MilestonesConfig)]
        schedulers = len(self.scheduler) - len(milestones)
        if schedulers > 1 or milestones:
            count = len(milestones[0].milestones) if len(milestones) == 1 else None
            if count != schedulers - 1:
                raise conflict(
                    f"scheduler chains {schedulers} schedulers and needs one milestones entry with"
                    f" {max(schedulers - 1, 0)} steps",
                    "scheduler",
                )
        return self


class PolicyConfig(TrainedPolicyConfig):
    """The model, and how it is trained and sampled."""

    train_global_batch_size: PositiveInt
    """Rollouts of one optimizer step, in whole groups: a multiple of `grpo.num_generations_per_prompt` that divides
    `grpo.num_prompts_per_step * grpo.num_generations_per_prompt`."""

    generation: GenerationSpec
    """How answers are sampled, and by which engine."""
