"""Decide how torch's allocator takes memory from the driver: in segments that grow, or in segments of fixed size."""

import os
import platform
import re
import sys

_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""torch reads both. The first is the older name, which every version honours for this setting."""
_GROWS = re.compile(r"expandable_segments\s*:\s*true\b", re.IGNORECASE)


def are_expandable() -> bool:
    """Return whether a trial's segments grow: as the user's variable says; without one, where that is known to work.
    Under WSL the driver refuses it (pytorch#192330), and Windows does not have it."""
    for name in _VARIABLES:
        if name in os.environ:
            return _GROWS.search(os.environ[name]) is not None
    return sys.platform == "linux" and "microsoft" not in platform.release().lower()


def allocator_variables() -> dict[str, str]:
    """Return the environment variables of a process that trains; none where the user has set one."""
    is_set = any(name in os.environ for name in _VARIABLES)
    return {} if is_set or not are_expandable() else {_VARIABLES[0]: "expandable_segments:True"}
