from __future__ import annotations

import time
from typing import Any

import pytest

from epi_ds.data.skills.safe_eval import MAX_SIZE, RefusedCodeError, call, parse_function


def run(expression: str, *arguments: Any) -> Any:
    return call(parse_function(f"def f({', '.join('xyz'[: len(arguments)])}):\n    return {expression}"), arguments)


@pytest.mark.parametrize(
    ("expression", "arguments"),
    [
        ("x + y * 2 - 7 // 2", (3, 4)),
        ("x / 4 + y % 3 - 2 ** 5", (3, -4)),
        ("-x if not x > 2 else +x", (1,)),
        ("1 < x <= y != 9", (2, 3)),
        ("x and y or 5", (0, 3)),
        ("x or y and 5", (0, 3)),
        ("x and y", (2, 0)),
        ("x[0] + x[-1]", ([4, 5, 6],)),
        ("x[1:][::-1]", ([4, 5, 6],)),
        ("x[:2] + 'z' * 3", ("word",)),
        ("[x, y] * 2", (1, "a")),
        ("sum(x) + len(x) + max(x) - min(x) + abs(-3)", ([4, 5, 6],)),
        ("sorted(x)[1] in x and 9 not in x", ([6, 4, 5],)),
        ("max(x, y, 3)", (1, 2)),
        ("len(y) if len(x) == 0 else x", ("", [1.5, True])),
    ],
)
def test_agrees_with_python(expression: str, arguments: tuple[Any, ...]) -> None:
    expected = eval(expression, {}, dict(zip("xyz", arguments, strict=False)))
    result = run(expression, *arguments)
    assert (result, type(result)) == (expected, type(expected))


@pytest.mark.parametrize(
    "expression",
    [
        # The machine.
        "__import__('os')",
        "open('x')",
        "eval('1')",
        "exec('1')",
        "getattr(x, 'y')",
        "print(x)",
        "input()",
        "globals()",
        # Attributes and dunder tricks.
        "x.real",
        "x.__class__",
        "().__class__.__bases__[0].__subclasses__()",
        "__builtins__",
        "''.join([])",
        "'{0.__class__}'.format(x)",
        "f'{x}'",
        "f'{x:>999999999}'",
        # Loops in expressions, and calls of anything but a builtin.
        "[y for y in [1, 2]]",
        "{y for y in [1, 2]}",
        "sum(y for y in [1, 2])",
        "(lambda: 1)()",
        "(lambda y: y(y))(lambda y: y(y))",
        "f(x)",
        "x(1)",
        "[len][0]([1])",
        "len(*[[1]])",
        "sorted([1], reverse=True)",
        "(y := 1)",
        "(yield x)",
        "await x",
        # Size.
        "9 ** 9 ** 9",
        "9 ** 999999999",
        "2 ** -99999",
        "(-8) ** 0.5",
        "1 << 999999999",
        "~x",
        "10 ** 20",
        "999999999999 * 999999999999",
        "1e999",
        "1e300 * 1e300",
        "1e999 - 1e999",
        "'a' * 10 ** 9",
        "10 ** 9 * 'a'",
        "[0] * 10 ** 9",
        "['a' * 900] * 900",
        "'%999999999d' % 1",
        "'%s' % x",
        # Types.
        "None",
        "...",
        "1j",
        "b'a'",
        "(1, 2)",
        "{1: 2}",
        "{1, 2}",
        "[[1]]",
        "x is 1",
        # Failures.
        "y",
        "x / 0",
        "x % 0",
        "[1][5]",
        "[1][::0]",
        "'a' + 1",
        "'a' * 'b'",
        "'a' - 'b'",
        "'a' < 1",
        "max(1)",
        "len(1)",
        "sorted([1, 'a'])",
        "sum(['a'])",
        "-'a'",
    ],
)
def test_refuses(expression: str) -> None:
    begun = time.perf_counter()
    with pytest.raises(RefusedCodeError, match=r"refused: .*; write one short function"):
        run(expression, 1)
    assert time.perf_counter() - begun < 0.5


@pytest.mark.parametrize(
    "source",
    [
        "",
        "1 + 1",
        "import os",
        "import os\ndef f(x):\n    return x",
        "def f(x):\n    return x\nf(1)",
        "def f(x):\n    import os\n    return x",
        "def f(x):\n    while True: pass",
        "def f(x):\n    for y in x: pass\n    return x",
        "def f(x):\n    return",
        "def f(x):\n    x",
        "def f(x):\n    '''Text.'''\n    return x",
        "def f(x):\n    def g(): return f(x)\n    return g()",
        "def f(x=print()):\n    return x",
        "def f(*x):\n    return x",
        "def f(**x):\n    return x",
        "def f(*, x):\n    return x",
        "def f(*, x=1):\n    return x",
        "def f(x, /):\n    return x",
        "def f(x: print()):\n    return x",
        "def f(x) -> print():\n    return x",
        "@print\ndef f(x):\n    return x",
        "async def f(x):\n    return x",
        "f = lambda x: x",
        "class f:\n    pass",
        "def f(x) return x",
        "def f(x):\nreturn x",
        "def f(x):\n    return x\x00",
        "def f(x):\n    return '\ud800'",
        "def f(x):\n    return " + "x + " * 60 + "x",
        "def f(x):\n    return " + "(" * 400 + "x" + ")" * 400,
        "def f(x):\n    return " + "-" * 900 + "x",
        "(" * 900,
        "[" * 900,
        "a" * 10**5,
        "def f(x):\n    return " + "-" * 10**5 + "x",
        "def f(x):\n    return " + "9" * 10**5,
    ],
)
def test_refuses_sources(source: str) -> None:
    begun = time.perf_counter()
    with pytest.raises(RefusedCodeError):
        call(parse_function(source), [1])
    assert time.perf_counter() - begun < 0.5


def test_a_deep_expression_within_the_limits_is_computed() -> None:
    assert run("-" * 40 + "x", 5) == 5


def test_the_largest_values_are_quick() -> None:
    begun = time.perf_counter()
    words = ["ab"] * (MAX_SIZE // 3)
    assert run("sorted(x + [])[0] in x and max(x) == min(x)", words) is True
    with pytest.raises(RefusedCodeError):
        run("len(x + x)", words)
    assert time.perf_counter() - begun < 0.5


def test_warnings_of_the_parser_stay_silent(recwarn: pytest.WarningsRecorder) -> None:
    assert run(r"'\d' + ''") == "\\d"
    assert not recwarn.list


def test_the_number_of_arguments_must_fit() -> None:
    with pytest.raises(RefusedCodeError, match="'f' with 2 arguments refused: it has the parameters"):
        call(parse_function("def f(x): return x"), [1, 2])
