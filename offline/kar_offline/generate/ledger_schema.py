"""Owns the tables of the ledger's SQLite file, and how the file is opened."""

import sqlite3
from pathlib import Path
from typing import Final

from kar_sidecar.errors import IntegrityError

__all__ = ["connect"]

VERSION: Final = 1
SCHEMA: Final = """
CREATE TABLE sources (
  id INTEGER PRIMARY KEY,
  provider TEXT NOT NULL,
  model TEXT NOT NULL,
  parameters TEXT NOT NULL,            -- JSON
  provenance TEXT NOT NULL,            -- as knowledge records name it
  UNIQUE (provider, provenance)
);
CREATE TABLE runs (
  id INTEGER PRIMARY KEY,
  source INTEGER NOT NULL REFERENCES sources,
  started_at TEXT NOT NULL,
  ended_at TEXT,                       -- NULL: it goes on, or was killed and the next one goes on with it
  outcome TEXT                         -- done, budget
);
CREATE TABLE requests (
  id INTEGER PRIMARY KEY,
  run INTEGER NOT NULL REFERENCES runs,
  source INTEGER NOT NULL REFERENCES sources,
  prompt_sha256 TEXT NOT NULL,
  prompt_chars INTEGER NOT NULL,
  entity TEXT NOT NULL,
  entity_id TEXT NOT NULL,
  template TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('sent', 'answered', 'failed', 'uncertain')),
  handle TEXT NOT NULL,                -- the provider's name for a batch; '': none
  sent_at TEXT NOT NULL,
  ended_at TEXT,
  requests INTEGER NOT NULL DEFAULT 0, -- HTTP requests made for it
  text TEXT,                           -- answered: what the model wrote; failed: why not
  finish TEXT,
  input_tokens INTEGER NOT NULL DEFAULT 0,
  output_tokens INTEGER NOT NULL DEFAULT 0,
  latency_ms REAL,
  cost_usd REAL,                       -- of its tokens; NULL: price unknown
  risk_usd REAL                        -- the most that it may have cost on top, all until it is answered
);
CREATE INDEX requests_by_prompt ON requests (prompt_sha256, source);
CREATE INDEX requests_by_run ON requests (run);
"""


def connect(path: Path) -> sqlite3.Connection:
    """Open a ledger's file; a new file gets its tables.

    Raises:
        IntegrityError: the file is no ledger, or one of another version.
    """
    database = sqlite3.connect(path)
    try:
        # Others can read while a run writes, and a commit is on disk when it returns.
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            database.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
        elif version != VERSION:
            raise IntegrityError(f"{path} is a ledger of version {version}, not {VERSION}: move it away to begin anew")
    except sqlite3.DatabaseError as error:
        database.close()
        raise IntegrityError(f"{path} is no ledger ({error}): restore it, or move it away to begin anew") from error
    except IntegrityError:
        database.close()
        raise
    return database
