"""The losses of the held-out rows as a tag of a run keeps them, so that two runs can be compared row by row."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from lora_lab.quality.paired import Change, change

TAG = "heldout_rows"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldoutRows:
    """The loss of each held-out row after training."""

    digest: str
    """Of the rows' token ids and labels."""
    nats: tuple[float, ...]
    """Summed over the row's trained tokens."""
    tokens: tuple[int, ...]

    def written(self) -> str:
        """Return the tag's text."""
        return json.dumps({"digest": self.digest, "nats": self.nats, "tokens": self.tokens}, separators=(",", ":"))


def heldout_rows(tags: Mapping[str, str]) -> HeldoutRows | None:
    """Return the rows of a run; None where it has none, or a store has cut the tag."""
    try:
        found = json.loads(tags.get(TAG, ""))
        rows = HeldoutRows(
            digest=str(found["digest"]), nats=tuple(map(float, found["nats"])), tokens=tuple(map(int, found["tokens"]))
        )
    except (KeyError, TypeError, ValueError):
        return None
    return rows if len(rows.nats) == len(rows.tokens) else None


def mean_of(runs: list[HeldoutRows]) -> HeldoutRows | None:
    """Return each row's mean loss over runs; None unless all runs have the same rows."""
    if len({run.digest for run in runs}) != 1:
        return None
    nats = tuple(sum(each) / len(runs) for each in zip(*(run.nats for run in runs), strict=True))
    return HeldoutRows(digest=runs[0].digest, nats=nats, tokens=runs[0].tokens)


def difference(one: HeldoutRows | None, other: HeldoutRows | None) -> Change | None:
    """Return the loss of `one` minus that of `other`; None unless both have the same rows."""
    if one is None or other is None or one.digest != other.digest:
        return None
    return change(one.nats, other.nats, one.tokens)
