"""A run on disk: one SQLite file that a process may leave at any moment.

Every change is a transaction of its own: an answer is stored as it arrives, and what a record made of it afterwards,
so that a run that goes on finds each answer that was ever given. The write-ahead log keeps that through a kill of the
process; a machine that loses power may lose the last answers, never the file.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from multiverse.curator.completion import Completion
from multiverse.curator.model_options import ModelOptions
from multiverse.curator.records import Chain, Draft
from multiverse.curator.store_file import StoreFile

Status = Literal["waiting", "running", "set aside", "finished", "rejected"]
STATUSES: tuple[Status, ...] = ("waiting", "running", "set aside", "finished", "rejected")
#: Of records that a run takes up.
_UNFINISHED: tuple[Status, ...] = ("waiting", "running", "set aside")

_CHAINS_PER_TRANSACTION = 50


@dataclass(frozen=True)
class Record:
    """Where a chain stands.

    Attributes:
        position (`int`): its place in the input, from 0.
        chain (`Chain`): the input.
        status (`str`): `"waiting"` (not begun), `"running"`, `"set aside"` (a call had no answer; the next run goes on
            with it), `"finished"` or `"rejected"`.
        stage (`str`, *optional*): the stage it was last in.
        attempts (`Mapping[str, int]`): by stage, 1 where it has never failed.
        draft (`Draft`): what the stages have made so far.
        complaint (`str`, *optional*): why the stage that comes next is done again.
        history (`tuple[Mapping, ...]`): every failure: `stage` where it showed, `back_to`, `attempt`, `reason`.
        held (`str`, *optional*): why it is set aside.
    """

    position: int
    chain: Chain
    status: Status = "waiting"
    stage: str | None = None
    attempts: Mapping[str, int] = field(default_factory=dict)
    draft: Draft = field(default_factory=Draft)
    complaint: str | None = None
    history: tuple[Mapping[str, Any], ...] = ()
    held: str | None = None


@dataclass(frozen=True)
class Usage:
    """What the answers of a stage by a model took; `cut` of them were cut off at the token limit."""

    stage: str
    model: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    cut: int = 0


def answer_key(options: ModelOptions, messages: Sequence[Mapping[str, str]], attempt: int) -> str:
    """The name of an answer: a hash of all that it depends on.

    Args:
        options (`ModelOptions`): the model; of these, what `identity()` holds counts.
        messages (`Sequence[Mapping[str, str]]`): what it is asked.
        attempt (`int`): of the stage, from 1.
    """
    asked = [options.identity(), [dict(message) for message in messages], attempt]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class Store(StoreFile):
    """A store, open; a context manager that closes it.

    Args:
        path (`str` or `Path`): the file; it is made where there is none.
        read_only (`bool`): for looking at a store, also while a run writes to it.

    Raises:
        ValueError: if another process has it open for writing, or the file is no store of this version.
    """

    # The input

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Writes what the results depend on into a new store, and compares it with what an old one has.

        Args:
            settings (`Mapping[str, Any]`): values that JSON can hold, in mappings of any depth.

        Raises:
            ValueError: if the store was made with others. The message names each.
        """
        given = {name: json.dumps(value, sort_keys=True) for name, value in _flat(settings)}
        known = dict(self._connection.execute("SELECT name, value FROM settings"))
        if not known:
            with self._transaction():
                self._connection.executemany("INSERT INTO settings VALUES (?, ?)", given.items())
            return
        names = [name for name in (*known, *given) if known.get(name) != given.get(name)]
        if names:
            told = [f"{name} is {given.get(name, 'absent')} and was {known.get(name, 'absent')}" for name in names]
            raise ValueError(
                f"The store {str(self.path)!r} was made with other options: {'; '.join(dict.fromkeys(told))}. Go on "
                "with the old ones, or choose another store."
            )

    def settings(self) -> dict[str, Any]:
        """What `begin` was given, by names with dots."""
        return {name: json.loads(text) for name, text in self._connection.execute("SELECT name, value FROM settings")}

    def add_chains(self, chains: Iterable[Chain]) -> int:
        """Takes the input in, or compares it with what is there; an input that has grown adds to it.

        Args:
            chains (`Iterable[Chain]`): the whole input, in order. It is read once and not kept.

        Returns:
            `int`: how many there are.

        Raises:
            ValueError: if an id comes twice, a column holds what JSON cannot, or the input is not the store's.
        """
        (known,) = self._connection.execute("SELECT count(*) FROM records").fetchone()
        rows, count = [], 0
        for count, chain in enumerate(chains, 1):
            position = count - 1
            text = _chain_text(chain, position)
            digest = hashlib.sha256(text.encode()).hexdigest()
            if position < known:
                self._compare(position, chain, text, digest)
                continue
            rows.append((position, _storable(chain.id), digest, text))
            if len(rows) == _CHAINS_PER_TRANSACTION:
                self._insert_chains(rows)
                rows = []
        self._insert_chains(rows)
        if count < known:
            raise ValueError(
                f"The store {str(self.path)!r} was made for {known} chains, and the input has {count}. Give the whole "
                "input, or choose another store."
            )
        return count

    def _insert_chains(self, rows: Sequence[tuple[int, str, str, str]]) -> None:
        try:
            with self._transaction():
                self._connection.executemany(
                    "INSERT INTO records (position, id, hash, chain) VALUES (?, ?, ?, ?)", rows
                )
        except sqlite3.IntegrityError:
            first: dict[str, int] = {}
            for position, name, _, _ in rows:
                query = self._connection.execute("SELECT position FROM records WHERE id = ?", (name,)).fetchone()
                earlier = first.setdefault(name, position) if query is None else query[0]
                if earlier != position:
                    raise ValueError(
                        f"`chains` {earlier} and {position} have the same id {name!r}. Give every chain its own."
                    ) from None
            raise

    def _compare(self, position: int, chain: Chain, text: str, digest: str) -> None:
        stored_digest, stored = self._connection.execute(
            "SELECT hash, chain FROM records WHERE position = ?", (position,)
        ).fetchone()
        if stored_digest == digest:
            return
        old, new = json.loads(stored), json.loads(text)
        differing = ", ".join(f"`{name}`" for name in new if new[name] != old.get(name)) or "its form"
        raise ValueError(
            f"The store {str(self.path)!r} was made for another input: chain {position}, id {chain.id!r}, differs in "
            f"{differing}. Give the same input, or choose another store."
        )

    # Records

    def unfinished(self) -> Iterator[int]:
        """Positions of the records that have not ended, in order; those that end meanwhile are left out."""
        position = -1
        while (row := self._next_unfinished(position)) is not None:
            position = row
            yield position

    def _next_unfinished(self, position: int) -> int | None:
        found = [
            self._connection.execute(
                "SELECT position FROM records WHERE status = ? AND position > ? ORDER BY position LIMIT 1",
                (status, position),
            ).fetchone()
            for status in _UNFINISHED
        ]
        return min((row[0] for row in found if row is not None), default=None)

    def load(self, position: int) -> Record:
        """A record by its place in the input."""
        return _record(self._connection.execute(f"{_SELECT} WHERE position = ?", (position,)).fetchone())

    def find(self, chain_id: str) -> Record | None:
        """A record by the id of its chain."""
        row = self._connection.execute(f"{_SELECT} WHERE id = ?", (_storable(chain_id),)).fetchone()
        return None if row is None else _record(row)

    def records(self, *statuses: Status) -> Iterator[Record]:
        """The records in input order, one at a time.

        Args:
            statuses (`str`): of those wanted; all where none is given.
        """
        position = -1
        marks = ", ".join("?" * len(statuses or STATUSES))
        query = f"{_SELECT} WHERE position > ? AND status IN ({marks}) ORDER BY position LIMIT 1"
        while (row := self._connection.execute(query, (position, *(statuses or STATUSES))).fetchone()) is not None:
            record = _record(row)
            position = record.position
            yield record

    def save(self, record: Record) -> Record:
        """Stores where a record stands.

        Returns:
            `Record`: as it would be read again, so that a run never sees what a later one could not.
        """
        draft = json.dumps(record.draft.to_dict())
        values = (
            record.status,
            record.stage,
            json.dumps(record.attempts, sort_keys=True),
            draft,
            None if record.complaint is None else _storable(record.complaint),
            json.dumps(record.history),
            None if record.held is None else _storable(record.held),
            record.position,
        )
        with self._transaction():
            self._connection.execute(
                "UPDATE records SET status = ?, stage = ?, attempts = ?, draft = ?, complaint = ?, history = ?, "
                "held = ? WHERE position = ?",
                values,
            )
        complaint, history, held = values[4], tuple(json.loads(values[5])), values[6]
        draft_again = Draft.from_dict(json.loads(draft))
        return replace(record, draft=draft_again, complaint=complaint, history=history, held=held)

    def counts(self) -> dict[Status, int]:
        """How many records there are in each state."""
        found = dict(self._connection.execute("SELECT status, count(*) FROM records GROUP BY status"))
        return {status: found.get(status, 0) for status in STATUSES}

    # Answers

    def answer(self, key: str) -> Completion | None:
        """The answer of that `answer_key`, if it was ever given."""
        row = self._connection.execute(
            "SELECT text, finish_reason, prompt_tokens, completion_tokens, model FROM answers WHERE key = ?", (key,)
        ).fetchone()
        return None if row is None else Completion(*row)

    def add_answer(
        self, key: str, completion: Completion, position: int, stage: str, call: str, attempt: int, cost: float
    ) -> None:
        """Stores an answer.

        Args:
            key (`str`): its `answer_key`.
            completion (`Completion`): the answer.
            position (`int`), stage (`str`), call (`str`), attempt (`int`): for whom it was asked first.
            cost (`float`): its price.
        """
        taken = (completion.text, completion.finish_reason, completion.model)
        tokens = (completion.prompt_tokens, completion.completion_tokens)
        with self._transaction():
            self._connection.execute(
                "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (key, position, stage, _storable(call), attempt, *map(_storable, taken), *tokens, cost),
            )

    def answer_keys(self) -> set[str]:
        """The keys of all answers."""
        return {key for (key,) in self._connection.execute("SELECT key FROM answers")}

    def answers_of(self, position: int) -> list[dict[str, Any]]:
        """The answers that were first asked for by a record, by attempt and call, for a reader to look at."""
        columns = "stage, call, attempt, text, finish_reason, model, prompt_tokens, completion_tokens, cost"
        rows = self._connection.execute(
            f"SELECT {columns} FROM answers WHERE position = ? ORDER BY stage, attempt, call, key", (position,)
        )
        return [dict(zip(columns.split(", "), row, strict=True)) for row in rows]

    def usage(self) -> list[Usage]:
        """What all answers took, by stage and model."""
        rows = self._connection.execute(
            "SELECT stage, model, count(*), sum(prompt_tokens), sum(completion_tokens), sum(cost), "
            "sum(finish_reason = 'length') FROM answers GROUP BY stage, model ORDER BY stage, model"
        )
        return [Usage(*row) for row in rows]


_SELECT = "SELECT position, chain, status, stage, attempts, draft, complaint, history, held FROM records"


def _record(row: Sequence[Any]) -> Record:
    position, chain, status, stage, attempts, draft, complaint, history, held = row
    return Record(
        position,
        Chain(**json.loads(chain)),
        status,
        stage,
        json.loads(attempts),
        Draft() if draft is None else Draft.from_dict(json.loads(draft)),
        complaint,
        tuple(json.loads(history)),
        held,
    )


def _chain_text(chain: Chain, position: int) -> str:
    try:
        return json.dumps(asdict(chain))
    except (TypeError, ValueError):
        bad = next((name for name, value in chain.columns.items() if not _is_json(value)), None)
        where = "a field" if bad is None else f"column {bad!r}"
        raise ValueError(
            f"`chains` {position}, id {chain.id!r}, has {where} with a value that JSON cannot hold. Leave it out, or "
            "make text of it."
        ) from None


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _storable(text: str) -> str:
    """Text that SQLite takes: without halves of surrogate pairs."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
