"""`--dry-run`: what a step computes and what memory it needs, worked out without loading a model."""

from dataclasses import dataclass

from nemo_rl.config.model_shapes import ModelShape, model_shape
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.config.schema.generation import HFGenerationConfig
from nemo_rl.config.schema.policy import OptimizerConfig

type Rows = list[tuple[str, str]]

_FLOAT32 = 4


def render_plan(config: GRPOConfig) -> str:
    """The batch plan and the memory estimate as text."""
    shape = model_shape(config.policy.model_name)
    parts = [("batch plan", batch_rows(config)), ("memory estimate", memory_rows(config, shape))]
    return "\n\n".join(f"{title}\n" + "\n".join(f"  {name:<26}{text}" for name, text in rows) for title, rows in parts)


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Token counts of one step, reached when every prompt and answer is as long as allowed.

    Attributes:
        generated: sampled tokens.
        padded: tokens of all rollouts, each with a prompt of its own.
        computed: tokens that training computes, shared prompts counted once.
        minibatches: optimizer steps.
        microbatches: micro-batches of one optimizer step.
    """

    generated: int
    padded: int
    computed: int
    minibatches: int
    microbatches: int


def batch_plan(config: GRPOConfig) -> BatchPlan:
    """Count the tokens of one step."""
    policy, rollouts = config.policy, config.num_rollouts_per_step
    generated = rollouts * policy.generation.max_new_tokens
    padded = rollouts * config.max_prompt_tokens + generated
    shared = config.grpo.num_prompts_per_step * config.max_prompt_tokens + generated
    computed = shared if policy.share_prefixes else padded
    minibatches = rollouts // policy.train_global_batch_size
    return BatchPlan(generated, padded, computed, minibatches, -(-computed // minibatches // policy.train_mb_tokens))


def batch_rows(config: GRPOConfig) -> Rows:
    """The sizes of one step as text."""
    grpo, policy, plan = config.grpo, config.policy, batch_plan(config)
    on_policy = "on-policy" if plan.minibatches == 1 else f"{policy.train_global_batch_size} rollouts each"
    return [
        ("steps", f"{grpo.max_num_steps:,}"),
        ("prompts per step", f"{grpo.num_prompts_per_step:,}"),
        ("rollouts per step", f"{config.num_rollouts_per_step:,} ({grpo.num_generations_per_prompt} answers a prompt)"),
        ("optimizer steps per step", f"{plan.minibatches:,} ({on_policy})"),
        ("micro-batches", f"at most {plan.microbatches:,} per optimizer step, of {policy.train_mb_tokens:,} tokens"),
        ("generated per step", f"at most {plan.generated:,} tokens ({policy.generation.max_new_tokens:,} an answer)"),
        ("trained per step", f"at most {plan.computed:,} tokens computed, {plan.padded:,} if no prompt were shared"),
        ("placement", _placement(config)),
    ]


def memory_rows(config: GRPOConfig, shape: ModelShape | None) -> Rows:
    """Bytes by part, for one copy of the model, as text; an estimate for people, not a limit."""
    policy = config.policy
    if shape is None:
        return [("model", f"{policy.model_name}: size unknown, its config.json is not on this machine")]
    parts = memory_bytes(config, shape)
    rows = [("model", f"{policy.model_name}: {shape.parameters:,} parameters, {policy.precision}")]
    rows += [(name, size(count)) for name, count in parts.items()]
    rows.append(("sum", size(sum(parts.values()))))
    if not isinstance(policy.generation, HFGenerationConfig):
        engine = policy.generation.vllm_cfg
        length = engine.max_model_len or policy.max_total_sequence_length
        graphs = "without" if engine.enforce_eager else "with"
        text = (
            f"{engine.gpu_memory_utilization:.0%} of each of {engine.tensor_parallel_size} GPU(s), {engine.precision}"
        )
        rows.append(("vLLM takes", f"{text}, {graphs} CUDA graphs, sequences of up to {length:,} tokens"))
    return rows


def memory_bytes(config: GRPOConfig, shape: ModelShape) -> dict[str, int]:
    """Bytes by part of one copy that trains and, with `hf` generation, samples; a vLLM engine is not in it."""
    policy, plan, parameters = config.policy, batch_plan(config), shape.parameters
    stored = 2 if policy.precision == "bfloat16" else _FLOAT32
    computed = _FLOAT32 if policy.precision == "float32" else 2
    trained_tokens = min(policy.train_mb_tokens, plan.computed // plan.minibatches)
    parts = {
        "weights": stored * parameters,
        "reference weights": stored * parameters if config.loss_fn.reference_policy_kl_penalty else 0,
        "master weights": _FLOAT32 * parameters if stored < _FLOAT32 else 0,
        "gradients": _FLOAT32 * parameters,
        "optimizer moments": _FLOAT32 * _moments(policy.optimizer) * parameters,
        "activations": computed * trained_tokens * shape.activation_elements_per_token,
        "logits of one chunk": (computed + 2 * _FLOAT32) * policy.logprob_chunk_size * shape.vocab,
    }
    if isinstance(policy.generation, HFGenerationConfig):
        sequences = min(policy.generation.max_batch_size, config.num_rollouts_per_step)
        tokens = sequences * (config.max_prompt_tokens + policy.generation.max_new_tokens)
        parts["KV cache"] = computed * tokens * shape.kv_elements_per_token
    return {name: count for name, count in parts.items() if count}


def size(count: int) -> str:
    """Bytes for people: `1.5 GB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def _moments(optimizer: OptimizerConfig) -> int:
    """Float32 numbers an optimizer keeps per parameter: none for plain SGD, one with momentum, two as Adam."""
    if optimizer.name.endswith(".SGD"):
        return 1 if optimizer.kwargs.get("momentum") else 0
    return 2


def _placement(config: GRPOConfig) -> str:
    cluster, colocated = config.cluster, config.policy.generation.colocated
    gpus = f"{cluster.num_nodes} x {cluster.gpus_per_node} GPU(s)" if cluster.gpus_per_node else "no GPU asked for"
    if colocated.enabled:
        return f"{cluster.executor} executor, {gpus}, generation shares them"
    nodes = f" on {colocated.resources.num_nodes} node(s) of its own" if colocated.resources.num_nodes else ""
    return f"{cluster.executor} executor, {gpus}, {colocated.resources.gpus_per_node} GPU(s) for generation{nodes}"
