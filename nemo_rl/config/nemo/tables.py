"""The tables of each algorithm: NeMo RL's own sections, and those that all of them share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nemo_rl.config.nemo.actions import NOTHING, Action, Config, Convert, Ignore, Keep, Only, Refuse, Set, Table
from nemo_rl.config.nemo.data_keys import data_keys, prompt_file
from nemo_rl.config.nemo.grpo_keys import GRPO, GRPO_LOSS, UNLIMITED, limit
from nemo_rl.config.nemo.policy_keys import generation_keys, policy_keys, tokenizer_keys
from nemo_rl.config.nemo.run_keys import CLUSTER, ENVIRONMENTS, RUN
from nemo_rl.config.nemo.template_keys import TEMPLATE


@dataclass(frozen=True, slots=True)
class Dialect:
    """NeMo RL's YAML for one algorithm.

    Attributes:
        table: what becomes of its keys; one that is not in it keeps its place if the schema has it.
        like: sections that have the keys of another one, e.g. `teacher` those of `policy`.
    """

    table: Table
    like: Mapping[str, str] = field(default_factory=dict[str, str])


def _samples(section: str, batches: Any, config: Config) -> Action:
    """Validation batches of a set size as a number of samples."""
    size = config.get(f"{section}.val_global_batch_size", 1)
    if not isinstance(batches, int) or not isinstance(size, int):
        return Refuse("validation needs a number of batches and their size (val_global_batch_size)")
    return Set({f"{section}.max_val_samples": UNLIMITED if batches == -1 else batches * size})


_SAME_LENGTH = "validation is cut into micro-batches of training, which changes no figure"


def _keep(section: str, *names: str) -> Table:
    return {f"{section}.{name}": Keep() for name in names}


def _supervised(section: str) -> Table:
    """What the loops over a fixed data set have in common."""
    return {
        **_keep(section, "max_num_epochs", "val_period", "val_at_start", "val_at_end", "seed"),
        f"{section}.max_num_steps": Convert(lambda steps, _: limit(f"{section}.max_num_steps", steps, _) or Keep()),
        f"{section}.val_batches": Convert(partial(_samples, section)),
        f"{section}.val_global_batch_size": NOTHING,  # part of max_val_samples
        f"{section}.val_micro_batch_size": Ignore(_SAME_LENGTH),
    }


_SHARED: Table = {**policy_keys("policy"), **RUN}
_TASKS: Table = {**_SHARED, **data_keys("tasks"), **ENVIRONMENTS}
_EXAMPLES: Table = {**_SHARED, **data_keys("examples"), **TEMPLATE}
_DPO: Table = {
    **_keep("dpo", "reference_policy_kl_penalty", "preference_average_log_probs", "sft_average_log_probs"),
    **_keep("dpo", "preference_loss_weight", "sft_loss_weight", "preference_loss"),
    "dpo.gt_reward_scale": Refuse("it belongs to the losses of RPO, which are not here: leave it out"),
}
_TEACHER_SIZES = (
    *("teacher.train_global_batch_size", "teacher.train_micro_batch_size", "teacher.max_total_sequence_length"),
    *("teacher.dynamic_batching.train_mb_tokens", "teacher.sequence_packing.train_mb_tokens"),
)
_DISTILLATION: Table = {
    **_keep("distillation", "num_prompts_per_step", "num_generations_per_prompt", "max_num_steps", "max_num_epochs"),
    **_keep("distillation", "val_period", "val_at_start", "val_at_end", "max_val_samples", "topk_logits_k", "seed"),
    "distillation.max_rollout_turns": GRPO["grpo.max_rollout_turns"],
    "distillation.val_batch_size": GRPO["grpo.val_batch_size"],
    **_keep("loss_fn", "kl_type", "mixed_kl_weight", "zero_outside_topk"),
    **policy_keys("teacher"),
    "teacher.generation": Ignore("a teacher scores and samples nothing"),
    **{f"teacher.{name}": Ignore("a teacher is not trained") for name in ("optimizer", "scheduler", "max_grad_norm")},
    **dict.fromkeys(_TEACHER_SIZES, NOTHING),  # of training, or of the student's sequences
}
_EVAL: Table = {
    **_keep("eval", "metric", "num_tests_per_prompt", "seed", "k_value", "save_path"),
    **generation_keys("generation"),
    **_keep("generation", "model_name"),
    "generation.colocated.enabled": Only((True,), Ignore("an evaluation has nothing to share GPUs with")),
    "generation.colocated.resources": NOTHING,  # colocated.enabled says it
    "generation.num_prompts_per_step": Ignore("answers are sampled as many side by side as the engine takes"),
    **tokenizer_keys("tokenizer"),
    **_keep("data", "dataset_name", "max_input_seq_length", "system_prompt_file", "split"),
    "data.prompt_file": Convert(prompt_file),
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
    "grpo": Dialect({**_TASKS, **GRPO, **GRPO_LOSS}),
    "dpo": Dialect({**_EXAMPLES, **_supervised("dpo"), **_DPO}),
    "sft": Dialect({**_EXAMPLES, **_supervised("sft")}),
    "rm": Dialect({**_EXAMPLES, **_supervised("rm")}),
    "distillation": Dialect({**_TASKS, **_DISTILLATION}, {"teacher": "policy"}),
    "eval": Dialect(_EVAL, {"generation": "policy.generation", "tokenizer": "policy.tokenizer"}),
}
"""By the section that has the algorithm's name."""
