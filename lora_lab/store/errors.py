"""Faults of a store, and what the user can do about them."""

import contextlib
import sqlite3
from collections.abc import Iterator

from lora_lab.secrets import without_secrets


class TrackingFailed(RuntimeError):
    """The error of a store that did not take a record. The trial's files are still in its folder."""

    def __init__(self, fault: str, remedy: str = "") -> None:
        """Build the message from a fault and its remedy.

        Args:
            remedy: what the user has to do before the store can take a record, in sentences. It is empty when trying
                again later may be enough.
        """
        super().__init__(without_secrets(f"{fault.rstrip('.')}. {remedy}" if remedy else fault))
        self.needs_remedy = bool(remedy)


class SweepUnknown(TrackingFailed):
    """The error of a store that does not have the sweep of a trial."""


_REMEDIES = {
    "malformed": "Replace the database with a backup, or move it away: the next start makes a new store.",
    "not a database": "Move that file away: the next start makes a new store. Or use another "
    "tracking.root=FOLDER for later trials.",
    "readonly database": "Make the database and its folder writable, or use another tracking.root=FOLDER.",
}
"""What the user can do, by words in an error of SQLite."""

_DRIVERS = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""The package to install, by the module that SQLAlchemy imports for a kind of database."""


@contextlib.contextmanager
def store_errors() -> Iterator[None]:
    """Turn every error that a store can raise into TrackingFailed."""
    from alembic.util import CommandError
    from google.protobuf.json_format import ParseError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except ModuleNotFoundError as error:
        package = _DRIVERS.get(str(error.name), error.name)
        raise TrackingFailed(
            f"the driver for this kind of store is not installed ({error.name})", f"Install it: pip install {package}"
        ) from error
    except (MlflowException, SQLAlchemyError, CommandError, ParseError, sqlite3.Error, OSError) as error:
        # SQLAlchemy's advice on a flush comes before what happened
        lines = [line for line in str(error).splitlines() if "Query-invoked autoflush" not in line] or [""]
        known = ((line, remedy) for line in lines for words, remedy in _REMEDIES.items() if words in line)
        said, remedy = next(known, (lines[0], ""))
        raise TrackingFailed(f"{type(error).__name__}: {said}", remedy) from error
