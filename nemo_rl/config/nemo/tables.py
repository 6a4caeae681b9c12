"""The tables of each algorithm: NeMo RL's own sections, and those that all of them share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nemo_rl.config.nemo.actions import NOTHING, Action, Config, Convert, Ignore, Keep, Off, Only, Refuse, Set, Table
from nemo_rl.config.nemo.data_keys import data_keys
from nemo_rl.config.nemo.policy_keys import generation_keys, policy_keys, tokenizer_keys
from nemo_rl.config.nemo.run_keys import CLUSTER, ENVIRONMENTS, RUN


@dataclass(frozen=True, slots=True)
class Dialect:
    """NeMo RL's YAML for one algorithm.

    Attributes:
        table: what becomes of its keys; one that is not in it keeps its place if the schema has it.
        like: sections that have the keys of another one, e.g. `teacher` those of `policy`.
    """

    table: Table
    like: Mapping[str, str] = field(default_factory=dict[str, str])


_UNLIMITED = 1_000_000
"""NeMo RL's GRPO recipes write this for no limit, its others write -1."""


def _limit(key: str, limit: Any, _: Config) -> Action | None:
    return Set({key: _UNLIMITED}) if limit is None or limit == -1 else None


def _samples(section: str, batches: Any, config: Config) -> Action:
    """Validation batches of a set size as a number of samples."""
    size = config.get(f"{section}.val_global_batch_size", 1)
    if not isinstance(batches, int) or not isinstance(size, int):
        return Refuse("validation needs a number of batches and their size (val_global_batch_size)")
    return Set({f"{section}.max_val_samples": _UNLIMITED if batches == -1 else batches * size})


_ADVANTAGE_SWITCHES = ("normalize_rewards", "use_leave_one_out_baseline")


def _estimator(estimator: Any, _: Config) -> Action:
    """The advantages of v0.5; those of GRPO are two switches here."""
    if not isinstance(estimator, dict) or estimator.get("name", "grpo") != "grpo":
        return Refuse("this version has the advantages of GRPO alone: set name to grpo")
    return Set({f"grpo.{name}": estimator[name] for name in _ADVANTAGE_SWITCHES if name in estimator})


def _advantage_switch(name: str, _: Any, config: Config) -> Action | None:
    """The estimator goes before the switches of older versions."""
    return NOTHING if config.get(f"grpo.adv_estimator.{name}") is not None else None


_SAME_LENGTH = "validation is cut into micro-batches of training, which changes no figure"
_NOT_FILTERED = "no group is drawn again: set it to false"
_NOT_CORRECTED = "the sampler's log-probabilities are not corrected for: set it to"
_AS_SAMPLED = "rewards are those of the environment: set enabled to false"

_GRPO: Table = {
    "grpo.max_num_steps": Convert(partial(_limit, "grpo.max_num_steps")),
    "grpo.max_val_samples": Convert(partial(_limit, "grpo.max_val_samples")),
    "grpo.max_rollout_turns": Only((1, None), Refuse("a rollout has one turn: set it to 1")),
    "grpo.val_batch_size": Ignore("answers are sampled as many side by side as the engine takes"),
    "grpo.val_num_generations_per_prompt": Only((1,), Refuse("validation samples one greedy answer: set it to 1")),
    "grpo.num_val_generations_per_prompt": Only((1,), Refuse("validation samples one greedy answer: set it to 1")),
    "grpo.val_start_at": Only((-1, None), Refuse("validation begins with the run: set it to -1")),
    "grpo.use_dynamic_sampling": Only((False,), Refuse(_NOT_FILTERED)),
    "grpo.dynamic_sampling_max_gen_batches": NOTHING,  # use_dynamic_sampling says it
    "grpo.batch_multiplier": Only((1,), Refuse("as many prompts are sampled as are trained on: set it to 1")),
    "grpo.reward_shaping": Off(Refuse(_AS_SAMPLED)),
    "grpo.reward_scaling": Off(Refuse(_AS_SAMPLED)),
    "grpo.async_grpo": Off(Refuse("sampling and training take turns: set enabled to false")),
    "grpo.adv_estimator": Convert(_estimator),
    **{f"grpo.{name}": Convert(partial(_advantage_switch, name)) for name in _ADVANTAGE_SWITCHES},
    "grpo.advantage_clip_low": Only((None,), Refuse("advantages are not clipped: set it to null")),
    "grpo.advantage_clip_high": Only((None,), Refuse("advantages are not clipped: set it to null")),
    "grpo.seq_logprob_error_threshold": Only((None,), Refuse("no answer is masked: set it to null")),
    "grpo.skip_reference_policy_logprobs_calculation": Only(
        (False,), Ignore("the reference is computed only if loss_fn.reference_policy_kl_penalty is not 0")
    ),
    "grpo.calculate_advantages_on_gpu": Only((False,), Ignore("advantages are a few numbers a step")),
}

_GRPO_LOSS: Table = {
    "loss_fn.token_level_loss": Convert(
        lambda per_token, _: Set({"loss_fn.reduction": "token_mean" if per_token else "sequence_mean"})
    ),
    "loss_fn.kl_input_clamp_value": Convert(lambda bound, _: _unbounded("loss_fn.kl_input_clamp_value", bound)),
    "loss_fn.kl_output_clamp_value": Convert(lambda bound, _: _unbounded("loss_fn.kl_output_clamp_value", bound)),
    "loss_fn.use_on_policy_kl_approximation": Only(
        (False,), Refuse("the KL term is not weighted by the sampler's ratio: set it to false")
    ),
    "loss_fn.use_importance_sampling_correction": Only((False,), Refuse(f"{_NOT_CORRECTED} false")),
    "loss_fn.truncated_importance_sampling_ratio": Only((None,), Refuse(f"{_NOT_CORRECTED} null")),
    "loss_fn.truncated_importance_sampling_ratio_min": Only((None,), Refuse(f"{_NOT_CORRECTED} null")),
    "loss_fn.truncated_importance_sampling_type": NOTHING,  # truncated_importance_sampling_ratio says it
    "loss_fn.sequence_level_importance_ratios": Only((False,), Refuse("a ratio is a token's: set it to false")),
    "loss_fn.disable_ppo_ratio": Only((False,), Refuse("the loss is the clipped one: set it to false")),
    "loss_fn.force_on_policy_ratio": Only(
        (False,), Ignore("the ratio is 1 anyway in the first optimizer step after sampling")
    ),
    "loss_fn.use_kl_in_reward": Only((False,), Refuse("the KL term is part of the loss: set it to false")),
}


def _unbounded(key: str, bound: Any) -> Action | None:
    return Set({key: 1e9}) if bound is None else None


def _keep(section: str, *names: str) -> Table:
    return {f"{section}.{name}": Keep() for name in names}


def _supervised(section: str) -> Table:
    """What the loops over a fixed data set have in common."""
    return {
        **_keep(section, "max_num_epochs", "val_period", "val_at_start", "val_at_end", "seed"),
        f"{section}.max_num_steps": Convert(lambda steps, _: _limit(f"{section}.max_num_steps", steps, _) or Keep()),
        f"{section}.val_batches": Convert(partial(_samples, section)),
        f"{section}.val_global_batch_size": NOTHING,  # part of max_val_samples
        f"{section}.val_micro_batch_size": Ignore(_SAME_LENGTH),
    }


_SHARED: Table = {**policy_keys("policy"), **RUN}
_TASKS: Table = {**_SHARED, **data_keys("tasks"), **ENVIRONMENTS}
_EXAMPLES: Table = {**_SHARED, **data_keys("examples")}
_DPO: Table = {
    **_keep("dpo", "reference_policy_kl_penalty", "preference_average_log_probs", "sft_average_log_probs"),
    **_keep("dpo", "preference_loss_weight", "sft_loss_weight", "preference_loss"),
    "dpo.gt_reward_scale": Refuse("it belongs to the losses of RPO, which are not here: leave it out"),
}
_DISTILLATION: Table = {
    **_keep("distillation", "num_prompts_per_step", "num_generations_per_prompt", "max_num_steps", "max_num_epochs"),
    **_keep("distillation", "val_period", "val_at_start", "val_at_end", "max_val_samples", "topk_logits_k", "seed"),
    "distillation.max_rollout_turns": _GRPO["grpo.max_rollout_turns"],
    "distillation.val_batch_size": _GRPO["grpo.val_batch_size"],
    **_keep("loss_fn", "kl_type", "mixed_kl_weight", "zero_outside_topk"),
    **policy_keys("teacher"),
    "teacher.generation": Ignore("a teacher scores and samples nothing"),
}
_EVAL: Table = {
    **_keep("eval", "metric", "num_tests_per_prompt", "seed", "k_value", "save_path"),
    **generation_keys("generation"),
    **_keep("generation", "model_name"),
    "generation.colocated.enabled": Only((True,), Ignore("an evaluation has nothing to share GPUs with")),
    "generation.colocated.resources": NOTHING,  # colocated.enabled says it
    "generation.num_prompts_per_step": Ignore("answers are sampled as many side by side as the engine takes"),
    **tokenizer_keys("tokenizer"),
    **_keep("data", "dataset_name", "max_input_seq_length", "prompt_file", "system_prompt_file", "split"),
    "data.repeat": Only((1,), Refuse("several answers to each problem are eval.num_tests_per_prompt: set that")),
    **_keep("data", "problem_key", "solution_key", "file_format"),
    **CLUSTER,
    **ENVIRONMENTS,
    "env.math.verifier_type": Only(
        (None, "math", "english_multichoice", "multilingual_multichoice"),  # the benchmark decides it
        ENVIRONMENTS["env.math.verifier_type"],
    ),
}

DIALECTS: Mapping[str, Dialect] = {
    "grpo": Dialect({**_TASKS, **_GRPO, **_GRPO_LOSS}),
    "dpo": Dialect({**_EXAMPLES, **_supervised("dpo"), **_DPO}),
    "sft": Dialect({**_EXAMPLES, **_supervised("sft")}),
    "rm": Dialect({**_EXAMPLES, **_supervised("rm")}),
    "distillation": Dialect({**_TASKS, **_DISTILLATION}, {"teacher": "policy"}),
    "eval": Dialect(_EVAL, {"generation": "policy.generation", "tokenizer": "policy.tokenizer"}),
}
"""By the section that has the algorithm's name."""
