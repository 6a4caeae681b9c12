"""Sections `policy` (and `teacher`, which has the same keys) and `policy.generation`."""

from functools import partial
from typing import Any

from nemo_rl.config.nemo.actions import (
    NOTHING,
    Action,
    Config,
    Convert,
    Ignore,
    Keep,
    Off,
    Only,
    Refuse,
    Rename,
    Set,
    Table,
)

_ONE_PROCESS = "this model is not trained, and one process computes with it"
_ONE_ENGINE = "this version splits the engine by tensor_parallel_size alone: set it to 1"
_ON_DEVICE = "parameters stay on the device: lower train_mb_tokens if memory is short"
_KEPT = "activations are kept: lower train_mb_tokens if memory is short"
_HEAD_IS_KEPT = "every linear layer gets an adapter but the head, which keeps its weights here"
_JAGGED = "no sequence is padded here, so there is no length to round"
_PASS_THROUGH = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def policy_keys(root: str) -> Table:
    """The table of one policy, whose section is called `root`."""
    keys: dict[str, Action] = {
        "tokenizer_name": Rename(f"{root}.tokenizer.name"),
        "hf_config_overrides": Only((None, {}), Refuse("a model runs with its own config.json: change it there")),
        "train_micro_batch_size": Convert(partial(_token_budget, root, "train_mb_tokens")),
        "logprob_batch_size": Convert(partial(_token_budget, root, "logprob_mb_tokens")),
        "generation_batch_size": Convert(partial(_side_by_side, root)),
        "max_total_sequence_length": Convert(partial(_room_for_answers, root)),
        "logprob_chunk_size": Only((None,), Keep()),
        "scheduler": Only((None,), Keep()),
        "make_sequence_length_divisible_by": Only((1,), Ignore(_JAGGED)),
        "offload_optimizer_for_logprob": Only((False,), Ignore("the optimizer stays on its device here")),
        "refit_buffer_size_gb": Ignore("weights reach the sampler without a buffer of a set size"),
        "fsdp_offload_enabled": Only((False,), Ignore(_ON_DEVICE)),
        "activation_checkpointing_enabled": Only((False,), Ignore(_KEPT)),
        "reward_model_cfg.enabled": NOTHING,
        "reward_model_cfg.reward_model_type": Only(("bradley_terry",), Refuse("only bradley_terry is known")),
        "megatron_cfg": Off(
            Refuse(f"this version trains with PyTorch: set enabled to false and give {root}.optimizer and scheduler")
        ),
    }
    keys |= _tokenizer_keys(f"{root}.tokenizer", "tokenizer")
    all_linear = f"{root}.dtensor_cfg.lora_cfg.match_all_linear"
    keys["dtensor_cfg.lora_cfg.match_all_linear"] = Only((False,), Set({all_linear: True}, note=_HEAD_IS_KEPT))
    keys |= _spread(root) | _dynamic_batching(root) | _sequence_packing(root)
    own = {f"{root}.{name}": action for name, action in keys.items()}
    return {**own, **generation_keys(f"{root}.generation", root)}


def _tokenizer_keys(section: str, prefix: str) -> dict[str, Action]:
    return {
        f"{prefix}.chat_template": Convert(partial(_chat_template, section)),
        f"{prefix}.chat_template_kwargs": Only(
            (None, {}), Refuse(f"write the choice into {section}.chat_template, which takes no arguments here")
        ),
        f"{prefix}.use_processor": Only((False, None), Refuse("this version trains on text alone")),
        f"{prefix}.audio": Only((None, {}), Refuse("this version trains on text alone")),
        f"{prefix}.video": Only((None, {}), Refuse("this version trains on text alone")),
    }


def tokenizer_keys(section: str) -> Table:
    """The table of a tokenizer's section."""
    return _tokenizer_keys(section, section)


_DTENSOR: dict[str, Action] = {
    f"dtensor_cfg.{name}": action
    for name, action in {
        "enabled": NOTHING,
        "_v2": NOTHING,
        "cpu_offload": Only((False,), Ignore(_ON_DEVICE)),
        "activation_checkpointing": Only((False,), Ignore(_KEPT)),
        "defer_fsdp_grad_sync": Ignore("gradients are summed over the ranks as they come"),
        "moe_parallelizer": Only((None, {}), Ignore("experts are spread by expert_parallel_size alone")),
        "clear_cache_every_n_steps": Only((None,), Ignore("the allocator's cache is left alone")),
        "env_vars": Only((None, {}), Ignore("set environment variables before the command")),
        "automodel_kwargs": Only((None, {}), Ignore("models are those of Transformers")),
        "lora_cfg": Off(),
        "lora_cfg.use_triton": Only((False,), Ignore("adapters are plain matrix products, which changes no result")),
    }.items()
}
_SIZES = ("tensor_parallel_size", "context_parallel_size", "expert_parallel_size")
_TENSOR_PARALLEL = ("sequence_parallel", "custom_parallel_plan")


def _spread(root: str) -> dict[str, Action]:
    """The keys of `dtensor_cfg` that say how a model is spread over ranks."""
    if root != "policy":  # not trained
        alone: dict[str, Action] = {name: Only((1,), Ignore(_ONE_PROCESS)) for name in _SIZES}
        alone |= {name: Only((False, None), Ignore(_ONE_PROCESS)) for name in _TENSOR_PARALLEL}
        return _DTENSOR | {f"dtensor_cfg.{name}": action for name, action in alone.items()}
    kept: dict[str, Action] = {name: Only((1,), Keep()) for name in _SIZES}
    kept |= {name: Convert(partial(_with_tensor_parallelism, root)) for name in _TENSOR_PARALLEL}
    return _DTENSOR | {f"dtensor_cfg.{name}": action for name, action in kept.items()}


def _with_tensor_parallelism(root: str, value: Any, config: Config) -> Action | None:
    """NeMo RL lets it stand where no rank divides a layer."""
    if config.get(f"{root}.dtensor_cfg.tensor_parallel_size", 1) != 1:
        return Keep()
    return Ignore("it has a meaning with tensor parallelism alone") if value else NOTHING


def dtensor_keys(root: str) -> Table:
    """The table of a section `dtensor_cfg` inside of `root`."""
    return {f"{root}.{name}": action for name, action in _spread(root).items()}


def _batching(root: str, name: str) -> dict[str, Action]:
    return {
        f"{name}.enabled": NOTHING,
        f"{name}.train_mb_tokens": Rename(f"{root}.train_mb_tokens"),
        f"{name}.logprob_mb_tokens": Rename(f"{root}.logprob_mb_tokens"),
        f"{name}.sequence_length_round": Ignore(_JAGGED),
    }


def _dynamic_batching(root: str) -> dict[str, Action]:
    name = "dynamic_batching"
    own = {name: Off(), f"{name}.algorithm": Ignore("sequence_packing.algorithm fills micro-batches here")}
    return _batching(root, name) | own


def _sequence_packing(root: str) -> dict[str, Action]:
    name = "sequence_packing"
    own = {name: Convert(_unless_disabled), f"{name}.algorithm": Convert(partial(_packing, f"{root}.{name}.algorithm"))}
    return _batching(root, name) | own


def _unless_disabled(section: Any, _: Config) -> Action | None:
    """The section is one of today as well, where it has no switch."""
    return NOTHING if isinstance(section, dict) and section.get("enabled") is False else None


def _packing(key: str, algorithm: Any, _: Config) -> Action:
    if algorithm != "first_fit_shuffle":
        return Keep()
    return Set({key: "first_fit_decreasing"}, "nothing is left to chance here, so first_fit_decreasing packs")


def generation_keys(section: str, policy: str | None = None) -> Table:
    """The table of a section `generation`.

    Args:
        section: its dotted name.
        policy: name of the policy around it; None where it stands alone, as in an evaluation.
    """
    keys: dict[str, Action] = {
        "top_k": Only((None, -1), Keep()),
        "bad_words": Only((None, []), Refuse("no word can be forbidden here")),
        "val_temperature": Ignore("validation is greedy"),
        "val_top_p": Ignore("validation is greedy"),
        "val_top_k": Ignore("validation is greedy"),
        "mcore_generation_config": NOTHING,  # of a backend that is not chosen
        "port_range_low": Ignore("ports are chosen by the system"),
        "port_range_high": Ignore("ports are chosen by the system"),
        "vllm_cfg": Convert(partial(_engine, section)),
        "vllm_kwargs": Only((None, {}), Refuse("the engine takes what vllm_cfg names: leave the others out")),
    }
    if policy is not None:
        keys["vllm_cfg.max_model_len"] = Convert(partial(_engine_length, policy))
    keys |= {f"vllm_cfg.{name}": action for name, action in _VLLM.items()}
    return {f"{section}.{name}": action for name, action in keys.items()}


_VLLM: Table = {
    "async_engine": Only((False,), Ignore("the engine is called synchronously, which gives the same answers")),
    "kv_cache_dtype": Only(("auto",), Refuse("the cache has the precision of the engine: set it to auto")),
    "pipeline_parallel_size": Only((1,), Refuse(_ONE_ENGINE)),
    "expert_parallel_size": Only((1,), Refuse(_ONE_ENGINE)),
    "enable_expert_parallel": Only((False,), Refuse("experts are not spread here: set it to false")),
    "use_deep_gemm": Only((False,), Ignore("no FP8 kernels are used")),
    "num_first_layers_in_bf16": Only((0,), Ignore("no FP8 kernels are used")),
    "num_last_layers_in_bf16": Only((0,), Ignore("no FP8 kernels are used")),
    "load_format": Only(("auto", "dummy"), Ignore("the engine gets its weights from the policy")),
    "logprobs_mode": Only(("processed_logprobs",), Ignore("log-probabilities are those of the sampled distribution")),
    "skip_tokenizer_init": NOTHING,
    "enable_vllm_metrics_logger": Only((False,), Ignore("the engine's own metrics are not recorded")),
    "vllm_metrics_logger_interval": NOTHING,
    "distributed_executor_backend": Only((None,), Ignore("the engine chooses it")),
    "refit_with_reload_api": Only((False,), Ignore("how weights reach the engine is not a setting")),
    "use_tqdm": Ignore("progress is shown by the run"),
    "env_vars": Only((None, {}), Ignore("set environment variables before the command")),
    "expose_http_server": Only((False,), Refuse("this version does not serve the policy: set it to false")),
    "http_server_serving_chat_kwargs": Only((None, {}), Ignore("the policy is not served")),
    "tool_parser_plugin": Only((None,), Ignore("the policy is not served")),
    "reasoning_parser_plugin": Only((None,), Ignore("the policy is not served")),
}


def _token_budget(root: str, new: str, size: Any, config: Config) -> Action:
    """The tokens of so many rows of full length; a token budget of the configuration itself goes first."""
    for batching in ("sequence_packing", "dynamic_batching"):
        if config.get(f"{root}.{batching}.enabled") and config.get(f"{root}.{batching}.{new}"):
            return NOTHING
    total = config.get(f"{root}.max_total_sequence_length")
    if not isinstance(size, int) or not isinstance(total, int):
        return Refuse(f"its tokens are counted with {root}.max_total_sequence_length: give both as whole numbers")
    sequences = 2 * size if config.get("dpo") or config.get("rm") else size  # these count pairs
    return Set({f"{root}.{new}": sequences * total})


def _side_by_side(root: str, size: Any, config: Config) -> Action:
    is_hf = config.get(f"{root}.generation.backend") == "hf"
    return Set({f"{root}.generation.max_batch_size": size}) if is_hf else NOTHING


def _room_for_answers(root: str, total: Any, config: Config) -> Action | None:
    """NeMo RL cuts an answer where prompt and answer fill the total; here a prompt leaves room for a whole answer."""
    answer = config.get(f"{root}.generation.max_new_tokens")
    limit = config.get("data.max_input_seq_length")
    if not isinstance(total, int) or not isinstance(answer, int) or not isinstance(limit, int | None):
        return None
    prompt = limit or (total if answer >= total else total - answer)
    if prompt + answer <= total:
        return None
    return Set(
        {f"{root}.max_total_sequence_length": prompt + answer},
        note=f"{total} becomes {prompt + answer}, which holds a prompt of {prompt} (data.max_input_seq_length) and a"
        f" whole answer of {answer} tokens ({root}.generation.max_new_tokens): lower these two if that is too long",
    )


def _engine_length(policy: str, length: Any, config: Config) -> Action | None:
    return NOTHING if length == config.get(f"{policy}.max_total_sequence_length") else None


def _engine(section: str, _: Any, config: Config) -> Action | None:
    return NOTHING if config.get(f"{section}.backend") != "vllm" else None


def _chat_template(section: str, template: Any, _: Config) -> Action | None:
    match template:
        case "default":
            return NOTHING
        case None:
            return Set({f"{section}.chat_template": _PASS_THROUGH})
        case _:
            return None
