"""Ask lora_lab.fit about a trial's memory before it runs: for its record, and to refuse what cannot fit."""

from collections.abc import Sequence

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.fit.advice import advise
from lora_lab.fit.beforehand import beforehand, capacity, verdict_of
from lora_lab.fit.estimate import DOUBTFUL, FITS, TOO_LARGE
from lora_lab.fit.shapes import shapes_of
from lora_lab.fit.together import filled
from lora_lab.options import Checkpointing, Plan
from lora_lab.outcome import Unsupported
from lora_lab.placement import Placement
from lora_lab.telemetry.figures import GIB
from lora_lab.telemetry.host_facts import HostFacts, MemoryEstimate
from lora_lab.trial.devices import check_capable


def note_estimate(seen: HostFacts, config: TrialConfig, members: Sequence[TrialConfig] = ()) -> None:
    """Keep what lora_lab.fit says of the trial on its card, or why it says nothing. No failure of it is raised.

    Args:
        config: of members that train together all of them as one.
        members: each of them; none for a trial alone."""
    if seen.card_bytes is None:
        seen.no_estimate = seen.no_sensor
        return
    try:
        answer = beforehand(config)
        seen.no_estimate = answer.reason
        if answer.estimate is not None:
            more = filled(members) if members else 0
            seen.estimate = MemoryEstimate(
                allocated=answer.estimate.allocated + more,
                reserved=answer.estimate.reserved + more,
                card=answer.estimate.card + more,
                low=answer.estimate.low + more,
                enough=answer.estimate.enough + more,
                high=answer.estimate.high + more,
                slots=config.rows_per_step * config.seq_len // seen.members,  # those of a member's own steps
                verdict=verdict_of(answer.estimate, capacity(config, seen.card_bytes) - more),
            )
    except Exception as fault:  # an estimate is worth less than a trial
        seen.no_estimate = f"the estimate failed ({type(fault).__name__}: {fault})"


def check_fits(config: TrialConfig, placement: Placement, seen: HostFacts) -> str:
    """Check a trial before it starts, unless plan=all. What this machine cannot run ends as unsupported, for a reason
    that no change of its size mends.

    Returns: a warning where it is doubtful whether the trial fits; otherwise nothing.

    Raises: InvalidInput when it is certainly too large."""
    said = seen.estimate
    if said is None or seen.card_bytes is None or config.plan is Plan.all or not _runs_on(config, placement):
        return ""
    room = capacity(config, seen.card_bytes)
    whose = f"{placement.name} has" if room == seen.card_bytes else f"vram_limit_gib={config.vram_limit_gib:g} allows"
    if said.verdict == DOUBTFUL and said.low > room:
        return (
            f"rows of seq_len={config.seq_len} tokens do not fit: they need at least {_gib(said.low)} GiB, and {whose} "
            f"{_gib(room)} GiB. It goes on because your rows may be shorter. Lower seq_len to the longest to be sure; "
            "`lora-lab fit --vram` with the same settings says what fits"
        )
    if said.verdict == DOUBTFUL:
        return (
            f"it is not certain that this trial fits: it needs {_gib(said.low)} to {_gib(said.enough)} GiB, and "
            f"{whose} {_gib(room)} GiB"
        )
    if said.verdict != TOO_LARGE:
        return ""
    changes = advise(config, shapes_of(config.model), room, lambda changed: _runs_on(changed, placement))
    raise InvalidInput(
        f"this trial does not fit: with rows of seq_len={config.seq_len} tokens it needs at least {_gib(said.low)} "
        f"GiB, and {whose} {_gib(room)} GiB.",
        f"This fits: {' '.join(change.override for change in changes)}"
        if changes
        else "No change known here makes it fit. Choose a smaller model.",
        "If all rows are shorter than seq_len, lower seq_len to the longest. plan=all runs it all the same.",
    )


def doubt_of_job(config: TrialConfig, seen: HostFacts) -> str:
    """Return a warning where members may not fit their card together; otherwise, and with plan=all, nothing.

    Args:
        config: all members as one."""
    said = seen.estimate
    if said is None or seen.card_bytes is None or said.verdict == FITS or config.plan is Plan.all:
        return ""
    room = capacity(config, seen.card_bytes)
    if said.low > room:
        how = f"do not fit together: with rows of seq_len={config.seq_len} they need at least {_gib(said.low)} GiB"
    else:
        how = f"may not fit together: they need {_gib(said.low)} to {_gib(said.enough)} GiB"
    is_repeated = config.gradient_checkpointing is not Checkpointing.none
    other = "" if is_repeated else "gradient_checkpointing=full, or "
    return (
        f"these {seen.members} adapters {how}, and there are {_gib(room)} GiB. If they run out of memory, use "
        f"{other}fewer values of what cotrain names"
    )


def check_free(seen: HostFacts, used: Sequence[int | None]) -> str:
    """Return a warning where a trial fits its card, but perhaps not what is left of it.

    Args:
        used: bytes in use on each card before the trial; None without a reading."""
    said, held = seen.estimate, max((each for each in used if each is not None), default=0)
    if said is None or seen.card_bytes is None or said.verdict != FITS or said.enough <= seen.card_bytes - held:
        return ""
    return (
        f"it is not certain that this trial fits: it needs {_gib(said.low)} to {_gib(said.enough)} GiB, and of the "
        f"card's {_gib(seen.card_bytes)} GiB {_gib(held)} are in use already. End programs that nvidia-smi lists"
    )


def _runs_on(config: TrialConfig, placement: Placement) -> bool:
    try:
        check_capable(config, placement)
    except Unsupported:
        return False
    return True


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
