"""Words in Markdown: in a line or a cell, as a table, as a block of code."""

import re
from typing import Any

from multiverse.evaluation.report_tables import Table


def cell(value: Any) -> str:
    """Words as they stand in a line or a table cell of Markdown, and nothing else."""
    text = " ".join(clean(str(value)).split())
    return re.sub(r"[\\`*\[\]<>|#$~]|^(?=[-+=] |=)", lambda found: f"\\{found[0]}", text).replace("\\<", "&lt;")


def table(content: Table) -> str:
    """A table, without its caption and without an end of line."""
    rows = [" | ".join(map(cell, row)) for row in (content.columns, *content.rows)]
    rows.insert(1, "|".join("---" for _ in content.columns))
    return "\n".join(f"| {row} |" if number != 1 else f"|{row}|" for number, row in enumerate(rows))


def fenced(value: str) -> str:
    """Words as a block of code that they cannot close."""
    text = clean(value)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def clean(text: str) -> str:
    """Without lone surrogates, which no file in UTF-8 can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
