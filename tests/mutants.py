"""Check that tests notice mistakes: change one place of a module at a time and run its tests on it.

    python -m tests.mutants [-n 8] [--seed 0] MODULE.py=TEST.py[,TEST.py...] ...

A change turns a comparison, swaps + and -, * and /, `and` and `or`, min and max, or drops a `not`; `n` places of each
module are drawn. What survives is printed with its line: a test that is missing, or a change that changes nothing.
Nothing is written to disk; each mutant runs in a process of its own, forked after the slow imports.
"""

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

_EARLY = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # the parent has imported some plugins already
SECONDS = 240
"""A mutant that takes longer is stuck, and so noticed."""
_SWAPS: list[tuple[type[ast.AST], type[ast.AST]]] = [
    (ast.Lt, ast.GtE),
    (ast.Gt, ast.LtE),
    (ast.Eq, ast.NotEq),
    (ast.Is, ast.IsNot),
    (ast.In, ast.NotIn),
    (ast.Add, ast.Sub),
    (ast.Mult, ast.Div),
    (ast.And, ast.Or),
]
SWAPPED = {one: other for pair in _SWAPS for one, other in (pair, pair[::-1])}
CALLS = {"min": "max", "max": "min"}


def mutants(tree: ast.Module) -> Iterator[tuple[int, str, ast.Module]]:
    """Yield the line of each change, what it was, and the changed module."""
    for number, node in enumerate(ast.walk(tree)):
        changed = copy.deepcopy(tree)
        twin = next(each for index, each in enumerate(ast.walk(changed)) if index == number)
        if _change(twin):
            ast.fix_missing_locations(changed)
            yield node.lineno, f"{ast.unparse(node)}  ->  {ast.unparse(twin)}", changed  # type: ignore[attr-defined]


def _change(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        node.ops[0] = SWAPPED[type(node.ops[0])]()  # type: ignore[call-overload]
    elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPPED:
        node.op = SWAPPED[type(node.op)]()  # type: ignore[assignment]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
        node.func.id = CALLS[node.func.id]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        node.op, node.operand = ast.Not(), ast.UnaryOp(op=ast.Not(), operand=node.operand)
    else:
        return False
    return True


class Mutant(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import the changed module instead of the one on disk."""

    def __init__(self, path: Path, tree: ast.Module) -> None:
        self.name, self.path, self.tree = ".".join(path.with_suffix("").parts), path, tree

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> object:  # type: ignore[override]
        """Find this one module."""
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        """Run the changed code."""
        exec(compile(self.tree, self.path, "exec"), module.__dict__)


def survives(mutant: Mutant | None, tests: list[str]) -> bool:
    """Run the tests in a forked process; return whether all pass."""
    child = os.fork()
    if not child:
        signal.alarm(SECONDS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        if mutant is not None:
            sys.meta_path.insert(0, mutant)
        import pytest

        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *_EARLY, *tests])))
    return os.waitpid(child, 0)[1] == 0


def main() -> None:
    """Print killed and survived for each module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="+", metavar="MODULE.py=TEST.py,...")
    parser.add_argument("-n", type=int, default=8, help="places of each module")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    for slow in ("mlflow", "scipy.stats", "statsmodels.regression.linear_model", "torch", "transformers", "peft"):
        importlib.import_module(slow)  # once for all; of lora_lab nothing, which would hide the changed module

    for module, tests in (text.split("=") for text in asked.modules):
        path = Path(module)
        found = list(mutants(ast.parse(path.read_text(encoding="utf-8"))))
        chosen = sorted(random.Random(asked.seed).sample(range(len(found)), min(asked.n, len(found))))
        if not survives(None, tests.split(",")):
            sys.exit(f"{tests} fails as it is")
        left = [found[i] for i in chosen if survives(Mutant(path, found[i][2]), tests.split(","))]
        print(f"{module}: {len(chosen) - len(left)} of {len(chosen)} killed ({len(found)} places)", flush=True)
        for line, what, _ in left:
            print(f"    :{line} {what}", flush=True)


if __name__ == "__main__":
    main()
