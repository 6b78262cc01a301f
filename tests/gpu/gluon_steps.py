"""Takes the steps that order copies, products and partitions out of a Gluon kernel, one at a time; its tests must fail.

A kernel's steps are found in its source, and in that of the functions that it calls: what is added there is covered.
"""

import ast
import inspect
import sys
import textwrap
import types
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

ORDERING = ("mbarrier.", "warpgroup_mma_wait(", "tma.", "fence_async_shared(", "clear_rows(", "advance(", " ^= 1")
FOR_SPEED = ("in_order",)  # functions whose steps no result depends on
# What a kernel without a step may fail with: a sum in flight is no tensor, a slot may have no number.
FAILURES = (AssertionError, AttributeError, TypeError, NameError, np.exceptions.AxisError)


@dataclass(frozen=True)
class Step:
    """A statement of a function."""

    module: str
    function: str
    line: int  # of the function
    text: str

    def __str__(self) -> str:
        return f"{self.function}:{self.line}: {self.text}"


def steps(kernel: Any) -> list[Step]:
    """Every such statement of a kernel and of the functions of its package that it calls."""
    found = []
    for function in [function for name, function in _reached(kernel.fn, {}).items() if name not in FOR_SPEED]:
        for node in ast.walk(_parsed(function)):
            text = ast.unparse(node) if isinstance(node, (ast.Expr, ast.Assign, ast.AugAssign)) else ""
            if any(name in text for name in ORDERING):
                found.append(Step(function.__module__, function.__name__, node.lineno, text))
    return found


def take_out(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a function without the step in the place of the one that has it, wherever that is imported."""
    module = sys.modules[step.module]
    original = getattr(module, step.function)
    tree = _Without(step).visit(_parsed(original.fn))
    scope = dict(vars(module))
    exec(compile(ast.fix_missing_locations(tree), str(module.__file__), "exec"), scope)
    changed = types.SimpleNamespace(fn=scope[step.function])
    for place in [place for name, place in sys.modules.items() if name.startswith("forge_core.kernels.gpu.")]:
        if vars(place).get(step.function) is original:
            monkeypatch.setattr(place, step.function, changed)


class _Without(ast.NodeTransformer):
    """Replaces a step by `pass`."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.stmt) and (node.lineno, ast.unparse(node)) == (self.step.line, self.step.text):
            return ast.Pass()
        return self.generic_visit(node)


def _reached(function: types.FunctionType, found: dict[str, types.FunctionType]) -> dict[str, types.FunctionType]:
    found[function.__name__] = function
    for name in function.__code__.co_names:
        called = getattr(vars(sys.modules[function.__module__]).get(name), "fn", None)
        if isinstance(called, types.FunctionType) and called.__module__.startswith("forge_core.") and name not in found:
            _reached(called, found)
    return found


def _parsed(function: types.FunctionType) -> ast.Module:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    assert isinstance(tree.body[0], ast.FunctionDef)
    tree.body[0].decorator_list = []
    return tree
