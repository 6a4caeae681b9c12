"""`--dry-run`: what a step computes and what memory it needs, worked out without loading a model."""

import math
from dataclasses import dataclass

from nemo_rl.config.model_shapes import ModelShape, model_shape
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.config.schema.distillation import TaughtRunConfig
from nemo_rl.config.schema.generation import HFGenerationConfig
from nemo_rl.config.schema.policy import ModelConfig, OptimizerConfig, TrainedPolicyConfig
from nemo_rl.config.schema.ppo import PPOConfig
from nemo_rl.config.schema.preference import DPOConfig
from nemo_rl.config.schema.run import RunConfig
from nemo_rl.config.schema.sampled import SampledRunConfig

type Rows = list[tuple[str, str]]

_FLOAT32 = 4


def render_plan(config: RunConfig) -> str:
    """The batch plan and the memory estimate as text."""
    shape = model_shape(config.policy.model_name)
    if isinstance(config, SampledRunConfig):
        batch = ("batch plan, with prompts and answers of full length", batch_rows(config))
    else:
        batch = ("batch plan", example_rows(config))
    parts = [
        batch,
        ("memory estimate", memory_rows(config, shape)),
    ]
    return "\n\n".join(f"{title}\n" + "\n".join(f"  {name:<26}{text}" for name, text in rows) for title, rows in parts)


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Token counts of one step whose prompts and answers are all as long as allowed and all move a weight.

    Attributes:
        generated: sampled tokens.
        padded: tokens of all rollouts, each with a prompt of its own.
        computed: tokens that training computes, a shared prompt counted once in every micro-batch that holds it.
        microbatches: micro-batches of one optimizer step.
        largest: tokens of the largest micro-batch.
    """

    generated: int
    padded: int
    computed: int
    microbatches: int
    largest: int


def batch_plan(config: SampledRunConfig) -> BatchPlan:
    """Count the tokens of one step as `data.micro_batches` cuts them.

    A group stays whole where it fits. Of a group that does not, only what is left over has room for others: it meets
    other leftovers, unless the order of the batch is kept.
    """
    policy, answers = config.policy, config.loop.num_generations_per_prompt
    prompt, answer = config.max_prompt_tokens, policy.generation.max_new_tokens
    shares = policy.share_prefixes and prompt >= policy.min_shared_prefix

    def cost(sequences: int) -> int:  # the last token of an answer is predicted, but predicts nothing
        return prompt * (1 if shares else sequences) + (answer - 1) * sequences

    budget = policy.train_mb_tokens
    fitting = max((size for size in range(1, answers + 1) if cost(size) <= budget), default=1)
    whole, left = divmod(answers, fitting)
    groups = policy.train_global_batch_size // answers
    together = 1 if left or whole > 1 else max(1, budget // cost(fitting))
    kinds = [(groups * whole, together, cost(fitting))]  # number of parts, how many in a micro-batch, tokens of each
    if left:
        in_order = policy.sequence_packing.algorithm == "concatenative"
        kinds.append((groups, 1 if in_order else max(1, budget // cost(left)), cost(left)))
    return BatchPlan(
        generated=config.num_rollouts_per_step * answer,
        padded=config.num_rollouts_per_step * (prompt + answer),
        computed=config.num_updates_per_step * sum(parts * tokens for parts, _, tokens in kinds),
        microbatches=sum(-(-parts // number) for parts, number, _ in kinds),
        largest=max(min(parts, number) * tokens for parts, number, tokens in kinds),
    )


def batch_rows(config: SampledRunConfig) -> Rows:
    """The sizes of one step as text."""
    loop, policy, plan = config.loop, config.policy, batch_plan(config)
    updates, passes = config.num_updates_per_step, config.num_passes_per_step
    on_policy = "on-policy" if updates == 1 else f"{policy.train_global_batch_size} rollouts each"
    return [
        ("steps", f"{loop.max_num_steps:,}"),
        ("prompts per step", f"{loop.num_prompts_per_step:,}"),
        ("rollouts per step", f"{config.num_rollouts_per_step:,} ({loop.num_generations_per_prompt} answers a prompt)"),
        ("optimizer steps per step", f"{updates:,} ({on_policy})"),
        ("micro-batches", f"{plan.microbatches:,} per optimizer step, of up to {plan.largest:,} tokens"),
        ("generated per step", f"{plan.generated:,} tokens ({policy.generation.max_new_tokens:,} an answer)"),
        ("trained per step", f"{passes * plan.computed:,} tokens computed, {passes * plan.padded:,} as padded rows"),
        *_dynamic_sampling_row(config),
        *_critic_row(config),
        ("placement", _placement(config)),
    ]


def _dynamic_sampling_row(config: SampledRunConfig) -> Rows:
    rule = config.grpo.dynamic_sampling if isinstance(config, GRPOConfig) else None
    if rule is None:
        return []
    return [("dynamic sampling", f"up to {rule.max_tries} rounds of {config.num_prompts_per_draw:,} prompts a step")]


def _critic_row(config: SampledRunConfig) -> Rows:
    if not isinstance(config, PPOConfig):
        return []
    if config.critic is None:
        return [("critic", "on the policy's trunk, in the same passes")]
    size = config.critic.train_global_batch_size
    updates = config.num_critic_passes_per_step * config.num_rollouts_per_step // size
    return [("critic", f"a model of its own, {updates:,} optimizer steps per step of {size:,} rollouts each")]


def example_rows(config: RunConfig) -> Rows:
    """The sizes of one step of a run that learns from given answers, as text."""
    policy, loop = config.policy, config.loop
    return [
        ("steps", f"{loop.max_num_steps:,}"),
        ("records per step", f"{policy.train_global_batch_size:,} in one optimizer step"),
        ("micro-batches", f"of up to {policy.train_mb_tokens:,} tokens, as they fit"),
        ("placement", _placement(config)),
    ]


def memory_rows(config: RunConfig, shape: ModelShape | None) -> Rows:
    """Bytes by part, for one rank of the model, as text; an estimate for people, not a limit."""
    policy = config.policy
    if shape is None:
        return [("model", f"{policy.model_name}: size unknown, its config.json is not on this machine")]
    parts, resting = memory_bytes(config, shape), host_bytes(config, shape)
    unknown: Rows = []
    for label, section in _other_models(config).items():
        other = model_shape(section.model_name)
        if other is None:
            unknown.append((label, f"{section.model_name}: size unknown, its config.json is not on this machine"))
        else:
            held = _weight_bytes(section, other, config)
            parts |= {f"{label}'s {name}": count for name, count in held.items() if count}
    rows = [("model", f"{policy.model_name}: {shape.parameters:,} parameters, {policy.precision}")]
    rows += [(name, size(count)) for name, count in parts.items()]
    rows += [*unknown, ("sum", size(sum(parts.values()) - _taking_turns(config, parts)))]
    rows += [("on the CPU", f"{size(resting)} of them and others")] if resting else []
    if isinstance(config, SampledRunConfig) and not isinstance(config.policy.generation, HFGenerationConfig):
        engine = config.policy.generation.vllm_cfg
        length = engine.max_model_len or policy.max_total_sequence_length
        graphs = "without" if engine.enforce_eager else "with"
        text = (
            f"{engine.gpu_memory_utilization:.0%} of each of {engine.tensor_parallel_size} GPU(s), {engine.precision}"
        )
        rows.append(("vLLM takes", f"{text}, {graphs} CUDA graphs, sequences of up to {length:,} tokens"))
    return rows


def memory_bytes(config: RunConfig, shape: ModelShape) -> dict[str, int]:
    """Bytes by part of one rank that trains and, with `hf` generation, samples; a vLLM engine is not in it."""
    policy, spread = config.policy, config.policy.dtensor_cfg
    largest = batch_plan(config).largest if isinstance(config, SampledRunConfig) else policy.train_mb_tokens
    stored, computed = _number_sizes(policy, config)
    rows = min(largest, policy.head_rows(shape.vocab, on_gpu=bool(config.cluster.gpus_per_node)))
    parts = {
        **_weight_bytes(policy, shape, config),
        "reference weights": 0 if _rests(config, policy.reference_on_cpu) else _reference_bytes(config, shape),
        "activations": computed
        * largest
        * shape.activation_elements_per_token(spread.activation_checkpointing)
        // spread.context_parallel_size,  # a first pipeline stage holds as many micro-batches as there are stages
        "logits of one chunk": (computed + 2 * _FLOAT32) * rows * shape.vocab,
    }
    if isinstance(config, SampledRunConfig) and isinstance(config.policy.generation, HFGenerationConfig):
        generation, num_ranks = config.policy.generation, config.cluster.num_ranks
        sequences = min(generation.max_batch_size, -(-config.num_rollouts_per_step // num_ranks))
        parts["weights of the sampler"] = stored * shape.parameters if num_ranks > 1 else 0
        tokens = sequences * (config.max_prompt_tokens + generation.max_new_tokens)
        parts["KV cache"] = computed * tokens * shape.kv_elements_per_token
    return {name: count for name, count in parts.items() if count}


def host_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Bytes that a rank with a GPU keeps in CPU memory, at some time or always."""
    policy = config.policy
    held = _held_bytes(policy, shape, config)
    offloaded = _rests(config, policy.dtensor_cfg.cpu_offload)
    resting = sum(held.values()) if offloaded else 0
    if not offloaded and _rests(config, policy.offload_optimizer_for_logprob):
        resting = sum(held[name] for name in _optimizer_parts(config))
    return resting + (_reference_bytes(config, shape) if _rests(config, policy.reference_on_cpu) else 0)


def _rests(config: RunConfig, wanted: bool) -> bool:
    """Whether something is kept on the CPU, apart from the device."""
    return wanted and config.cluster.gpus_per_node > 0


def _reference_bytes(config: RunConfig, shape: ModelShape) -> int:
    if not _has_reference(config):
        return 0
    stored = _number_sizes(config.policy, config)[0]
    whole = _FLOAT32 * _adapter_parameters(config.policy, shape) or stored * shape.parameters
    return whole // _weight_parts(config.policy, config)


def _optimizer_parts(config: RunConfig) -> tuple[str, ...]:
    """What only an optimizer step reads; the masters of a sharded model are its weights."""
    return ("optimizer moments",) if _is_sharded(config.policy, config) else ("optimizer moments", "master weights")


def _taking_turns(config: RunConfig, parts: dict[str, int]) -> int:
    """Bytes of the cache of samples for which the optimizer makes room."""
    if not _rests(config, config.policy.offload_optimizer_for_logprob):
        return 0
    return min(parts.get("KV cache", 0), sum(parts.get(name, 0) for name in _optimizer_parts(config)))


def _number_sizes(model: ModelConfig, config: RunConfig) -> tuple[int, int]:
    """Bytes of a weight, and of a number that is computed with."""
    precision = model.precision
    if precision == "auto":  # what the hardware will make of it is not known here
        precision = "bfloat16" if config.cluster.gpus_per_node else "float32"
    return 2 if precision == "bfloat16" else _FLOAT32, _FLOAT32 if precision == "float32" else 2


def _weight_bytes(model: ModelConfig, shape: ModelShape, config: RunConfig) -> dict[str, int]:
    """Bytes of what a rank holds of a model on its device: all of it, or the layers it is computing with."""
    if isinstance(model, TrainedPolicyConfig) and _rests(config, model.dtensor_cfg.cpu_offload):
        outside = shape.parameters - shape.layers * shape.layer_parameters
        at_work = (2 * shape.layer_parameters + outside) // model.dtensor_cfg.tensor_parallel_size
        return {"weights at work": _number_sizes(model, config)[0] * at_work}
    return _held_bytes(model, shape, config)


def _held_bytes(model: ModelConfig, shape: ModelShape, config: RunConfig) -> dict[str, int]:
    """Bytes of the weights that a rank holds of a model, and of what training keeps beside them."""
    stored = _number_sizes(model, config)[0]
    if not isinstance(model, TrainedPolicyConfig):
        return {"weights": stored * shape.parameters}
    adapters = _adapter_parameters(model, shape)
    trained = adapters or shape.parameters
    if _is_sharded(model, config) and not adapters:
        stored = _FLOAT32  # such weights are their own masters
    compressed = shape.linear_parameters * _BITS[model.dtensor_cfg.lora_cfg.quantize] // 8
    plain = shape.parameters - (shape.linear_parameters if compressed else 0)
    parts = {
        "weights": stored * plain + compressed,
        "adapters": _FLOAT32 * adapters,
        "master weights": _FLOAT32 * trained if stored < _FLOAT32 and not adapters else 0,
        "gradients": _FLOAT32 * trained,
        "optimizer moments": _FLOAT32 * _moments(model.optimizer) * trained,
    }
    return {name: count // _weight_parts(model, config) for name, count in parts.items()}


_BITS = {"none": 0, "nf4": 4, "int8": 8}
"""Of a number in a quantized linear layer; its scales are a few hundredths of that."""


def _adapter_parameters(model: TrainedPolicyConfig, shape: ModelShape) -> int:
    """Numbers in the adapters, which are float32 and trained alone; 0 where all weights are trained."""
    lora = model.dtensor_cfg.lora_cfg
    adapted = (sizes for name, sizes in shape.linears.items() if lora.enabled and lora.adapts(name))
    return sum(lora.dim * (inputs + outputs) for inputs, outputs in adapted)


def _is_sharded(model: TrainedPolicyConfig, config: RunConfig) -> bool:
    """Whether FSDP holds the weights."""
    spread = model.dtensor_cfg
    return config.cluster.num_ranks > spread.pipeline_parallel_size or _rests(config, spread.cpu_offload)


def _weight_parts(model: ModelConfig, config: RunConfig) -> int:
    """Ranks that divide the weights of a model among them."""
    if not isinstance(model, TrainedPolicyConfig):
        return 1
    return max(1, config.cluster.num_ranks // model.dtensor_cfg.data_parallel_replicate_size)


def _other_models(config: RunConfig) -> dict[str, ModelConfig]:
    """The models of a run besides the policy, by what they are called."""
    match config:
        case PPOConfig(critic=TrainedPolicyConfig() as critic):
            return {"critic": critic}
        case TaughtRunConfig():
            named = {section: name for name, section in config.teacher_sections.items()}
            return {name: section for section, name in named.items()}
        case _:
            return {}


def size(count: int) -> str:
    """Bytes for people: `1.5 GB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def _moments(optimizer: OptimizerConfig) -> int:
    """Float32 numbers an optimizer keeps per parameter: none for plain SGD, one with momentum, two as Adam."""
    if optimizer.name.endswith(".SGD"):
        return 1 if optimizer.kwargs.get("momentum") else 0
    return 2


def _has_reference(config: RunConfig) -> bool:
    """Whether the starting weights are kept."""
    match config:
        case GRPOConfig() | PPOConfig():
            return config.loss_fn.reference_policy_kl_penalty > 0
        case DPOConfig():
            return config.dpo.needs_reference
        case _:
            return False


def _placement(config: RunConfig) -> str:
    cluster = config.cluster
    gpus = f"{cluster.num_nodes} x {cluster.gpus_per_node} GPU(s)" if cluster.gpus_per_node else "no GPU asked for"
    where = f"{cluster.executor} executor, {gpus}{_ranks(config)}"
    if not isinstance(config, SampledRunConfig):
        return where
    colocated = config.policy.generation.colocated
    if colocated.enabled:
        return f"{where}, generation shares them"
    nodes = f" on {colocated.resources.num_nodes} node(s) of its own" if colocated.resources.num_nodes else ""
    return f"{where}, {colocated.resources.gpus_per_node} GPU(s) for generation{nodes}"


def _ranks(config: RunConfig) -> str:
    """The ranks of the policy and what they divide, where there are several."""
    num_ranks, spread = config.cluster.num_ranks, config.policy.dtensor_cfg
    if num_ranks == 1:
        return ""
    sizes = {
        "pipeline": spread.pipeline_parallel_size,
        "replicate": spread.data_parallel_replicate_size,
        "context": spread.context_parallel_size,
        "tensor": spread.tensor_parallel_size,
    }
    sizes["shard"] = num_ranks // math.prod(sizes.values())
    return f", {num_ranks} ranks ({' x '.join(f'{name} {size}' for name, size in sizes.items() if size > 1)})"
