"""What can go wrong with a store, and what a person can do about it."""

import contextlib
import sqlite3
from collections.abc import Iterator

from lora_lab.secrets import without_secrets


class TrackingFailed(RuntimeError):
    """The store did not take a record. The trial's files are still in its folder."""

    def __init__(self, fault: str, remedy: str = "") -> None:
        """Say what happened.

        Args:
            remedy: sentences about what somebody has to do before the store can take a record; empty where a later
                try may do.
        """
        super().__init__(without_secrets(f"{fault.rstrip('.')}. {remedy}" if remedy else fault))
        self.needs_remedy = bool(remedy)


class SweepUnknown(TrackingFailed):
    """The store has not got the sweep that a trial belongs to."""


_REMEDIES = {
    "malformed": "Put a backup of the database in its place, or move it away: the next start makes a new store.",
    "not a database": "Move that file away: the next start makes a new store. Or give another "
    "tracking.root=FOLDER to trials to come.",
    "readonly database": "Make the database and its folder writable, or give another tracking.root=FOLDER.",
}
"""What to do by words of SQLite's, wherever MLflow meets them."""

_DRIVERS = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""Packages of modules that SQLAlchemy imports for a kind of database."""


@contextlib.contextmanager
def store_errors() -> Iterator[None]:
    """Whatever a store can raise, as TrackingFailed."""
    from alembic.util import CommandError
    from google.protobuf.json_format import ParseError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except ModuleNotFoundError as error:
        package = _DRIVERS.get(str(error.name), error.name)
        raise TrackingFailed(
            f"what connects to such a store is not installed ({error.name})", f"Install it: pip install {package}"
        ) from error
    except (MlflowException, SQLAlchemyError, CommandError, ParseError, sqlite3.Error, OSError) as error:
        lines = str(error).splitlines() or [""]
        known = ((line, remedy) for line in lines for words, remedy in _REMEDIES.items() if words in line)
        said, remedy = next(known, (lines[0], ""))
        raise TrackingFailed(f"{type(error).__name__}: {said}", remedy) from error
