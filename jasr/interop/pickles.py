"""Reading a pickle as data: its opcodes are interpreted here and nothing that it names is ever
imported, called or given attributes.

Python's unpickler with a restricted `find_class` still calls what it finds and writes attributes
on it (torch's own weights_only was bypassed twice: CVE-2025-32434, CVE-2026-24747). This reader has
only the opcodes that data needs; a call in the pickle runs one of the functions that the reader's
caller gave, becomes an inert `Opaque`, or is refused by name.
"""

import collections
import dataclasses
import io
import pickletools
import typing

LARGEST = 64 << 20  # bytes; the pickle of a 7 B parameter checkpoint is below one MiB


class PickleError(ValueError):
    """The pickle is damaged, or asks for something that reading data does not need."""


class Global(typing.NamedTuple):
    """A name that the pickle refers to; never looked up."""

    name: str


@dataclasses.dataclass
class Opaque:
    """An object of a class that is not loaded: what would have been given to it."""

    name: str
    args: tuple = ()
    state: object = None
    items: list = dataclasses.field(default_factory=list)


class _Mark:
    pass


_MARK = _Mark()
_PUSH = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8".split()
)
_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_SCALAR = (str, bytes, int, float, bool, type(None), Global)


def loads(data, *, functions=None, values=None, opaque=(), persistent=None):
    """The object that the pickle describes, of dict, list, tuple, set, scalars, `Global`, `Opaque`
    and what `functions` return.

    Args:
      data: the pickle, bytes of at most 64 MiB.
      functions: {"module.name": function}, which the pickle may call.
      values: {"module.name": object}, which the pickle may refer to.
      opaque: module names or "module.name"s whose objects are read as `Opaque`.
      persistent: function of a persistent id.

    Raises:
      PickleError: with the name of the global or the opcode that is refused, or the damage.
    """
    if len(data) > LARGEST:
        raise PickleError(f"the pickle has {len(data)} bytes, more than the {LARGEST} allowed")
    machine = _Machine(functions or {}, values or {}, tuple(opaque), persistent)
    try:
        for opcode, arg, _ in pickletools.genops(io.BytesIO(data)):
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, arg)
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError) as e:
        raise PickleError(f"damaged pickle: {type(e).__name__}: {e}") from e
    raise PickleError("damaged pickle: no STOP")


class _Machine:
    """The pickle machine's stack and memo."""

    def __init__(self, functions, values, opaque, persistent):
        self.functions, self.values, self.opaque = functions, values, opaque
        self.persistent = persistent
        self.stack, self.memo = [], {}

    def pop(self):
        value = self.stack.pop()
        if value is _MARK:
            raise PickleError("damaged pickle: a mark where an object should be")
        return value

    def pop_to_mark(self):
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:  # a negative index ends in an IndexError
            at -= 1
            if at < 0:
                raise PickleError("damaged pickle: no mark")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def step(self, op, arg):
        if op in _PUSH:
            self.stack.append(arg)
        elif op in _CONSTANT:
            self.stack.append(_CONSTANT[op])
        elif op in _EMPTY:
            self.stack.append(_EMPTY[op]())
        elif op in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[arg] = self.stack[-1]
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[arg])
        elif op not in ("PROTO", "FRAME"):
            method = getattr(self, "op_" + op.lower(), None)
            if method is None:
                raise PickleError(f"refused: the pickle uses opcode {op}, which data does not need")
            method(arg)

    # ---- containers

    def op_mark(self, _):
        self.stack.append(_MARK)

    def op_pop(self, _):
        self.stack.pop()

    def op_pop_mark(self, _):
        self.pop_to_mark()

    def op_dup(self, _):
        self.stack.append(self.stack[-1])

    def op_tuple(self, _):
        self.stack.append(tuple(self.pop_to_mark()))

    def op_tuple1(self, _):
        self.stack.append((self.pop(),))

    def op_tuple2(self, _):
        second = self.pop()
        self.stack.append((self.pop(), second))

    def op_tuple3(self, _):
        third, second = self.pop(), self.pop()
        self.stack.append((self.pop(), second, third))

    def op_list(self, _):
        self.stack.append(self.pop_to_mark())

    def op_frozenset(self, _):
        self.stack.append(frozenset(map(key, self.pop_to_mark())))

    def op_dict(self, _):
        values = self.pop_to_mark()
        self.stack.append({})
        self.set_items(values)

    def op_append(self, _):
        self.extend([self.pop()])

    def op_appends(self, _):
        self.extend(self.pop_to_mark())

    def op_additems(self, _):
        values = self.pop_to_mark()
        self.target(set).update(map(key, values))

    def op_setitem(self, _):
        value = self.pop()
        self.set_items([self.pop(), value])

    def op_setitems(self, _):
        self.set_items(self.pop_to_mark())

    def target(self, *types):
        target = self.stack[-1]
        if not isinstance(target, types):
            raise PickleError(f"damaged pickle: a {type(target).__name__} cannot take items")
        return target

    def extend(self, values):
        target = self.target(list, Opaque)
        (target.items if isinstance(target, Opaque) else target).extend(values)

    def set_items(self, values):
        if len(values) % 2:
            raise PickleError("damaged pickle: a key without a value")
        target = self.target(dict, Opaque)
        for name, value in zip(values[::2], values[1::2], strict=True):
            if isinstance(target, Opaque):
                target.items.append((name, value))
            else:
                target[key(name)] = value

    # ---- names and calls

    def op_global(self, arg):
        self.refer(arg.replace(" ", ".", 1))

    def op_stack_global(self, _):
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:  # tuples of tuples print for ever
            raise PickleError("damaged pickle: a global whose name is no text")
        self.refer(f"{module}.{name}")

    def refer(self, name):
        if name in self.values:
            self.stack.append(self.values[name])
        elif name in self.functions or self.is_opaque(name):
            self.stack.append(Global(name))
        else:
            raise PickleError(
                f"refused: the pickle asks for {name!r}, which weights do not need. Nothing of it "
                "was run. If it is only the class of a hyper-parameter, name it (or its module) in "
                "`opaque`, and it is read as inert data"
            )

    def is_opaque(self, name):
        return any(name == allowed or name.startswith(allowed + ".") for allowed in self.opaque)

    def call(self, function, args):
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise PickleError("damaged pickle: a call of something that is not a name")
        if function.name in self.functions:
            return self.functions[function.name](*args)
        return Opaque(function.name, args)

    def op_reduce(self, _):
        args = self.pop()
        self.stack.append(self.call(self.pop(), args))

    op_newobj = op_reduce

    def op_newobj_ex(self, _):
        keywords, args = self.pop(), self.pop()
        if keywords:
            args = (*args, keywords)
        self.stack.append(self.call(self.pop(), args))

    def op_build(self, _):
        state = self.pop()
        target = self.stack[-1]
        if isinstance(target, Opaque):
            target.state = state
        elif not isinstance(target, collections.OrderedDict):  # a state dict's _metadata
            raise PickleError(f"refused: the pickle sets attributes of a {type(target).__name__}")

    def op_binpersid(self, _):
        if self.persistent is None:
            raise PickleError("refused: the pickle refers to data outside itself")
        self.stack.append(self.persistent(self.pop()))


def key(value):
    """The value, if it may be a dict key or a set's item: a scalar or a tuple of scalars.

    Hashing a tuple of tuples of tuples ... recurses in C without a limit.
    """
    parts = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(p, _SCALAR) for p in parts):
        raise PickleError(f"damaged pickle: a {type(value).__name__} as a key")
    return value
