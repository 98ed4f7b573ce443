"""The local store, one SQLite database: its address, its creation, and whether MLflow can work with it."""

import contextlib
import os
import shlex
import sqlite3
import tempfile
from pathlib import Path
from urllib.parse import unquote

from filelock import FileLock

from lora_lab.config import InvalidInput, TrackingConfig
from lora_lab.store.errors import TrackingFailed

LOCKED_SECONDS = 5.0

_ANOTHER = "use another tracking.root=FOLDER for later trials"
_AWAY = f"Move it away: the next start makes a new store. Or {_ANOTHER}."


def address_of(database: Path) -> str:
    """Return the tracking URI of a database.

    SQLAlchemy needs % and ? in a file's name quoted. A quoted address names the driver too: if it began with sqlite:///,
    MLflow would make a folder of the quoted name."""
    name = str(database)
    quoted = name.replace("%", "%25").replace("?", "%3F")
    return f"sqlite:///{name}" if quoted == name else f"sqlite+pysqlite:///{quoted}"


def local_address() -> str:
    """Return the tracking URI of the store in the working folder.

    Raises: InvalidInput when there is none."""
    database = Path("mlruns/mlflow.db").resolve()
    if not database.is_file() or not has_content(database):
        raise InvalidInput(
            f"there is no store at {database}. Change to the folder where the runs were made, or name their store with "
            "--store URI."
        )
    return address_of(database)


def database_of(uri: str) -> Path | None:
    """Return the file of a store in SQLite; None for any other store."""
    kind, _, place = uri.partition("://")
    if kind.partition("+")[0] != "sqlite":
        return None
    return Path(unquote(place.partition("?")[0].removeprefix("/")))


def check_writable(tracking: TrackingConfig) -> Path:
    """Return the local store's folder. Make it if it is missing.

    Raises: InvalidInput when nothing can be written there."""
    root = Path(os.path.realpath(tracking.root))
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise InvalidInput(
            f"tracking.root={tracking.root}: nothing can be written to {root} ({error.strerror}). "
            "Give another folder with tracking.root=FOLDER, or use tracking=none."
        ) from error
    return root


def create_store(database: Path) -> None:
    """Make a new store under another name, then move it into place as a whole.

    Two first starts at once, or a kill while the tables are made, would otherwise leave a store that never opens
    again."""
    if has_content(database):
        return
    with FileLock(f"{database}.lock"):
        if has_content(database):
            return
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        with tempfile.TemporaryDirectory(dir=database.parent) as folder:
            fresh = Path(folder) / database.name
            store = SqlAlchemyStore(address_of(fresh), (database.parent / "artifacts").as_uri())
            store.engine.dispose()
            os.rename(fresh, database)


def has_content(database: Path) -> bool:
    """Return whether a database has content. Opening one that was deleted meanwhile leaves an empty file."""
    return database.exists() and (not database.is_file() or database.stat().st_size > 0)


def check_unlocked(database: Path) -> None:
    """Raise an error when a database is locked. MLflow itself would wait for minutes.

    Raises: sqlite3.OperationalError."""
    with contextlib.closing(sqlite3.connect(database, timeout=LOCKED_SECONDS)) as connection:
        connection.execute("begin immediate")
        connection.rollback()


def check_database(database: Path) -> None:
    """Check that a database has the tables of the installed MLflow.

    MLflow itself would change the tables of some other versions without asking, and fail on those of others.

    Raises: TrackingFailed when the tables are of another version; sqlite3.Error.
    """
    if not database.is_file():
        raise TrackingFailed(f"{database} is not a file", _AWAY)
    with contextlib.closing(sqlite3.connect(database, timeout=LOCKED_SECONDS)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        versions = connection.execute("SELECT version_num FROM alembic_version") if "alembic_version" in tables else []
        found = [str(version) for (version,) in versions]
    if not tables:
        return  # MLflow makes them
    if len(found) != 1:
        raise TrackingFailed(f"{database} does not say which version of MLflow's tables it holds", _AWAY)
    check_schema(database, found[0])
    missing = _tables_of_today() - tables
    if missing:
        raise TrackingFailed(
            f"{database} lacks {len(missing)} of MLflow's tables ({', '.join(sorted(missing)[:3])})",
            f"Replace it with a backup, or move it away: the next start makes a new store. Or {_ANOTHER}.",
        )


def check_schema(database: Path, version: str) -> None:
    """Raise TrackingFailed when the tables are of an older or a newer MLflow than the installed one."""
    from alembic.script import ScriptDirectory
    from mlflow import __version__
    from mlflow.store.db.utils import _get_alembic_config  # MLflow has no public name for its migrations' folder

    migrations = ScriptDirectory.from_config(_get_alembic_config(""))
    if version in migrations.get_heads():
        return
    if version in {migration.revision for migration in migrations.walk_revisions()}:
        command = f"mlflow db upgrade {shlex.quote(address_of(database))}"
        raise TrackingFailed(
            f"{database} was made by an older MLflow than the installed {__version__}",
            f"Copy the file as a backup, then run: {command}   Or {_ANOTHER}.",
        )
    raise TrackingFailed(
        f"{database} has tables of version {version}, which MLflow {__version__} does not know: a newer MLflow made it",
        f"Install that MLflow (pip install --upgrade mlflow), or move the database away: the next start makes a new "
        f"store. Or {_ANOTHER}.",
    )


def _tables_of_today() -> set[str]:
    from mlflow.store.db import utils  # knows the tables only once it has been imported

    return set(utils.Base.metadata.tables)
