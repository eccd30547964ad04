"""Numbers as the reader sees them: one spelling per quantity, in the page, the pictures and the terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass

MINUS = "\N{MINUS SIGN}"
THIN = "\N{NARROW NO-BREAK SPACE}"
DASH = "\N{EN DASH}"

PERCENT_METRICS = frozenset(
    {
        "accuracy",
        "accuracy_per_character",
        "balanced_accuracy",
        "exact_match",
        "f1",
        "macro_f1",
        "micro_f1",
        "precision",
        "recall",
    }
)
LOWER_IS_BETTER = frozenset(
    {"loss", "perplexity", "nll", "bits_per_byte", "error", "error_rate", "mse", "mae", "rmse", "wer"}
)


@dataclass(frozen=True)
class Unit:
    """How one metric is written: `value * factor` with `decimals` digits and `suffix`."""

    factor: float
    decimals: int
    suffix: str
    difference_suffix: str

    def show(self, value: float | None) -> str:
        """The value with its suffix; a dash if there is none."""
        return DASH if value is None else _signed(value * self.factor, self.decimals) + self.suffix

    def bare(self, value: float) -> str:
        """The value without its suffix, for the inside of an interval."""
        return _signed(value * self.factor, self.decimals)

    def difference(self, value: float | None) -> str:
        """A difference with an explicit sign, in points for percentages."""
        if value is None:
            return DASH
        text = _signed(value * self.factor, self.decimals)
        return ("" if text.startswith(MINUS) else "+") + text + self.difference_suffix


def unit_of(metric: str) -> Unit:
    """The unit a metric is shown in, by its name."""
    if metric in PERCENT_METRICS:
        return Unit(100.0, 1, THIN + "%", THIN + "pp")
    return Unit(1.0, 2 if metric == "perplexity" else 3, "", "")


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value of `metric` is the better one."""
    return metric in LOWER_IS_BETTER


def title_of(metric: str) -> str:
    """A metric's name as a heading: `exact_match` becomes `Exact match`."""
    words = metric.replace("_", " ")
    return words[:1].upper() + words[1:]


def _signed(value: float, decimals: int) -> str:
    """Fixed decimals, a true minus sign, and no negative zero."""
    text = f"{value:,.{decimals}f}"
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text.replace("-", MINUS)


def number(value: object) -> float | None:
    """The value as a float if it is a finite number, otherwise `None`: results may hold NaN or null."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def plain(value: object, decimals: int = 2) -> str:
    """A number without unit and with fixed decimals; a dash if there is none."""
    found = number(value)
    return DASH if found is None else _signed(found, decimals)


def count(value: object) -> str:
    """A whole number with thousands separators: `221,184`."""
    found = number(value)
    return DASH if found is None else _signed(found, 0)


def share(value: object) -> str:
    """A fraction as a whole percentage: `38 %`."""
    found = number(value)
    return DASH if found is None else f"{100 * found:.0f}{THIN}%"


def compact(value: object) -> str:
    """Three significant digits with an SI prefix: `221k`, `1.24M`, `13.3G`."""
    found = number(value)
    if found is None:
        return DASH
    for step, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # The half of the last digit keeps 999,950 from becoming "1000k".
        if abs(found) >= step * 0.9995:
            scaled = found / step
            return f"{scaled:.{_decimals(scaled)}f}{prefix}"
    return f"{found:.0f}" if found == round(found) else f"{found:.{_decimals(found)}f}"


def _decimals(value: float) -> int:
    """How many decimals show three significant digits of a value below a thousand."""
    return 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2


def duration(seconds: object) -> str:
    """A time span in its two largest units: `48 s`, `8 min 12 s`, `2 h 05 min`."""
    found = number(seconds)
    if found is None:
        return DASH
    if found < 10:
        return f"{found:.1f}{THIN}s"
    whole = round(found)
    if whole < 60:
        return f"{whole}{THIN}s"
    if whole < 3600:
        return f"{whole // 60}{THIN}min {whole % 60:02d}{THIN}s"
    minutes = round(found / 60)
    return f"{minutes // 60}{THIN}h {minutes % 60:02d}{THIN}min"


def p_value(value: object) -> str:
    """A p-value with two significant digits, never below what is worth telling apart."""
    found = number(value)
    if found is None:
        return DASH
    return "< 0.001" if found < 0.001 else f"{found:.3f}" if found < 0.1 else f"{found:.2f}"
