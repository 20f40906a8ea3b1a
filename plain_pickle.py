"""Pickles of plain values, read without `pickle`: nothing in them is imported, looked up or called.

`pickle` with all classes refused is not enough: it still crashes on some files, such as one whose key is a pair in a
pair in a pair ..., as hashing it exhausts the stack.
"""

import pickletools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

# With these no value stands twice and no number has more than 32 bits: longer ones could be chosen so that as keys
# they collide. So work and memory grow with the size of the file alone.
_BASIC = (
    "PROTO FRAME MEMOIZE BINPUT LONG_BINPUT BININT BININT1 BININT2 SHORT_BINUNICODE BINUNICODE EMPTY_DICT EMPTY_LIST "
    "MARK SETITEM SETITEMS APPEND APPENDS TUPLE2 STOP"
)
# of plain values; each takes up to 3 us, and a tokenizer of 10,000 merges has 300,000
MAX_OPCODES = 1_500_000
_BOUNDED = (
    f"{_BASIC} BINGET LONG_BINGET LONG1 BINFLOAT BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 NONE NEWTRUE NEWFALSE "
    "EMPTY_TUPLE TUPLE1 TUPLE3 TUPLE GLOBAL STACK_GLOBAL REDUCE BUILD"
)


@dataclass
class Inert:
    """Stands for a function that a pickle names, and for what calling it would have returned."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None


class _Machine:
    """The stack on which a pickle builds its value, one opcode after the other."""

    def __init__(self, key_type: type, functions: Collection[str], refers_back: bool) -> None:
        self.key_type, self.functions = key_type, functions
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] | None = {} if refers_back else None  # None: nothing may stand twice

    def run(self, opcode: str, argument: Any) -> None:
        """Does what one opcode says; IndexError or KeyError where nothing is there to do it with."""
        stack = self.stack
        match opcode:  # PROTO and FRAME describe the file alone: nothing to do
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)  # genops has decoded it
            case "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8" | "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8":
                stack.append(argument)
            case "MEMOIZE" | "BINPUT" | "LONG_BINPUT":
                if self.memo is not None:
                    self.memo[len(self.memo) if argument is None else argument] = stack[-1]  # MEMOIZE: the next number
            case "BINGET" | "LONG_BINGET":
                stack.append((self.memo or {})[argument])
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}[opcode])
            case "EMPTY_DICT" | "EMPTY_LIST":
                stack.append({} if opcode == "EMPTY_DICT" else [])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.pop(int(opcode[-1]))))
            case "TUPLE":
                stack.append(tuple(self.pop_marked()))
            case "MARK":
                self.marks.append(len(stack))
            case "SETITEM" | "SETITEMS":
                self.set_items(self.pop(2) if opcode == "SETITEM" else self.pop_marked())
            case "APPEND" | "APPENDS":
                self.extend(self.pop(1) if opcode == "APPEND" else self.pop_marked())
            case "GLOBAL":
                self.push_function(argument)
            case "STACK_GLOBAL":
                module, name = self.pop(2)  # on the stack, where GLOBAL has both as its argument
                self.push_function(f"{module} {name}" if type(module) is type(name) is str else "no name")
            case "REDUCE":
                function, arguments = self.pop(2)
                if type(function) is not Inert or type(arguments) is not tuple:
                    raise ValueError("it calls what is no function")
                stack.append(Inert(function.name, arguments))
            case "BUILD":
                (state,) = self.pop(1)
                if type(stack[-1]) is not Inert:
                    raise ValueError("it sets the state of a plain value")
                stack[-1].state = state

    def pop(self, count: int) -> list[Any]:
        return [self.stack.pop() for _ in range(count)][::-1]  # no slice: IndexError where there are too few

    def pop_marked(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def push_function(self, name: str) -> None:
        if name not in self.functions:
            raise ValueError(f"it asks for {name[:80]!r}, which could run code")
        self.stack.append(Inert(name.split()[1]))

    def set_items(self, items: list[Any]) -> None:
        target, keys = self.stack[-1], items[::2]  # exact types below: True is an int to isinstance
        if type(target) is not dict or len(items) % 2 or any(type(key) is not self.key_type for key in keys):
            words = "whole numbers" if self.key_type is int else "strings"
            raise ValueError(f"it sets items of what is no dict, or whose keys are no {words}")
        target.update(zip(keys, items[1::2], strict=True))

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("it appends to what is no list")
        self.stack[-1].extend(items)


def load_plain_pickle(
    content: bytes, key_type: type, functions: Collection[str] = (), max_opcodes: int | None = None
) -> Any:
    """The value that a pickle describes: dicts, lists, pairs, whole numbers and strings.

    Args:
        key_type: `str` or `int`: of the keys of all dicts. Nothing else is hashed.
        functions: "module name" of those that may be named, as NumPy's arrays do. They are not called: each, and what it
            would return, is left as an `Inert`.
        max_opcodes: how many may be in it, as each may make an object; default: `MAX_OPCODES`. With a bound of one's own also floats, bytes, None, bools,
            any tuples and `functions` are read, and a value may be referred to again: whoever walks through the result
            has to expect one that contains itself.

    Raises:
        ValueError: it holds anything else, or is cut or makes no sense. The message is the end of a sentence.
    """
    admitted = frozenset((_BASIC if max_opcodes is None else _BOUNDED).split())
    limit = MAX_OPCODES if max_opcodes is None else max_opcodes
    machine = _Machine(key_type, functions, refers_back=max_opcodes is not None)
    try:
        for number, (opcode, argument, position) in enumerate(pickletools.genops(content)):  # ValueError if cut
            if number >= limit:
                raise ValueError(f"it holds more than {limit} opcodes")
            if opcode.name not in admitted:
                further = ", bytes and NumPy arrays" if functions else ""
                raise ValueError(
                    f"it holds {opcode.name} at byte {position}; expected dicts, lists, pairs, whole numbers and "
                    f"strings{further} only; anything else could run code or exhaust the memory"
                )
            if opcode.name != "STOP":
                machine.run(opcode.name, argument)
        return machine.stack.pop()  # what stands behind STOP is never read
    except (IndexError, KeyError) as error:
        raise ValueError("its opcodes do not fit together") from error
