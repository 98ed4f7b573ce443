"""Translate what older versions of lora_lab wrote about a run. Older and newer runs then share their levels."""

_CHECKPOINTING = {"true": "full", "false": "none"}
"""gradient_checkpointing was once a boolean."""

_BEFORE_ENGINES = {"engine": "eager", "engine.kind": "eager", "engine.chunked_loss": "False", "engine.lengths": "4"}
"""What every trial ran with before engines could be chosen."""

_AXIS = "axis.gradient_checkpointing"
_RAN = "ran.gradient_checkpointing"


def params_of_today(params: dict[str, str]) -> dict[str, str]:
    """Return a trial's params in today's form. If gradient_checkpointing is a boolean, the trial is older than
    engines."""
    level = _CHECKPOINTING.get(params.get("gradient_checkpointing", "").lower())
    return params if level is None else _BEFORE_ENGINES | params | {"gradient_checkpointing": level}


def axes_of_today(params: dict[str, str]) -> dict[str, str]:
    """Return a sweep's params in today's form: what it asked for."""
    if _AXIS not in params:
        return params
    values = (_CHECKPOINTING.get(text.strip().lower(), text) for text in params[_AXIS].split(","))
    return params | {_AXIS: ",".join(values)}


def tags_of_today(tags: dict[str, str]) -> dict[str, str]:
    """Return a run's tags in today's form: what really ran."""
    level = _CHECKPOINTING.get(tags.get(_RAN, "").lower())
    return tags if level is None else tags | {_RAN: level}
