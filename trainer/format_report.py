"""What `format_dataset` found: malformed rows, each with its number and what is wrong with it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class MalformedRow:
    """One defect of one row.

    Attributes:
        row (`int`): number of the row in the dataset that was given.
        form (`str`): the row's form.
        kind (`str`): a kind of `multiverse.Problem`, or "missing field", "no block", "unexpected block", "unknown
            form", "refused by the chat template".
        message (`str`): the defect in words; token numbers count in the tokenised row.
        split (`str`, *optional*): name of the split.
    """

    row: int
    form: str
    kind: str
    message: str
    split: str | None = None

    def __str__(self) -> str:
        place = f"row {self.row}" if self.split is None else f"row {self.row} of {self.split}"
        return f"{place} ({self.form}): {self.kind}: {self.message}"


@dataclass
class FormatReport:
    """What `format_dataset` found. For a streamed dataset it grows while the rows are read in this process.

    Attributes:
        action (`str`): what happens to malformed rows: "drop", "keep" or "raise".
        rows (`dict[str | None, int]`): rows read of every split (`None` for a dataset without splits).
    """

    action: str
    rows: dict[str | None, int] = field(default_factory=dict)
    _found: dict[tuple[str | None, int], list[MalformedRow]] = field(default_factory=dict, repr=False)

    @property
    def malformed(self) -> list[MalformedRow]:
        """Every defect, by split and row."""
        return [defect for defects in self._found.values() for defect in defects]

    @property
    def malformed_rows(self) -> int:
        """How many rows have a defect."""
        return len(self._found)

    def add(self, split: str | None, row: int, form: str, defects: list[dict[str, str]]) -> None:
        """Takes one row in; a row that is read again counts once."""
        self.rows[split] = max(self.rows.get(split, 0), row + 1)
        if defects:
            self._found[split, row] = [MalformedRow(row, form, split=split, **defect) for defect in defects]

    def summary(self, limit: int = 20) -> str:
        """The report in words: counts by kind, then at most `limit` defects, one a line."""
        found, total = self.malformed, sum(self.rows.values())
        if not found:
            return f"{total} rows, none malformed"
        action = {"drop": "dropped", "keep": "kept", "raise": "refused"}[self.action]
        kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(each.kind for each in found).most_common())
        lines = [f"{self.malformed_rows} of {total} rows malformed and {action} ({kinds})"]
        lines += [f"  {defect}" for defect in found[:limit]]
        if len(found) > limit:
            lines.append(f"  ... and {len(found) - limit} more")
        return "\n".join(lines)

    def table(self) -> Any:
        """The defects as a `rich.table.Table`; needs the extra `cli`."""
        from rich.table import Table

        table = Table("split", "row", "form", "defect", "where", title="malformed rows")
        for each in self.malformed:
            table.add_row(each.split or "", str(each.row), each.form, each.kind, each.message)
        return table
