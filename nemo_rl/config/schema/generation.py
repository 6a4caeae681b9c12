"""Section `policy.generation`: how answers are sampled, and by which engine."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nemo_rl.config.schema.base import PositiveInt, Section, Share, conflict


class ResourcesConfig(Section):
    """GPUs set aside for generation."""

    gpus_per_node: PositiveInt | None = None
    """GPUs of every generation node."""

    num_nodes: PositiveInt | None = None
    """Nodes that only generate; None takes the GPUs from the training nodes."""


class ColocatedConfig(Section):
    """Whether generation shares the hardware of training."""

    enabled: bool = True
    """Generate on the training hardware, one after the other."""

    resources: ResourcesConfig = ResourcesConfig()
    """The hardware of generation when it is not shared."""

    @model_validator(mode="after")
    def _says_where(self) -> Self:
        if not self.enabled and self.resources.gpus_per_node is None:
            raise conflict(
                "generation is not colocated and has no GPUs of its own: set resources.gpus_per_node",
                "enabled",
                "resources.gpus_per_node",
            )
        return self


class GenerationConfig(Section):
    """How answers are sampled; of a model's own generation config nothing but the end tokens is read.

    The policy's log-probabilities are those of the distribution sampled from: temperature, `top_k`, `top_p` and `min_p`
    are applied to them too, and a token stays in it that was sampled before the weights moved.
    """

    max_new_tokens: PositiveInt
    """Longest answer in tokens."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits before sampling; validation is always greedy."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the fewest tokens whose probability reaches this; 1 keeps all."""

    top_k: PositiveInt | None = None
    """Sample from this many of the most likely tokens; None keeps all."""

    min_p: Share = 0.0
    """Drop tokens less likely than this share of the most likely one; 0 keeps all."""

    stop_token_ids: Annotated[tuple[int, ...], Field(strict=False)] | None = None
    """Tokens that end an answer besides the model's own end tokens."""

    stop_strings: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """Texts that end an answer."""

    colocated: ColocatedConfig = ColocatedConfig()
    """Whether generation shares the hardware of training."""


class HFGenerationConfig(GenerationConfig):
    """Samples in the training process from the very weights that are trained, without a copy."""

    backend: Literal["hf"]
    """The engine."""

    max_batch_size: PositiveInt = 64
    """Answers sampled side by side."""


class VLLMEngineConfig(Section):
    """The vLLM engine."""

    tensor_parallel_size: PositiveInt = 1
    """GPUs that share one copy of the model."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of every GPU's memory that the engine takes."""

    max_model_len: PositiveInt | None = None
    """Longest sequence in tokens; None is `policy.max_total_sequence_length`."""

    enforce_eager: bool = False
    """Leave CUDA graphs out: starts faster, generates slower."""

    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Number format of the engine's weights."""


class VLLMGenerationConfig(GenerationConfig):
    """Samples with vLLM."""

    backend: Literal["vllm"]
    """The engine."""

    vllm_cfg: VLLMEngineConfig = VLLMEngineConfig()
    """The vLLM engine."""


type GenerationSpec = Annotated[HFGenerationConfig | VLLMGenerationConfig, Field(discriminator="backend")]
