"""How often the report's intervals hold the truth, and how wide they are, in simulated sessions.

python -m benchmarks.coverage           simulate (about five minutes of a CPU core), and store results/cpu/coverage

The docs quote the tables: python -m benchmarks.numbers.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.reports import markdown, write_report
from benchmarks.simulated import every
from lora_lab.store.environment import environment

OUT = Path(__file__).parent / "results/cpu"

Rows = Sequence[Mapping[str, Any]]
Content = Mapping[str, Rows]


def tables(content: Content) -> dict[str, str]:
    """Return the tables in Markdown, by the names of their blocks in docs."""
    return {name: make(content[name.removeprefix("coverage-")]) for name, make in MADE.items()}


def quoted(name: str) -> str:
    """Return the table of a block in docs, from the stored figures."""
    origin = _file()["origin"]
    return f"{tables(stored())[name]}\n\nSimulated on {origin['date']}, commit {origin['commit'][:7]}."


def stored() -> Content:
    """Read the stored figures."""
    return {name: rows for name, rows in _file().items() if name != "origin"}


def _file() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((OUT / "coverage.json").read_text(encoding="utf-8"))
    return content


def main() -> None:
    content = every()
    origin = _origin()
    text = "\n\n".join(f"## {name}\n\n{table}" for name, table in tables(content).items())
    write_report(OUT, "coverage", "Coverage and width of intervals, simulated", origin, text, content)
    print(text)


def _averages(rows: Rows) -> str:
    head = [
        "cells x blocks",
        "block effect",
        "this session holds",
        "over blocks holds",
        "sessions like it holds",
        "this session: width / exact",
        "over blocks: width / exact",
        "sessions like it: width / exact",
    ]
    names = ("this_session", "over_blocks", "sessions_like_it")
    return markdown(
        head,
        [
            [
                f"{row['cells']} x {row['blocks']}",
                f"{row['block_sd']:g}",
                *(_percent(row[name]) for name in names),
                f"{row['width_this_session']:.2f}" if not row["block_sd"] else "-",
                *(f"{row[f'width_{name}']:.2f}" for name in names[1:]),
            ]
            for row in rows
        ],
    )


def _repeats(rows: Rows) -> str:
    first = rows[0]["reach"]
    return markdown(
        ["repeats", "sessions like it holds", "half-width, with three repeats 1"],
        [[str(row["blocks"]), _percent(row["sessions_like_it"]), f"{row['reach'] / first:.2f}"] for row in rows],
    )


def _orders(rows: Rows) -> str:
    return markdown(
        ["order in a block", "the machine", "this session holds", "sessions like it holds"],
        [
            [row["order"], row["noise"], _percent(row["this_session"]), _percent(row["sessions_like_it"])]
            for row in rows
        ],
    )


def _hosts(rows: Rows) -> str:
    return markdown(
        ["hosts", "host effect", "one session holds", "mean over hosts holds", "its width / exact", "prediction holds"],
        [
            [
                str(row["hosts"]),
                f"{row['host_sd']:g}",
                _percent(row["one_session"]),
                _percent(row["pooled"]),
                f"{row['width_pooled']:.2f}",
                "-" if row["prediction"] is None else _percent(row["prediction"]),
            ]
            for row in rows
        ],
    )


def _windows(rows: Rows) -> str:
    correlations = sorted({row["correlation"] for row in rows})
    by_steps: dict[int, dict[float, str]] = {}
    for row in rows:
        by_steps.setdefault(row["steps"], {})[row["correlation"]] = _percent(row["coverage"])
    return markdown(
        ["steps", *(f"correlation {each:g}" for each in correlations)],
        [[str(steps), *(found[each] for each in correlations)] for steps, found in by_steps.items()],
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _origin() -> dict[str, str]:
    facts = environment()
    keep = ("commit", "dirty", "version.python")
    packages = {f"version.{name}": version(name) for name in ("numpy", "scipy")}
    return {
        "command": "python -m benchmarks.coverage",
        "date": datetime.now(UTC).date().isoformat(),
        **{key: facts[key] for key in keep},
        **packages,
    }


MADE = {
    "coverage-averages": _averages,
    "coverage-repeats": _repeats,
    "coverage-orders": _orders,
    "coverage-hosts": _hosts,
    "coverage-windows": _windows,
}
"""The blocks in docs, and what makes them of their rows."""


if __name__ == "__main__":
    main()
