"""A pickle machine that runs nothing: it builds plain containers and records everything else.

Python's unpickler calls whatever a pickle names.  This one has no way to: a global becomes an
:class:`InertGlobal`, a name without the thing, and calling one becomes an :class:`InertObject`, which
keeps the arguments, the state and the items that the real object would have been given.  The only
functions that are called are the :class:`Constructor` ones that the caller of :func:`read_pickle` hands
in for chosen names.  Opcodes are decoded by :mod:`pickletools`, which describes each of them
(Python documentation, ``pickletools``; PEP 307 and PEP 3154).
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

from compactmlip.families.inert_objects import Refused, extend, make, pairs, set_items, set_state


def read_pickle(data: bytes, find_global: Callable[[str, str], Any], persistent: Callable[[Any], Any]) -> Any:
    """Read the first pickle in ``data``.

    Parameters
    ----------
    data
        The pickle, of protocol 2 or later.
    find_global
        Called with the module and the name of each global, when the pickle first names it: returns an
        :class:`InertGlobal` or raises.
    persistent
        Called with each persistent id; returns the value.

    Returns
    -------
    The root object.

    Raises
    ------
    Refused
        On opcodes, calls or states that model files do not use.
    ValueError, TypeError, IndexError, KeyError
        If the pickle is damaged.
    """
    machine = _Machine(find_global, persistent)
    for opcode, argument, _ in pickletools.genops(data):
        machine.step(opcode.name, argument)
    (root,) = machine.stack
    return root


_PUSH = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"}
_PUSH |= {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
_COLLECT: dict[str, Callable[[list[Any]], Any]] = {
    "TUPLE": tuple,
    "LIST": list,
    "FROZENSET": frozenset,
    "DICT": lambda values: dict(pairs(values)),
}
_FIXED_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = {"PROTO", "FRAME", "STOP"}


class _Machine:
    """Stack, marks and memo of a pickle that is being read."""

    def __init__(self, find_global: Callable[[str, str], Any], persistent: Callable[[Any], Any]) -> None:
        self.stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._find_global = find_global
        self._persistent = persistent

    def step(self, opcode: str, argument: Any) -> None:
        """Do one opcode: values and memo here, the rest in a method of its name."""
        if opcode in ("BINGET", "LONG_BINGET"):
            self.stack.append(self._memo[argument])
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self.stack[-1]
        elif opcode == "MEMOIZE":
            self._memo[len(self._memo)] = self.stack[-1]
        elif opcode in _PUSH:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode])
        elif opcode in _EMPTY:
            self.stack.append(_EMPTY[opcode]())
        elif opcode in _FIXED_TUPLES:
            self.stack.append(tuple(self._pop(_FIXED_TUPLES[opcode])))
        elif opcode in _COLLECT:
            values = self._pop_mark()
            self.stack.append(_COLLECT[opcode](values))
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self, argument)
        elif opcode not in _IGNORED:
            raise Refused(f"it uses the pickle opcode {opcode}, which PyTorch does not write")

    def _pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise ValueError("the pickle takes more from its stack than there is")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def _pop_mark(self) -> list[Any]:
        taken, self.stack = self.stack, self._marks.pop()
        return taken

    def mark(self, _: None) -> None:
        self._marks.append(self.stack)
        self.stack = []

    def pop(self, _: None) -> None:
        """Drop the top of the stack: the mark, if nothing lies on it."""
        if self.stack:
            self.stack.pop()
        else:
            self._pop_mark()

    def pop_mark(self, _: None) -> None:
        self._pop_mark()

    def global_name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(self._find_global(module, name))

    def stack_global(self, _: None) -> None:
        module, name = self._pop(2)
        if not (type(module) is str and type(name) is str):
            raise Refused("it computes the name of a global")
        self.stack.append(self._find_global(module, name))

    def reduce(self, _: None) -> None:
        function, args = self._pop(2)
        self.stack.append(make(function, args))

    def build(self, _: None) -> None:
        (state,) = self._pop(1)
        set_state(self.stack[-1], state)

    def persistent_id(self, _: None) -> None:
        (identifier,) = self._pop(1)
        self.stack.append(self._persistent(identifier))

    def append(self, _: None) -> None:
        values = self._pop(1)
        extend(self.stack[-1], values)

    def appends(self, _: None) -> None:
        values = self._pop_mark()
        extend(self.stack[-1], values)

    def set_item(self, _: None) -> None:
        values = self._pop(2)
        set_items(self.stack[-1], values)

    def set_items(self, _: None) -> None:
        values = self._pop_mark()
        set_items(self.stack[-1], values)


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "GLOBAL": _Machine.global_name,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent_id,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
}
