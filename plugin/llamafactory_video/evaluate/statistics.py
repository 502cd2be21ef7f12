"""How sure a figure is: intervals and paired tests over source videos, since clips of one recording are not independent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
LEVEL = 0.95
_CELLS = 20_000_000  # numbers of weights that are in memory at once


@dataclass(frozen=True)
class Ratio:
    """A figure that is a quotient of sums over records: a mean, an F measure; or the mean of several such quotients.

    Attributes:
        over, under: what each record adds to the k quotients, (n, k) both. A quotient without anything under it is left out.
        lower_is_better: as errors are.
    """

    over: np.ndarray
    under: np.ndarray
    lower_is_better: bool = False

    def values(self, weights: np.ndarray) -> np.ndarray:
        """The figure where record i counts weights[:, i] times; (draws, n) -> (draws,), nan where nothing counts."""
        return _mean_of_quotients(weights @ self.over, weights @ self.under)


@dataclass(frozen=True)
class AveragePrecision:
    """Mean over labels of the area under precision against recall, of detections that are sorted, the surest first.

    Attributes:
        hits: of each label, whether each detection is right, and the record it belongs to: [((d,) bool, (d,) int), …].
        wanted: how many spans of each label each record has, (n, labels).
    """

    hits: Sequence[tuple[np.ndarray, np.ndarray]]
    wanted: np.ndarray
    lower_is_better: bool = False

    def values(self, weights: np.ndarray) -> np.ndarray:
        """As `Ratio.values`."""
        totals = weights @ self.wanted
        areas = np.full_like(totals, np.nan)
        for label, (is_hit, record) in enumerate(self.hits):
            counts = weights[:, record]
            right = np.cumsum(counts * is_hit, axis=1)
            said = np.cumsum(counts, axis=1)
            with np.errstate(invalid="ignore", divide="ignore"):
                precision = np.nan_to_num(right / said)
                recall = right / totals[:, [label]]
            # The precision at a recall is the best at that or a greater one.
            precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            steps = np.diff(recall, axis=1, prepend=0)
            area = (steps * precision).sum(axis=1)
            areas[:, label] = np.where(totals[:, label] > 0, area, np.nan)
        return _nanmean(areas)


Figure = Ratio | AveragePrecision


def mean_of(values: Sequence[float], counts: Sequence[bool] | None = None, lower_is_better: bool = False) -> Ratio:
    """The mean of a number for each record, of those that count."""
    under = np.ones(len(values)) if counts is None else np.asarray(counts, float)
    return Ratio((np.asarray(values, float) * under)[:, None], under[:, None], lower_is_better)


def _nanmean(values: np.ndarray) -> np.ndarray:
    held = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(held, values, 0).sum(axis=1) / held.sum(axis=1)


def _mean_of_quotients(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return _nanmean(np.where(under > 0, over / under, np.nan))


@dataclass(frozen=True)
class Interval:
    """A figure with the bounds between which it lies with 95 % confidence; nan where nothing counts."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """How much the second of two models is above the first, and how often chance alone would make as much of it."""

    p: float


class Resampling:
    """Draws of source videos, the same for every figure and model: what is compared is compared on the same draws.

    Args:
        sources: the source video of each record, (n,).
        seed: of the draws.
    """

    def __init__(self, sources: Sequence[str], seed: int = 0, draws: int = DRAWS) -> None:
        names, self._of = np.unique(np.asarray([str(source) for source in sources]), return_inverse=True)
        self.count, self.records = len(names), len(sources)
        random = np.random.default_rng(seed)
        # How often each source is drawn, when as many are drawn as there are; more than 255 times none ever is.
        shares = np.full(self.count, 1 / max(1, self.count))
        self._drawn = random.multinomial(self.count, shares, size=draws).clip(max=255).astype(np.uint8)
        self._swaps = random.integers(0, 2, (draws, self.count), dtype=np.uint8)

    def interval(self, figure: Figure, chosen: np.ndarray | None = None) -> Interval:
        """The figure, and the percentiles of its values over the draws (Efron 1979, clusters drawn whole).

        Args:
            chosen: which records count, (n,) bool; None: all.
        """
        only = self._only(chosen)
        return Interval(
            float(figure.values(only[None])[0]), *self._bounds(self._over(self._drawn, only, figure.values))
        )

    def difference(self, first: Figure, second: Figure, chosen: np.ndarray | None = None) -> Difference:
        """How much the second model's figure is above the first's: paired, over the same draws.

        p is that of a permutation test: how often the difference is as large where each source's two answers change sides
        at random, as they might if both models were alike.
        """
        only = self._only(chosen)
        value = float(second.values(only[None])[0] - first.values(only[None])[0])
        differences = self._over(self._drawn, only, lambda weights: second.values(weights) - first.values(weights))
        if np.isnan(value):
            p = 1.0
        elif isinstance(first, Ratio) and isinstance(second, Ratio):
            swapped = self._over(self._swaps, only, lambda mine: _exchanged(first, second, mine, only))
            p = float((1 + np.sum(np.abs(swapped) >= abs(value) - 1e-12)) / (1 + len(swapped)))
        else:
            below, above = np.sum(differences <= 0), np.sum(differences >= 0)
            p = float(min(1.0, 2 * (1 + min(below, above)) / (1 + len(differences))))
        return Difference(value, *self._bounds(differences), p)

    def _only(self, chosen: np.ndarray | None) -> np.ndarray:
        return np.ones(self.records) if chosen is None else chosen.astype(float)

    def _over(self, draws: np.ndarray, only: np.ndarray, figure: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """A figure for each draw of sources, a part of the draws at a time: of many records all take much memory."""
        rows = max(1, _CELLS // max(1, self.records))
        parts = (draws[at : at + rows][:, self._of] * only for at in range(0, len(draws), rows))
        return np.concatenate([figure(part) for part in parts])

    @staticmethod
    def _bounds(values: np.ndarray) -> tuple[float, float]:
        held = values[~np.isnan(values)]
        if not len(held):
            return float("nan"), float("nan")
        low, high = np.quantile(held, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)


def _exchanged(first: Ratio, second: Ratio, mine: np.ndarray, only: np.ndarray) -> np.ndarray:
    """The difference of two models of which each has given the other its answers to some records, (draws, n) 0 or 1."""
    others = only - mine
    values = [
        _mean_of_quotients(a @ x.over + b @ y.over, a @ x.under + b @ y.under)
        for x, y, a, b in ((first, second, mine, others), (second, first, mine, others))
    ]
    return values[0] - values[1]
