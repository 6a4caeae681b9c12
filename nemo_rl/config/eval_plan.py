"""`--dry-run` of an evaluation: what is sampled and what memory it needs, worked out without loading a model."""

from nemo_rl.config.model_shapes import ModelShape, model_shape
from nemo_rl.config.plan import Rows, size
from nemo_rl.config.schema.evaluation import EvalConfig


def render_eval_plan(config: EvalConfig) -> str:
    """The plan of the sampling and the memory estimate as text."""
    parts = [
        ("sampling plan", _sampling_rows(config)),
        ("memory estimate", _memory_rows(config, model_shape(config.generation.model_name))),
    ]
    return "\n\n".join(f"{title}\n" + "\n".join(f"  {name:<26}{text}" for name, text in rows) for title, rows in parts)


def _sampling_rows(config: EvalConfig) -> Rows:
    measure, generation, cluster = config.eval, config.generation, config.cluster
    gpus = f"{cluster.num_nodes} x {cluster.gpus_per_node} GPU(s)" if cluster.gpus_per_node else "no GPU asked for"
    if generation.backend == "hf" and cluster.num_nodes * cluster.gpus_per_node > 1:
        gpus += ", of which hf uses one"
    length = generation.vllm_cfg.max_model_len
    return [
        ("problems", f"{config.data.dataset_name}, judged by {config.judge}"),
        ("answers", f"{measure.num_tests_per_prompt:,} a problem, for {measure.metric} with k = {measure.k_value}"),
        (
            "longest answer",
            f"{min(generation.max_new_tokens or length, length):,} tokens, of {length:,} with its prompt",
        ),
        ("placement", f"{cluster.executor} executor, {gpus}"),
    ]


def _memory_rows(config: EvalConfig, shape: ModelShape | None) -> Rows:
    generation, engine = config.generation, config.generation.vllm_cfg
    if shape is None:
        return [("model", f"{generation.model_name}: size unknown, its config.json is not on this machine")]
    rows = [("model", f"{generation.model_name}: {shape.parameters:,} parameters, {engine.precision}")]
    stored = 2 if engine.precision == "bfloat16" or (engine.precision == "auto" and config.cluster.gpus_per_node) else 4
    rows.append(("weights", size(stored * shape.parameters)))
    if generation.backend == "vllm":
        graphs = "without" if engine.enforce_eager else "with"
        share = f"{engine.gpu_memory_utilization:.0%} of each of {engine.tensor_parallel_size} GPU(s)"
        return [
            *rows,
            ("vLLM takes", f"{share}, {graphs} CUDA graphs, sequences of up to {engine.max_model_len:,} tokens"),
        ]
    tokens = generation.max_batch_size * engine.max_model_len
    return [*rows, ("KV cache", f"{size(stored * tokens * shape.kv_elements_per_token)} at most")]
