"""The file of a store: who may write to it, which version it has, transactions."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

SCHEMA_VERSION = 2
#: "MVCu", so that another program's database is not taken for a store.
_APPLICATION_ID = 0x4D564375
_SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE records (
  position INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  hash TEXT NOT NULL,
  chain TEXT NOT NULL,
  status TEXT NOT NULL DEFAULT 'waiting',
  stage TEXT,
  attempts TEXT NOT NULL DEFAULT '{}',
  draft TEXT,
  complaint TEXT,
  history TEXT NOT NULL DEFAULT '[]',
  held TEXT
);
CREATE INDEX records_by_status ON records (status, position);
CREATE TABLE answers (
  key TEXT PRIMARY KEY,
  position INTEGER NOT NULL,
  stage TEXT NOT NULL,
  call TEXT NOT NULL,
  attempt INTEGER NOT NULL,
  text TEXT NOT NULL,
  finish_reason TEXT NOT NULL,
  model TEXT NOT NULL,
  prompt_tokens INTEGER NOT NULL,
  completion_tokens INTEGER NOT NULL,
  cost REAL NOT NULL
);
CREATE INDEX answers_by_position ON answers (position);
"""


_Self = TypeVar("_Self", bound="StoreFile")


class StoreFile:
    """An SQLite file, open; a context manager that closes it.

    Args:
        path (`str` or `Path`): the file; it is made where there is none.
        read_only (`bool`): for looking at a store, also while a run writes to it.

    Raises:
        ValueError: if another process has it open for writing, or the file is no store of this version.
    """

    def __init__(self, path: str | Path, read_only: bool = False) -> None:
        self.path, self._lock = Path(path), FileLock(f"{path}.lock")
        if read_only and not self.path.is_file():
            raise ValueError(f"`path` is {str(path)!r}, where there is no store.")
        if not read_only:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        try:
            uri = f"{self.path.resolve().as_uri()}?mode={'ro' if read_only else 'rwc'}"
            self._connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=60.0)
            try:
                self._open(read_only)
            except BaseException:
                self._connection.close()
                raise
        except BaseException:
            self._lock.release()
            raise

    def _take_lock(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            holder = ""
            with contextlib.suppress(OSError, ValueError):
                holder = f" (process {int(Path(f'{self.path}.pid').read_text())})"
            raise ValueError(
                f"`path` is {str(self.path)!r}, which another run{holder} is writing to. Wait for it to end, or "
                "choose another store."
            ) from None
        # Only for the message above; the lock itself goes with the process that holds it.
        Path(f"{self.path}.pid").write_text(str(os.getpid()))

    def _open(self, read_only: bool) -> None:
        try:
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            (owner,) = self._connection.execute("PRAGMA application_id").fetchone()
            tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        except sqlite3.DatabaseError as error:
            raise ValueError(f"`path` is {str(self.path)!r}, which is not a curator's store: {error}.") from None
        if (tables or read_only) and owner != _APPLICATION_ID:
            raise ValueError(f"`path` is {str(self.path)!r}, a database that is not a curator's store.")
        if tables and version != SCHEMA_VERSION:
            raise ValueError(
                f"`path` is {str(self.path)!r}, a store of version {version}; this release reads version "
                f"{SCHEMA_VERSION}. Export it with the release that wrote it, or choose another store."
            )
        if read_only:
            return
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=NORMAL")
        if not tables:
            with self._transaction():
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA application_id={_APPLICATION_ID}")
                self._connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file and lets others have it."""
        self._connection.close()
        if self._lock.is_locked:
            Path(f"{self.path}.pid").unlink(missing_ok=True)
        self._lock.release()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")
