"""Sections `grpo` and `loss_fn` of GRPO and its family: rewards, advantages, dynamic sampling and the policy loss."""

from functools import partial
from typing import Any

from nemo_rl.config.nemo.actions import NOTHING, Action, Config, Convert, Ignore, Off, Only, Refuse, Set, Table

UNLIMITED = 1_000_000
"""NeMo RL's GRPO recipes write this for no limit, its others write -1."""


def limit(key: str, value: Any, _: Config) -> Action | None:
    """A number of steps or samples; None and -1 mean no limit."""
    return Set({key: UNLIMITED}) if value is None or value == -1 else None


_GROUP_SWITCHES = ("normalize_rewards", "use_leave_one_out_baseline")
_SWITCHES = {
    "grpo": _GROUP_SWITCHES,
    "gdpo": (*_GROUP_SWITCHES, "reward_weights"),
    "reinforce_plus_plus": ("minus_baseline",),
}
"""What NeMo RL's advantage estimators (v0.5) read of their section, which may hold the settings of all of them."""

_ESTIMATOR = "grpo.adv_estimator"


def _estimator(estimator: Any, _: Config) -> Action | None:
    if not isinstance(estimator, dict):
        return Refuse("an estimator is a section: write {name: grpo}")
    name = estimator.get("name", "grpo")
    if not isinstance(name, str) or name not in _SWITCHES:
        return Refuse(f"there are {', '.join(_SWITCHES)}: choose one of them")
    others = {switch for switches in _SWITCHES.values() for switch in switches} - set(_SWITCHES[name])
    kept = {key: value for key, value in estimator.items() if key not in others}
    if name == "gdpo":
        return _decoupled(kept)
    return Set({f"{_ESTIMATOR}.{key}": value for key, value in {"name": name, **kept}.items()})


def _decoupled(estimator: dict[str, Any]) -> Action:
    """GDPO, whose weights are named here; each reward is divided by its deviation from the mean of the group."""
    if isinstance(estimator.get("reward_weights"), list):
        return Refuse("weights have names here: write reward_weights={NAME: WEIGHT, ...}")
    if estimator.get("normalize_rewards") is False:
        return Refuse("gdpo divides each reward by its deviation: leave normalize_rewards out")
    note = "a group's mean has all its answers" if estimator.get("use_leave_one_out_baseline") else None
    values = {key: value for key, value in estimator.items() if key not in _GROUP_SWITCHES}
    return Set({f"{_ESTIMATOR}.{key}": value for key, value in values.items()}, note=note)


def _group_switch(name: str, value: Any, config: Config) -> Action:
    """One of the switches of v0.3 and v0.4; the estimator goes before it."""
    chosen = config.get(f"{_ESTIMATOR}.name", "grpo")
    stated = config.get(f"{_ESTIMATOR}.{name}")
    if chosen != "grpo" or (stated is not None and stated != value):
        return Ignore("grpo.adv_estimator says it")
    return Set({f"{_ESTIMATOR}.name": "grpo", f"{_ESTIMATOR}.{name}": value})


def _dynamic(wanted: Any, config: Config) -> Action:
    if not wanted:
        return NOTHING
    names = {"dynamic_sampling_max_gen_batches": "max_tries", "batch_multiplier": "batch_multiplier"}
    stated = {new: config.get(f"grpo.{old}") for old, new in names.items()}
    return Set({"grpo.dynamic_sampling": {name: value for name, value in stated.items() if value is not None}})


def _more_prompts(multiplier: Any, config: Config) -> Action:
    if config.get("grpo.use_dynamic_sampling") or multiplier == 1:
        return NOTHING
    return Refuse("without dynamic sampling as many prompts are sampled as are trained on: set it to 1")


def _switched(section: str, values: Any, _: Config) -> Action | None:
    """A section with a switch, which is there or null here."""
    if not isinstance(values, dict) or "enabled" not in values:
        return None
    if not values["enabled"]:
        return NOTHING
    return Set({f"{section}.{name}": value for name, value in values.items() if name not in _OF_SHAPING | {"enabled"}})


_OF_SHAPING = {"mode", "stop_properly_penalty_coef", "reasoning_length"}
"""What NeMo RL's reward shaping knows besides the overlong penalty."""


def _shaping(values: Any, config: Config) -> Action | None:
    if isinstance(values, dict) and values.get("enabled"):
        if values.get("mode", "response_length") != "response_length":
            return Refuse("a penalty for the length of reasoning is a reward of the environment: return it there")
        if values.get("stop_properly_penalty_coef") is not None:
            return Refuse("answers that are cut are left out instead: use grpo.overlong_filtering")
    return _switched("grpo.reward_shaping", values, config)


GRPO: Table = {
    "grpo.max_num_steps": Convert(partial(limit, "grpo.max_num_steps")),
    "grpo.max_val_samples": Convert(partial(limit, "grpo.max_val_samples")),
    "grpo.max_rollout_turns": Only((1, None), Refuse("a rollout has one turn: set it to 1")),
    "grpo.val_batch_size": Ignore("answers are sampled as many side by side as the engine takes"),
    "grpo.val_num_generations_per_prompt": Only((1,), Refuse("validation samples one greedy answer: set it to 1")),
    "grpo.num_val_generations_per_prompt": Only((1,), Refuse("validation samples one greedy answer: set it to 1")),
    "grpo.val_start_at": Only((-1, None), Refuse("validation begins with the run: set it to -1")),
    "grpo.use_dynamic_sampling": Convert(_dynamic),
    "grpo.dynamic_sampling_max_gen_batches": NOTHING,  # use_dynamic_sampling says it
    "grpo.batch_multiplier": Convert(_more_prompts),
    "grpo.reward_shaping": Convert(_shaping),
    "grpo.reward_scaling": Convert(partial(_switched, "grpo.reward_scaling")),
    "grpo.async_grpo": Off(Refuse("sampling and training take turns: set enabled to false")),
    "grpo.adv_estimator": Convert(_estimator),
    **{f"grpo.{name}": Convert(partial(_group_switch, name)) for name in _GROUP_SWITCHES},
    "grpo.seq_logprob_error_threshold": Only(
        (None,), Refuse("use loss_fn.correction={type: sequence_mask, low: ..., high: ...}")
    ),
    "grpo.skip_reference_policy_logprobs_calculation": Only(
        (False,), Ignore("the reference is computed only if loss_fn.reference_policy_kl_penalty is not 0")
    ),
    "grpo.calculate_advantages_on_gpu": Only((False,), Ignore("advantages are a few numbers a step")),
}

_UNBOUNDED = 1e9
_TRUNCATED = {"tis": "token", "icepop": "icepop", "seq-mask-tis": "sequence_mask"}


def _correction(wanted: Any, config: Config) -> Action:
    """The weights of the sampler's tokens: of a token or a whole answer, and how they are bounded."""
    if not wanted:
        return NOTHING
    prefix = "loss_fn.truncated_importance_sampling"
    high, low = config.get(f"{prefix}_ratio"), config.get(f"{prefix}_ratio_min")
    kind = _TRUNCATED.get(str(config.get(f"{prefix}_type") or "tis"))
    if kind is None:
        return Refuse(f"the types of truncation are {', '.join(_TRUNCATED)}")
    if config.get("loss_fn.sequence_level_importance_ratios"):
        if kind != "token":
            return Refuse("a weight for each answer is clamped: use loss_fn.correction={type: sequence}")
        kind = "sequence"
    bounds = {"low": low, "high": _UNBOUNDED if high is None else high}
    return Set({"loss_fn.correction": {"type": kind, **{name: at for name, at in bounds.items() if at is not None}}})


def _choice(key: str, value: str, wanted: Any, _: Config) -> Action:
    """A switch that is one of several values here, and off the default."""
    return Set({key: value}) if wanted else NOTHING


def _unbounded(key: str, bound: Any, _: Config) -> Action | None:
    return Set({key: _UNBOUNDED}) if bound is None else None


_CORRECTED = NOTHING  # by use_importance_sampling_correction, without which these say nothing

GRPO_LOSS: Table = {
    "loss_fn.token_level_loss": Convert(
        lambda per_token, _: Set({"loss_fn.reduction": "token_mean" if per_token else "sequence_mean"})
    ),
    **{
        f"loss_fn.{name}": Convert(partial(_unbounded, f"loss_fn.{name}"))
        for name in ("kl_input_clamp_value", "kl_output_clamp_value")
    },
    "loss_fn.use_importance_sampling_correction": Convert(_correction),
    "loss_fn.truncated_importance_sampling_ratio": _CORRECTED,
    "loss_fn.truncated_importance_sampling_ratio_min": _CORRECTED,
    "loss_fn.truncated_importance_sampling_type": _CORRECTED,
    "loss_fn.sequence_level_importance_ratios": Convert(partial(_choice, "loss_fn.ratio_level", "sequence")),
    "loss_fn.disable_ppo_ratio": Convert(partial(_choice, "loss_fn.policy_loss", "reinforce")),
    "loss_fn.use_cispo": Convert(partial(_choice, "loss_fn.policy_loss", "cispo")),
    "loss_fn.use_kl_in_reward": Convert(partial(_choice, "loss_fn.reference_policy_kl_place", "reward")),
    "loss_fn.force_on_policy_ratio": Only(
        (False,), Ignore("the ratio is 1 anyway where a step has one optimizer step")
    ),
    "loss_fn.positive_example_nll_weight": Only(
        (0, None), Refuse("right answers get no loss of their own: set it to 0")
    ),
}
