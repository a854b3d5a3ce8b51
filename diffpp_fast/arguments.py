"""Numbers among arguments: what is none is refused by the names of the operator and of the argument."""

import math
import operator
from numbers import Real
from typing import Any


def number(op: str, name: str, value: Any) -> float:
    """`value` if it is a finite number, as a float where it is none of Python's own.

    Raises:
        TypeError: not a number; a bool and a tensor are none.
        ValueError: NaN or infinite.
    """
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{op}: {name} must be a number, got {shown(value)}")
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if not -math.inf < value < math.inf:
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return value


def positive(op: str, name: str, value: Any) -> float:
    """`number` for what is greater than zero."""
    if isinstance(value, int | float) and not value > 0.0:
        raise ValueError(f"{op}: {name} must be positive, got {value}")
    return number(op, name, value)


def numbers(op: str, name: str, values: Any) -> tuple[float, ...]:
    """The values of a sequence of finite numbers.

    Raises:
        TypeError: not a sequence of numbers.
        ValueError: one of them is NaN or infinite.
    """
    try:
        found = () if isinstance(values, str) else tuple(map(float, values))
    except (TypeError, ValueError, OverflowError):
        found = ()
    if not found:
        raise TypeError(f"{op}: {name} must be a sequence of numbers, got {shown(values)}")
    if not -math.inf < sum(found) < math.inf and not all(map(math.isfinite, found)):
        raise ValueError(f"{op}: {name} must be finite, got {list(found)}")
    return found


def integer(op: str, name: str, value: Any) -> int:
    """`value` if it is an integer, as an int where it is a NumPy scalar.

    Raises:
        TypeError: not an integer; a bool and a float are none.
    """
    if type(value) is int:
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{op}: {name} must be an integer, got {shown(value)}")
    try:
        return operator.index(value)
    except TypeError as error:  # an array or a tensor that is not one integer
        raise TypeError(f"{op}: {name} must be an integer, got {shown(value)}") from error


def shown(value: Any) -> str:
    """A value in a message, a long one by its type alone."""
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) <= 40 and "\n" not in text else type(value).__name__
