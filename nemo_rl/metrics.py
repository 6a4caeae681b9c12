"""Typed metrics: a number travels with the way it is combined, never as a bare float.

Every producer (a micro-batch, a worker, the loop) returns `Metrics`; `merge` folds any number of them in any order into
the figures of the whole step.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Self


@dataclass(frozen=True, slots=True)
class Mean:
    """A weighted mean: `total / count`. An empty one (`count == 0`) is NaN.

    >>> merge([{"x": Mean(3.0, 2)}, {"x": Mean(1.0, 2)}])["x"].value
    1.0
    """

    total: float
    count: float = 1.0

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else math.nan

    def combine(self, other: Self) -> Self:
        return type(self)(self.total + other.total, self.count + other.count)


@dataclass(frozen=True, slots=True)
class Sum:
    """A quantity that adds up over micro-batches and workers (tokens, seconds of work, counts)."""

    value: float

    def combine(self, other: Self) -> Self:
        return type(self)(self.value + other.value)


@dataclass(frozen=True, slots=True)
class Max:
    """The largest of the values seen."""

    value: float

    def combine(self, other: Self) -> Self:
        return type(self)(max(self.value, other.value))


@dataclass(frozen=True, slots=True)
class Min:
    """The smallest of the values seen."""

    value: float

    def combine(self, other: Self) -> Self:
        return type(self)(min(self.value, other.value))


@dataclass(frozen=True, slots=True)
class Histogram:
    """The values themselves, kept for a histogram; its scalar is their mean."""

    values: tuple[float, ...]

    @property
    def value(self) -> float:
        return math.fsum(self.values) / len(self.values) if self.values else math.nan

    def combine(self, other: Self) -> Self:
        return type(self)(self.values + other.values)


@dataclass(frozen=True, slots=True)
class EffectiveShare:
    """The effective sample size of weights w as a share of their number: (sum w)^2 / (count * sum w^2), 1 if all equal.

    >>> EffectiveShare(total=2.0, total_of_squares=4.0, count=2).value  # weights 2 and 0
    0.5
    """

    total: float
    total_of_squares: float
    count: float

    @property
    def value(self) -> float:
        return self.total**2 / (self.count * self.total_of_squares) if self.total_of_squares else math.nan

    def combine(self, other: Self) -> Self:
        return type(self)(
            self.total + other.total, self.total_of_squares + other.total_of_squares, self.count + other.count
        )


type Metric = Mean | Sum | Max | Min | EffectiveShare | Histogram
type Metrics = dict[str, Metric]


def merge(parts: Iterable[Mapping[str, Metric]]) -> Metrics:
    """Fold metrics of equal names together; a name that only some parts have is kept.

    Raises:
        TypeError: if two parts give one name different kinds of metric.
    """

    def fold(merged: Metrics, part: Mapping[str, Metric]) -> Metrics:
        for name, metric in part.items():
            known = merged.get(name)
            if known is not None and type(known) is not type(metric):
                raise TypeError(f"metric {name!r} is a {type(known).__name__} here and a {type(metric).__name__} there")
            merged[name] = metric if known is None else known.combine(metric)  # type: ignore[arg-type]
        return merged

    return reduce(fold, parts, {})


def scalars(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The plain numbers, for a log line."""
    return {name: metric.value for name, metric in metrics.items()}


def prefixed(prefix: str, metrics: Mapping[str, Metric]) -> Metrics:
    """The same metrics under `prefix/name`."""
    return {f"{prefix}/{name}": metric for name, metric in metrics.items()}
