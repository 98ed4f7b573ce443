"""Find the code of this package that decides a figure, and compute its digest.

Comments and docstrings do not change the digest."""

import ast
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]

_RUNS = ("worker", "trial/variables")
"""The code that a measured process runs, and the code that sets its environment."""

_FIGURES = ("telemetry", "trial/idle_power", "store/record")
"""The code that computes figures from what was measured. `python -m lora_lab.recompute` computes them again."""


def code_digest() -> str:
    """Return the digest of the code that decides how a trial runs: what the worker imports, directly or not."""
    return _digest(_imported(_RUNS))


def telemetry_digest() -> str:
    """Return the digest of the code that computes figures, without the files that the worker imports too."""
    return _digest(_imported(_FIGURES) - _imported(_RUNS))


def deciding_files() -> list[Path]:
    """Return the files of both digests."""
    return sorted(_imported(_RUNS) | _imported(_FIGURES))


def _digest(files: Iterable[Path]) -> str:
    sha = hashlib.sha256()
    for path in sorted(files):
        sha.update(f"{path.relative_to(PACKAGE)}\n{ast.dump(_Bare().visit(_tree(path)))}\n".encode())
    return sha.hexdigest()[:16]


class _Bare(ast.NodeTransformer):
    """A transformer that removes strings that are statements, such as docstrings. A tree has no comments or layout."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:  # ast's name for it
        alone = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if alone else node


@functools.cache
def _imported(roots: tuple[str, ...]) -> frozenset[Path]:
    """Return the files of these modules and packages, and of everything that they import from this package."""
    found: set[Path] = set()
    left = [path for root in roots for path in _files(root)]
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            left += [each for name in _imports(_tree(path)) for each in _module(name)]
    return frozenset(found)


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


def _files(root: str) -> list[Path]:
    return sorted((PACKAGE / root).rglob("*.py")) or [PACKAGE / f"{root}.py"]


def _imports(tree: ast.Module) -> set[str]:
    """Return the dotted names that a module imports from this package. A name after `import` may be a module too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.partition(".")[2] for name in found if name.startswith(f"{PACKAGE.name}.")}


def _module(name: str) -> list[Path]:
    place = PACKAGE.joinpath(*name.split("."))
    return [path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()]
