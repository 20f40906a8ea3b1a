"""What the numbers of a metric mean: its title, range, unit and direction. Plots, tables and the verdict go by it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

SHARE = "%"  # the unit of a metric from 0 to 1 that is shown in percent, and its differences in points


@dataclass(frozen=True)
class MetricScale:
    """The scale of a metric; the defaults are those of a share, such as exact match.

    Args:
        title: in texts. Empty: the metric's name, in words.
        unit: `%` for a share, which is shown times 100; else what stands behind the number, such as `bpm`, or nothing.
        low, high: the least and the greatest value; None where there is no bound.
        higher_is_better: False for an error.
        decimals: that are shown.
    """

    title: str = ""
    unit: str = SHARE
    low: float | None = 0.0
    high: float | None = 1.0
    higher_is_better: bool = True
    decimals: int = 1

    @property
    def factor(self) -> int:
        """By which a value is multiplied where it is shown."""
        return 100 if self.unit == SHARE else 1

    @property
    def heading(self) -> str:
        """Of a column; percent is not said, as most are."""
        notes = [self.unit] * (self.unit not in ("", SHARE)) + ["lower is better"] * (not self.higher_is_better)
        return f"{self.title} ({', '.join(notes)})" if notes else self.title

    def number(self, value: float | None, sign: str = "") -> str:
        """A value without its unit; `sign` as in a format specification."""
        return "undefined" if value is None else f"{self.factor * value:{sign}.{self.decimals}f}"

    def with_interval(self, row: Mapping[str, Any], key: str = "value", sign: str = "") -> str:
        """A score or difference, with its interval where it has one: `87.5 [80.0, 95.0]`."""
        text = self.number(row[key], sign)
        if row[key] is None or row["interval_95"] is None:
            return text
        return f"{text} [{', '.join(map(self.number, row['interval_95']))}]"

    def with_unit(self, text: str) -> str:
        """A number, or one with its interval, with its unit behind."""
        return f"{text}{self.unit}" if self.unit == SHARE else f"{text} {self.unit}".rstrip()

    def gain(self, value: float) -> str:
        """How much better a score is than another: `8.3 points of exact match`, `2.1 bpm of the error`."""
        unit = "points " if self.unit == SHARE else f"{self.unit} " if self.unit else ""
        return f"{self.number(abs(value))} {unit}of {self.title}"

    def improvement(self, interval: list[float]) -> tuple[float, float]:
        """An interval of a difference, turned so that above 0 is better."""
        low, high = interval
        return (low, high) if self.higher_is_better else (-high, -low)

    def to_dict(self) -> dict[str, Any]:
        """As the results have it."""
        return asdict(self)


def title_of(name: str) -> str:
    """The name of a metric or type of question in words."""
    return "AUROC" if name == "auroc" else name.replace("_", " ")


def scales_of(results: Mapping[str, Any]) -> dict[str, MetricScale]:
    """The scale of each metric of results."""
    return {name: MetricScale(**fields) for name, fields in results["metrics"].items()}
