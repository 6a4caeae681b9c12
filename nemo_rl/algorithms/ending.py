"""When a run ends: its limits are reached, or its validations get no better."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import replace

from nemo_rl.algorithms.checkpoints import TrainingInfo
from nemo_rl.config.schema.run import EarlyStoppingConfig, LoopConfig
from nemo_rl.errors import ConfigError


def end_of(limits: LoopConfig, info: TrainingInfo) -> str | None:
    """Say why a run that has come so far is at its end; None while something is left to do."""
    patience, name = limits.early_stopping.patience, limits.early_stopping.metric_name
    if patience is not None and name in info.best and info.num_worse >= patience:
        return f"{name} has not improved on {info.best[name]:.4g} in {info.num_worse} validations"
    if info.step >= limits.max_num_steps:
        return f"max_num_steps = {limits.max_num_steps} is reached"
    if limits.max_num_epochs is not None and info.epochs >= limits.max_num_epochs:
        return f"max_num_epochs = {limits.max_num_epochs} is reached"
    return None


def after_validation(info: TrainingInfo, rule: EarlyStoppingConfig, figures: Mapping[str, float]) -> TrainingInfo:
    """Note whether a validation is the best so far; a figure that is no number never is.

    Args:
        info: of the run up to here.
        rule: which figure counts, and what is an improvement.
        figures: of the validation, by name.

    Raises:
        ConfigError: the validation does not measure that figure.
    """
    if rule.patience is None:
        return info
    name = rule.metric_name.removeprefix("val:")
    if name not in figures:
        close = difflib.get_close_matches(name, figures, n=1)
        advice = f"did you mean val:{close[0]}?" if close else f"it has {', '.join(sorted(figures))}"
        raise ConfigError(
            f"early_stopping.metric_name is {rule.metric_name} and the validation has no {name}; {advice}"
        )
    sign = 1 if rule.higher_is_better else -1
    best = info.best.get(rule.metric_name, -sign * math.inf)
    if sign * (figures[name] - best) > rule.min_delta:
        return replace(info, best={rule.metric_name: figures[name]}, num_worse=0)
    num_worse = info.num_worse if rule.metric_name in info.best else 0
    return replace(info, best={rule.metric_name: best}, num_worse=num_worse + 1)
