"""What older versions of lora_lab wrote of a run, in today's words: older and newer runs then share their levels."""

_CHECKPOINTING = {"true": "full", "false": "none"}
"""gradient_checkpointing was yes or no once."""

_BEFORE_ENGINES = {"engine": "eager", "engine.kind": "eager", "engine.chunked_loss": "False", "engine.lengths": "4"}
"""What every trial ran with while there was nothing to choose."""

_AXIS = "axis.gradient_checkpointing"
_RAN = "ran.gradient_checkpointing"


def params_of_today(params: dict[str, str]) -> dict[str, str]:
    """A trial's params. One that says yes or no to gradient_checkpointing is from before there were engines, too."""
    level = _CHECKPOINTING.get(params.get("gradient_checkpointing", "").lower())
    return params if level is None else _BEFORE_ENGINES | params | {"gradient_checkpointing": level}


def axes_of_today(params: dict[str, str]) -> dict[str, str]:
    """A sweep's params: what it asked for."""
    if _AXIS not in params:
        return params
    values = (_CHECKPOINTING.get(text.strip().lower(), text) for text in params[_AXIS].split(","))
    return params | {_AXIS: ",".join(values)}


def tags_of_today(tags: dict[str, str]) -> dict[str, str]:
    """A run's tags: what ran."""
    level = _CHECKPOINTING.get(tags.get(_RAN, "").lower())
    return tags if level is None else tags | {_RAN: level}
