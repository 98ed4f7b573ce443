"""What may be written or printed of a text: everything but secrets.

One function decides it for every place where text leaves: settings, commands, errors, tracebacks, logs, addresses of
stores. Knows the standard library only, so that the worker can use it too.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

_NAMES_A_SECRET = re.compile(
    r"(?:^|_)[A-Z0-9]*?(?:TOKEN|KEY|SECRET|PASS|PASSWORD|PASSWD|PASSPHRASE|PWD|CREDENTIAL)S?\d*(?:_|$)", re.IGNORECASE
)
"""Names of environment variables."""

_FOLDERS = ("PWD", "OLDPWD")
_SHORTEST = 6
"""Characters. A shorter value (a switch, a number) would be found within ordinary words."""

_USER_INFO = re.compile(r"://(?:[^/\s]+|[^/\s:@]*:\S*)@")
"""From :// to the last @ before a space; a password may hold / and @, whether that is allowed or not."""

_USER_INFO_ALONE = re.compile(r"(?<![^\s='\"(,])(?://)?[^\s:/='\"(,]+:(?!//)[^\s@]+@(?=[\w\[])")
"""user:password@host without a scheme."""

_IN_QUERY = re.compile(
    r"([?&;#][^=\s&;#?]*(?:token|key|secret|pass|pwd|sig|credential|auth|jwt)[^=\s&;#]*=)[^&;#\s'\"]+", re.IGNORECASE
)

_SAID = re.compile(
    r"((?:^|\s)(?:password|passwd|api[_-]?key|access_token)=|authorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic)\s+)\S+",
    re.IGNORECASE,
)
"""As a database's address or a request's header has it."""

_KNOWN_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]|gh[pousr]_[A-Za-z0-9]|github_pat_\w|glpat-[\w-]|sk-[\w-]|xox[abprs]-[\w-]|dapi[0-9a-f]|"
    r"eyJ[\w-]+\.[\w-])[\w.-]{15,}"
)
"""Kinds of tokens that say themselves what they are."""


def without_secrets(text: str) -> str:
    """Put *** where a secret stands: the value of an environment variable whose name tells that it is one, user name
    and password of an address, a token in its query, a token that is known by its form."""
    for value in _in_environment():
        text = text.replace(value, "***")
    text = _USER_INFO.sub("://***@", text)
    text = _USER_INFO_ALONE.sub("***@", text)
    text = _IN_QUERY.sub(r"\1***", text)
    text = _SAID.sub(r"\1***", text)
    return _KNOWN_TOKENS.sub("***", text)


def _in_environment() -> list[str]:
    """Secret values, as they are and as an address has them; longest first, since one may hold another."""
    found = set(_values())
    found |= {quote(value, safe="") for value in found}
    return sorted((value for value in found if len(value) >= _SHORTEST), key=len, reverse=True)


def _values() -> Iterator[str]:
    for name, value in os.environ.items():
        if "://" in value:
            password = re.search(r"://[^/\s:@]*:(\S+)@", value)
            if password:
                yield password[1]
        elif name not in _FOLDERS and _NAMES_A_SECRET.search(name) and not _is_path(value):
            yield value.strip()


def _is_path(value: str) -> bool:
    """A file with credentials may be named; what is in it never comes here."""
    try:
        return value.startswith("/") and Path(value).exists()
    except (OSError, ValueError):
        return False


def clean(path: Path) -> None:
    """Rewrite a log that other libraries have written into, if there is a secret in it. A log that can't be read or
    rewritten stays as it is."""
    with contextlib.suppress(OSError):
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        cleaned = without_secrets(text)
        if cleaned != text:
            path.write_text(cleaned, encoding="utf-8", errors="surrogateescape")
