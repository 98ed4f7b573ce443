"""What benchmarks read of a sweep's folder, and the files that they write."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_lab.store.record import Record
from lora_lab.store.sweep_folder import SweepFolder
from lora_lab.store.trial_folder import TrialFolder
from lora_lab.store.trials import Trial

RESULTS = Path(__file__).parent / "results"


def finished_trials(sweep: Path) -> Iterator[tuple[TrialFolder, Record]]:
    """Yield the trials of a sweep that finished, in the order in which its points were asked for."""
    planned = {trial.number: (trial.asked_place, trial.repeat) for trial in SweepFolder(sweep).read().trials}
    folders = sorted(sweep.glob("[0-9]*"), key=lambda folder: planned[int(folder.name.partition("-")[0])])
    for folder in map(TrialFolder, folders):
        record = folder.record()
        if record is not None and record.outcome == "finished":
            yield folder, record


def provenance(tags: Mapping[str, str], command: str) -> dict[str, str]:
    """Return where figures come from: command, date, commit, card, versions.

    LORA_LAB_COMMIT names the commit on a machine that has the files but not the history."""
    keep = {key: value for key, value in tags.items() if key.startswith(("version.", "device", "machine."))}
    today = datetime.now(UTC).date().isoformat()
    return {"command": command, "date": today, "commit": os.environ.get("LORA_LAB_COMMIT", tags["commit"]), **keep}


def stored(name: str) -> dict[str, Any]:
    """Return the content of results/NAME.json."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def where(origin: Mapping[str, str], started_ms: int | None = None) -> str:
    """Return on which machine a stored file was made, on which day if that is known, and at which commit."""
    if "device.uuid" in origin:
        device = f"{origin['device']} ({origin['device.uuid'][:12]})"
    else:
        device = f"{origin['machine.cpu_count']} cores of an {origin['machine.cpu']}"
    day = origin.get("date") if started_ms is None else date(started_ms)
    return ", ".join([device, *([day] if day else []), f"commit {origin['commit'][:7]}"])


def date(started_ms: int) -> str:
    """Return the day on which a trial started (UTC)."""
    return f"{datetime.fromtimestamp(started_ms / 1e3, UTC):%Y-%m-%d}"


def origin(trials: Sequence[Trial]) -> str:
    """Return on which card, on which days and at which commits trials ran, in one sentence."""
    cards = " and ".join(sorted({trial.place.device for trial in trials}))
    days = sorted({date(trial.started_ms) for trial in trials})
    commits = ", ".join(dict.fromkeys(map(_commit, trials)))
    return f"Measured on {cards}, {' to '.join(dict.fromkeys((days[0], days[-1])))}, commit {commits}."


def _commit(trial: Trial) -> str:
    changed = " with changes not yet committed" if trial.tags.get("dirty") == "true" else ""
    return trial.tags["commit"][:7] + changed


def write_report(out: Path, name: str, title: str, origin: dict[str, str], text: str, content: dict[str, Any]) -> None:
    """Write NAME.md for people: title, origin, text; and NAME.json: origin and content."""
    head = "\n".join(f"- {key}: {value}" for key, value in origin.items())
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(f"# {title}\n\n{head}\n\n{text}\n", encoding="utf-8")
    whole = json.dumps({"origin": origin, **content}, indent=1)
    (out / f"{name}.json").write_text(whole + "\n", encoding="utf-8")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
