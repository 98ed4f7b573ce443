"""SQLite stores that are made quickly: their tables are made once a process, and nothing is synced to the disk.

What is written lasts as long as the machine does not lose its power, which no test takes from it.
"""

import contextlib
import logging
import os
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

MIGRATED = "LORA_LAB_TESTS_MIGRATED"
"""The variable of a command in which MLflow makes the tables itself, as for a user: about fifty migrations."""


def leave_stores_unsynced() -> None:
    """Apply to every connection that this process opens through SQLAlchemy from here on."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    event.listen(Engine, "connect", _unsynced)


def copy_tables() -> None:
    """Have MLflow make the tables of this process's first store, and copy them for those after it."""
    from mlflow.store.db import utils

    make, made = utils._initialize_tables, list[bytes]()

    def initialize(engine: Any) -> None:
        if made and MIGRATED not in os.environ:
            with contextlib.closing(engine.raw_connection()) as there, contextlib.closing(_opened(made[0])) as first:
                first.backup(there.driver_connection)
            return
        make(engine)
        if not made:
            with contextlib.closing(engine.raw_connection()) as first:
                made.append(first.driver_connection.serialize())

    utils._initialize_tables = initialize


def make_first_store() -> None:
    """Make the store whose tables this process and its forks copy."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    logging.disable(logging.INFO)  # MLflow says that it makes tables
    with tempfile.TemporaryDirectory() as folder:
        SqlAlchemyStore(f"sqlite:///{folder}/mlflow.db", Path(folder).as_uri()).engine.dispose()
    logging.disable(logging.NOTSET)


def _opened(content: bytes) -> sqlite3.Connection:
    """Return a database in memory with this content."""
    database = sqlite3.connect(":memory:")
    database.deserialize(content)
    return database


def _unsynced(connection: Any, _: object) -> None:
    if not isinstance(connection, sqlite3.Connection):
        return
    [wait] = connection.execute("PRAGMA busy_timeout").fetchone()
    connection.execute("PRAGMA busy_timeout=0")  # what is locked or damaged is for the test to find
    with contextlib.suppress(sqlite3.Error):
        connection.execute("PRAGMA synchronous=OFF")
    connection.execute(f"PRAGMA busy_timeout={wait}")
