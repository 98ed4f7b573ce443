"""Remove secrets from text before it is written or printed.

One function decides it for every place where text leaves: settings, commands, errors, tracebacks, logs, addresses of
stores. It uses the standard library only, so that the worker can use it too.
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
"""Characters. A shorter value (a switch, a number) would match ordinary words."""

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
"""As in a database's address or a request's header."""

_KNOWN_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]|gh[pousr]_[A-Za-z0-9]|github_pat_\w|glpat-[\w-]|sk-[\w-]|xox[abprs]-[\w-]|dapi[0-9a-f]|"
    r"eyJ[\w-]+\.[\w-])[\w.-]{15,}"
)
"""Tokens that are recognised by their form."""


def without_secrets(text: str) -> str:
    """Replace every secret by ***: the value of an environment variable with a secret's name, user name and password of
    an address, a token in its query, a token with a known form."""
    for value in _in_environment():
        text = text.replace(value, "***")
    text = _USER_INFO.sub("://***@", text)
    text = _USER_INFO_ALONE.sub("***@", text)
    text = _IN_QUERY.sub(r"\1***", text)
    text = _SAID.sub(r"\1***", text)
    return _KNOWN_TOKENS.sub("***", text)


def _in_environment() -> list[str]:
    """Return secret values, plain and as an address quotes them; longest first, since one may contain another."""
    found = set(_values())
    found |= {quote(value, safe="") for value in found}
    return sorted((value for value in found if len(value) >= _SHORTEST), key=len, reverse=True)


def _values() -> Iterator[str]:
    for name in list(os.environ):  # which another thread may change meanwhile
        value = os.environ.get(name, "")
        if "://" in value:
            password = re.search(r"://[^/\s:@]*:(\S+)@", value)
            if password:
                yield password[1]
        elif name not in _FOLDERS and _NAMES_A_SECRET.search(name) and not _is_path(value):
            yield value.strip()


def _is_path(value: str) -> bool:
    """Return whether the value is a path: a file with credentials may be named, and its content never comes here."""
    try:
        return value.startswith("/") and Path(value).exists()
    except (OSError, ValueError):
        return False


def clean(path: Path) -> None:
    """Rewrite a log that other libraries wrote to, if it contains a secret. A log that cannot be read or rewritten
    stays as it is."""
    with contextlib.suppress(OSError):
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        cleaned = without_secrets(text)
        if cleaned != text:
            path.write_text(cleaned, encoding="utf-8", errors="surrogateescape")
