"""What a pickle is read into when nothing in it may run: names without the things, calls without the call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compactmlip.errors import CheckpointError

_MISSING = object()
_MODULE_TABLES = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class InertGlobal:
    """The name of a class or function that a pickle refers to; the thing itself is never looked up."""

    module: str
    name: str


@dataclass(frozen=True)
class Constructor(InertGlobal):
    """A name for which ``call`` stands in: it is given the pickled arguments and returns the value."""

    call: Callable[..., Any] = field(repr=False, compare=False)


@dataclass(eq=False, repr=False)
class InertObject:
    """What a pickle says about an object, without the object.

    Attributes
    ----------
    module, name
        Where the class, or the function that would have been called, is defined.
    args
        Positional arguments of the constructor or function (also of ``__new__``).
    state
        What ``__setstate__`` would have been given: for most classes the dictionary of attributes.
    items
        Items that would have been appended (values) or set (pairs of key and value).
    """

    module: str
    name: str
    args: tuple[Any, ...] = ()
    state: Any = field(default_factory=dict)
    items: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<inert {self.module}.{self.name}>"

    def table(self, name: str) -> dict[str, Any]:
        """``_parameters``, ``_buffers`` or ``_modules`` of a module; empty for other objects."""
        found = self.state.get(name) if isinstance(self.state, dict) else None
        return found if isinstance(found, dict) else {}

    def attribute(self, key: str, default: Any = _MISSING) -> Any:
        """Value of an attribute: plain ones first, then parameters, buffers and submodules.

        Raises
        ------
        CheckpointError
            If there is none and no default is given.
        """
        if isinstance(self.state, dict) and key in self.state:
            return self.state[key]
        for name in _MODULE_TABLES:
            if key in self.table(name):
                return self.table(name)[key]
        if default is not _MISSING:
            return default
        raise CheckpointError(
            f"{self.module}.{self.name} in this file has no attribute '{key}'. Another version of the "
            "program that wrote the file may name it differently; save the model again with a recent one."
        )


class Refused(Exception):
    """The pickle does something that no model file needs; the message says what."""


def make(function: Any, args: Any) -> Any:
    """What calling a global gives: a value from its :class:`Constructor`, or an inert record of the call."""
    if not isinstance(args, tuple):
        raise ValueError("the arguments of a call are not a tuple")
    if isinstance(function, Constructor):
        return function.call(*args)
    if isinstance(function, InertGlobal):
        return InertObject(function.module, function.name, args)
    raise Refused(f"it calls an object of type {type(function).__name__}")


def set_state(target: Any, state: Any) -> None:
    """Give an object its pickled state, without calling a method of a class that the pickle chose."""
    if isinstance(target, InertObject):
        slots = (
            isinstance(state, tuple) and len(state) == 2 and all(isinstance(s, dict | None) for s in state)
        )
        for part in state if slots else (state,):
            if isinstance(part, dict) and isinstance(target.state, dict):
                target.state.update(part)
            elif not slots:
                target.state = state
    elif isinstance(target, np.ndarray):
        _, shape, dtype, fortran, content = state
        if not (isinstance(dtype, np.dtype) and isinstance(content, bytes)):
            raise Refused("it holds an array of Python objects")
        target.__setstate__((1, tuple(shape), dtype, fortran, content))
    elif isinstance(target, np.dtype):
        if state[1] not in ("<", "|", "="):
            raise Refused("it holds numbers of a big-endian machine")
    elif not isinstance(target, dict):  # attributes of an OrderedDict (versions of a state dict): not needed
        raise Refused(f"it sets the state of an object of type {type(target).__name__}")


def extend(target: Any, values: list[Any]) -> None:
    """Append values to a list, set or inert object."""
    if isinstance(target, list):
        target.extend(values)
    elif isinstance(target, set):
        target.update(values)
    elif isinstance(target, InertObject):
        target.items.extend(values)
    else:
        raise Refused(f"it appends to an object of type {type(target).__name__}")


def set_items(target: Any, values: list[Any]) -> None:
    """Set items, given as keys and values in turn, of a dictionary or inert object."""
    if isinstance(target, dict):
        target.update(pairs(values))
    elif isinstance(target, InertObject):
        target.items.extend(pairs(values))
    else:
        raise Refused(f"it sets items of an object of type {type(target).__name__}")


def pairs(values: list[Any]) -> Iterable[tuple[Any, Any]]:
    """Keys and values in turn, as pairs."""
    if len(values) % 2:
        raise ValueError("a key of the pickle has no value")
    return zip(values[::2], values[1::2], strict=True)
