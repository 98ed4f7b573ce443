"""SQLite stores that are not synced to the disk: that takes most of the time in which MLflow makes one.

What is written lasts as long as the machine does not lose its power, which no test takes from it.
"""

import contextlib
import sqlite3
from typing import Any


def leave_stores_unsynced() -> None:
    """Apply to every connection that this process opens through SQLAlchemy from here on."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    event.listen(Engine, "connect", _unsynced)


def _unsynced(connection: Any, _: object) -> None:
    if not isinstance(connection, sqlite3.Connection):
        return
    [wait] = connection.execute("PRAGMA busy_timeout").fetchone()
    connection.execute("PRAGMA busy_timeout=0")  # what is locked or damaged is for the test to find
    with contextlib.suppress(sqlite3.Error):
        connection.execute("PRAGMA synchronous=OFF")
    connection.execute(f"PRAGMA busy_timeout={wait}")
