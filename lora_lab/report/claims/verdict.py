"""A claim, judged: the verdict with what it rests on."""

from dataclasses import dataclass

from lora_lab.report.effects.estimates import Estimate

SUPPORTED = "supported"
CONTRADICTED = "contradicted"
CONFOUNDED = "confounded in the original"
NOT_TESTABLE = "not testable here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One thing that the trials at hand show of a claim."""

    text: str
    """In words, with the card and the regime; figures with units and intervals."""
    place: str
    regime: str
    """ "" where it makes no difference (memory)."""
    trials: tuple[str, ...]
    """Run ids."""
    estimate: Estimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A claim, judged."""

    claim: str
    """Its id."""
    says: str
    verdict: str
    """One of the four words."""
    why: str
    original: str
    """What is to be said of the original's evidence: which factors changed together, true by definition, ..."""
    seen: tuple[Seen, ...]
    settle: str
    """What would settle it on the original's card: a command."""
