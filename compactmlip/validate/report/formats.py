"""Numbers as text for people."""

from __future__ import annotations

import math

NONE = "–"
"""Shown where nothing is known."""

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | None, digits: int = 3) -> str:
    """Format with significant digits; never as 1e+03, and a dash where nothing is known."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    value = float(f"{value:.{digits - 1}e}")  # first, so that 0.9999 gets the digits of 1.00
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -4:
        mantissa = f"{value / 10.0**exponent:.{digits - 1}f}".replace("-", "−")
        return f"{mantissa} × 10{str(exponent).translate(SUPERSCRIPT)}"
    return f"{value:,.{max(digits - 1 - exponent, 0)}f}".replace("-", "−")


def limit(value: float | None) -> str:
    """Format a limit as it was given: up to three significant digits, no trailing zeros; infinity is none."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.3g}"


def signed(value: float | None) -> str:
    """Format as :func:`number` with an explicit sign."""
    text = number(value)
    return f"+{text}" if value is not None and value > 0 else text


def integer(value: float | None) -> str:
    """Format a count with thousands separators, or as :func:`number` below ten."""
    if value is None:
        return NONE
    return number(value) if 0 < value < 10 and value != int(value) else f"{value:,.0f}"


def file_size(count: int | None) -> str:
    """Format a number of bytes."""
    if count is None:
        return NONE
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def r_squared(value: float | None) -> str:
    """Format R^2 so that 0.9999 is not shown as 1."""
    if value is None:
        return NONE
    return "> 0.9999" if value > 0.9999 else f"{value:.4f}".replace("-", "−")


def times(value: float | None) -> str:
    """Format a ratio."""
    return NONE if value is None else f"{number(value, 2 if value < 100 else 3)}×"


def pretty_unit(text: str) -> str:
    """Write A as the Angstrom sign and powers as superscripts."""
    return text.replace("/A^3", "/Å³").replace("/m^2", "/m²").replace("meV/A", "meV/Å").replace("^2", "²")


def plus_minus(value: float, error: float) -> str:
    """Format a value and its standard error to the digit that the error leaves uncertain."""
    if not (math.isfinite(value) and math.isfinite(error)) or error <= 0:
        return f"{number(value)} ± {number(error)}"
    decimals = min(max(-math.floor(math.log10(float(f"{error:.0e}"))), 0), 9)
    text = f"{value:.{decimals}f}"
    sign = "" if float(text) == 0 else "+" if value > 0 else "−"
    return f"{sign}{text.lstrip('-')} ± {error:.{decimals}f}"
