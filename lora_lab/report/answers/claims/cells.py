"""One factor's effect at each setting of the rest by itself.

An average over a grid hides what happens at one setting, and a claim of "up to" is about one. So each setting of
everything else gets an interval of its own, from its own repeats only: none borrows the noise of another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_lab.report.answers.claims.study import ContrastClaim, Study
from lora_lab.report.answers.claims.verdict import has_settings
from lora_lab.report.measures import Measure
from lora_lab.report.statistics.blocks import figures
from lora_lab.report.statistics.differences import Difference
from lora_lab.report.statistics.factors import Factor
from lora_lab.report.statistics.pairs import paired_settings
from lora_lab.store.trials import Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimSetting:
    """The pairs of trials at one setting of everything but the claim's factor."""

    trials: tuple[Trial, ...]
    regime: str
    """As in contrasts."""
    difference: Difference
    """`of` minus `over`."""
    ends: tuple[str, ...]
    """The study's runs that were set so, but for the claim's factor: the claim's own settings."""

    @property
    def repeated(self) -> bool:
        """Return whether it has an interval."""
        return bool(self.difference.variances)


def factor_of(claim: ContrastClaim) -> Factor:
    """Return the claim's factor alone.

    Pairs have all else equal, so they need no rank: what a stray trial ties together in the whole design does not
    matter to them."""
    return Factor(name=claim.factor, keys=(claim.factor,), levels=(claim.over, claim.of))


def settings_of(study: Study, claim: ContrastClaim, sides: Sequence[Trial], measure: Measure) -> list[ClaimSetting]:
    """Return the settings in which a block (the same repeat of the same sweep) holds both levels."""
    return [
        ClaimSetting(
            trials=setting.trials,
            regime=setting.regime,
            difference=setting.difference,
            ends=tuple(run for run in claim.ends if has_settings(setting.trials[0], study.settings(run), claim.factor)),
        )
        for setting in paired_settings(figures(sides, measure), factor_of(claim), claim.of)
    ]
