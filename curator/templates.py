"""The prompts: one Jinja template per stage in `prompts/`, whose first line gives its version."""

import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

FOLDER = Path(__file__).parent / "prompts"

_VERSION = re.compile(r"\{# version: (\S+) #\}\n")


@cache
def version(stage: str) -> str:
    """Version of a stage's template."""
    found = _VERSION.match(_source(stage))
    if found is None:
        raise ValueError(f"`stage` ({stage!r}): the first line of its template must be `{{# version: ... #}}`.")
    return found[1]


def messages(stage: str, **values: Any) -> tuple[dict[str, str], ...]:
    """The chat that a stage begins: a single message of the user, which every chat template knows.

    Args:
        stage (`str`): names the template.
        values: what it asks for. All of them are needed.
    """
    content = _environment().get_template(f"{stage}.md.jinja").render(**values)
    return ({"role": "user", "content": content.strip()},)


def _source(stage: str) -> str:
    return (FOLDER / f"{stage}.md.jinja").read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    # Prompts are plain text: nothing is to be escaped in them.
    return Environment(
        loader=FileSystemLoader(FOLDER),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
