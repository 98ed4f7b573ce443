"""Check whether an address can be a tracking server's and may be written into records."""

import re
from urllib.parse import urlsplit

from lora_lab.secrets import without_secrets

_LOGIN = "set them in the environment as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
_EXAMPLE = "such as http://127.0.0.1:5000"
_RANDOM = re.compile(r"(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9]{20,}")
"""A part of a path that looks like a token."""


def fault_of_address(uri: str) -> str:
    """Return what is wrong with a server's address; empty when it is valid and holds no secret.

    The text never repeats an address that could hold a secret."""
    if "@" in uri or without_secrets(uri) != uri:
        return f"holds a user name, password or token, which would be written into every record; {_LOGIN}"
    try:
        parts = urlsplit(uri)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        uri.encode("ascii")
    except ValueError:
        sound = False
    if not sound or re.search(r"[\s\\<>\"{}|^`\x00-\x1f\x7f]", uri):
        return f"is not the address of a server, {_EXAMPLE}"
    if parts.query or parts.fragment:
        return f"has a part after ? or #, which no tracking server accepts; give only the address, {_EXAMPLE}"
    if _RANDOM.search(parts.path):
        return (
            "has a path that looks like a token, which would be written into every record; set it in the environment "
            "as MLFLOW_TRACKING_TOKEN instead"
        )
    return ""
