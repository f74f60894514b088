"""Run a small Python function written by a model, without ever executing it as Python.

The source is parsed, everything outside a short list of expressions is refused, and what remains is computed
by the interpreter below. There are no loops, no calls but to a few builtins and no attributes, so the work is
bounded by the number of nodes, and every value is bounded in size before it is built.
"""

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

Scalar: TypeAlias = bool | int | float | str
Value: TypeAlias = Scalar | list[Scalar]

MAX_SOURCE = 1000
"""Characters of source code."""
MAX_NODES = 100
"""Nodes of the syntax tree; this bounds the depth of the interpreter's recursion as well."""
MAX_SIZE = 1000
"""Characters of a string, or list items plus the characters of those that are strings."""
MAX_NUMBER = 10**12
"""Magnitude of a number."""
MAX_EXPONENT = 20
"""Magnitude of an exponent."""


class RefusedCodeError(ValueError):
    """The code is not a function this interpreter runs, or it failed on its arguments."""


class Function(NamedTuple):
    """A parsed function: a name, parameters, and the expression it returns."""

    name: str
    parameters: tuple[str, ...]
    body: ast.expr


def parse_function(source: str) -> Function:
    """Parse source code that must be one function with plain parameters and a single return.

    The source is not trusted; the function's expression is checked only when ``call`` computes it. Raises
    RefusedCodeError if the source is too long, does not parse, or is anything else.
    """
    if len(source) > MAX_SOURCE:
        raise _refusal(f"source of {len(source)} characters", f"at most {MAX_SOURCE} are allowed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source.strip())
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise _refusal("source", f"it must parse as Python ({type(error).__name__})") from error
    if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
        raise _refusal("source", f"its syntax tree must have at most {MAX_NODES} nodes")
    match tree.body:
        case [ast.FunctionDef(body=[ast.Return(value=ast.expr() as body)], decorator_list=[], returns=None) as found]:
            return Function(found.name, _parameters(found), body)
        case _:
            raise _refusal("source", "it must be one plain `def` whose body is one `return` of a value")


def call(function: Function, arguments: Sequence[Value]) -> Value:
    """Compute what a parsed function returns for some arguments.

    There is one argument for each parameter. Raises RefusedCodeError if the expression uses what is not allowed,
    exceeds a bound, or fails, as a division by zero does.
    """
    if len(arguments) != len(function.parameters):
        raise _refusal(
            f"call of {function.name!r} with {len(arguments)} arguments",
            f"it has the parameters {list(function.parameters)}",
        )
    names = dict(zip(function.parameters, arguments, strict=True))
    try:
        return _evaluate(function.body, names)
    except RefusedCodeError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise _refusal(f"call of {function.name!r}", f"it must not fail ({type(error).__name__}: {error})") from error


def _refusal(what: str, rule: str) -> RefusedCodeError:
    return RefusedCodeError(f"{what} refused: {rule}; write one short function that returns one expression")


def _unsupported(node: ast.AST) -> RefusedCodeError:
    place = f"line {getattr(node, 'lineno', '?')}, column {getattr(node, 'col_offset', '?')}"
    return _refusal(f"{type(node).__name__} at {place}", "only simple expressions are allowed")


def _parameters(found: ast.FunctionDef) -> tuple[str, ...]:
    given = found.args
    special = [*given.posonlyargs, *given.kwonlyargs, *given.defaults, given.vararg, given.kwarg]
    if any(special) or any(arg.annotation for arg in given.args) or getattr(found, "type_params", None):
        raise _refusal(f"function {found.name!r}", "its parameters must be plain names")
    return tuple(arg.arg for arg in given.args)


def _bounded(value: Any) -> Value:
    """Return ``value`` if it is of an allowed type and within the bounds."""
    if type(value) is list and any(type(item) not in (bool, int, float, str) for item in value):
        raise _refusal("list", "only numbers and strings may be its items")
    if type(value) in (list, str):
        within = _size(value) <= MAX_SIZE
    elif type(value) in (bool, int, float):
        within = math.isfinite(value) and abs(value) <= MAX_NUMBER
    else:
        raise _refusal(f"value of type {type(value).__name__}", "only numbers, strings and lists are allowed")
    if not within:
        raise _refusal(f"{type(value).__name__} value", f"size {MAX_SIZE} and magnitude {MAX_NUMBER} are the most")
    return value


def _size(value: str | list[Any]) -> int:
    if isinstance(value, str):
        return len(value)
    return len(value) + sum(len(item) for item in value if isinstance(item, str))


def _is_number(value: Value) -> bool:
    return isinstance(value, bool | int | float)


def _numeric(compute: Callable[[Any, Any], Any]) -> Callable[[Value, Value], Any]:
    def apply(left: Value, right: Value) -> Any:
        # `%` on a string formats it, with a width the string itself may choose.
        if not (_is_number(left) and _is_number(right)):
            raise TypeError("both operands must be numbers")
        return compute(left, right)

    return apply


def _multiply(left: Any, right: Any) -> Any:
    if not _is_number(left):
        left, right = right, left
    if isinstance(right, str | list) and isinstance(left, int) and _size(right) * left > MAX_SIZE:
        raise _refusal(f"repetition {left} times", f"a sequence has a size of at most {MAX_SIZE}")
    return left * right


def _power(left: Any, right: Any) -> Any:
    if abs(right) > MAX_EXPONENT:
        raise _refusal(f"exponent {right}", f"its magnitude must be at most {MAX_EXPONENT}")
    return left**right


_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: _numeric(operator.sub),
    ast.Mult: _multiply,
    ast.Div: _numeric(operator.truediv),
    ast.FloorDiv: _numeric(operator.floordiv),
    ast.Mod: _numeric(operator.mod),
    ast.Pow: _numeric(_power),
}
_UNARY: Mapping[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.Not: operator.not_,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, group: item in group,
    ast.NotIn: lambda item, group: item not in group,
}
_BUILTINS: Mapping[str, Callable[..., Any]] = {
    "abs": abs,
    "len": len,
    "max": max,
    "min": min,
    "sorted": sorted,
    "sum": sum,
}


def _evaluate(node: ast.expr, names: Mapping[str, Value]) -> Value:
    handler = _HANDLERS.get(type(node))
    if handler is None:
        raise _unsupported(node)
    return _bounded(handler(node, names))


def _constant(node: ast.Constant, names: Mapping[str, Value]) -> Any:
    return node.value


def _name(node: ast.Name, names: Mapping[str, Value]) -> Any:
    if node.id not in names:
        raise _refusal(f"name {node.id!r}", f"only the parameters {sorted(names)} have values")
    return names[node.id]


def _list(node: ast.List, names: Mapping[str, Value]) -> Any:
    return [_evaluate(item, names) for item in node.elts]


def _binary(node: ast.BinOp, names: Mapping[str, Value]) -> Any:
    compute = _BINARY.get(type(node.op))
    if compute is None:
        raise _unsupported(node)
    return compute(_evaluate(node.left, names), _evaluate(node.right, names))


def _unary(node: ast.UnaryOp, names: Mapping[str, Value]) -> Any:
    compute = _UNARY.get(type(node.op))
    if compute is None:
        raise _unsupported(node)
    return compute(_evaluate(node.operand, names))


def _boolean(node: ast.BoolOp, names: Mapping[str, Value]) -> Any:
    stops = isinstance(node.op, ast.Or)
    value: Value = not stops
    for operand in node.values:
        value = _evaluate(operand, names)
        if bool(value) is stops:
            break
    return value


def _comparison(node: ast.Compare, names: Mapping[str, Value]) -> Any:
    left = _evaluate(node.left, names)
    for sign, operand in zip(node.ops, node.comparators, strict=True):
        compute = _COMPARE.get(type(sign))
        if compute is None:
            raise _unsupported(node)
        right = _evaluate(operand, names)
        if not compute(left, right):
            return False
        left = right
    return True


def _conditional(node: ast.IfExp, names: Mapping[str, Value]) -> Any:
    return _evaluate(node.body if _evaluate(node.test, names) else node.orelse, names)


def _subscript(node: ast.Subscript, names: Mapping[str, Value]) -> Any:
    group: Any = _evaluate(node.value, names)
    if not isinstance(node.slice, ast.Slice):
        return group[_evaluate(node.slice, names)]
    ends = [
        None if end is None else _evaluate(end, names) for end in (node.slice.lower, node.slice.upper, node.slice.step)
    ]
    return group[slice(*ends)]


def _call(node: ast.Call, names: Mapping[str, Value]) -> Any:
    if not isinstance(node.func, ast.Name) or node.func.id not in _BUILTINS or node.func.id in names:
        raise _unsupported(node)
    if node.keywords:
        raise _refusal(f"call of {node.func.id!r}", "keyword arguments are not allowed")
    return _BUILTINS[node.func.id](*[_evaluate(argument, names) for argument in node.args])


_HANDLERS: Mapping[type[ast.expr], Callable[[Any, Mapping[str, Value]], Any]] = {
    ast.Constant: _constant,
    ast.Name: _name,
    ast.List: _list,
    ast.BinOp: _binary,
    ast.UnaryOp: _unary,
    ast.BoolOp: _boolean,
    ast.Compare: _comparison,
    ast.IfExp: _conditional,
    ast.Subscript: _subscript,
    ast.Call: _call,
}
