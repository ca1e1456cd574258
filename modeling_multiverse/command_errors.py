"""How a command says what its user can mend."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def plain_errors(doing: str, extra: str) -> Iterator[None]:
    """Says in one line what a user can mend: missing packages, and arguments that do not fit.

    Args:
        doing (`str`): what the packages are for, as in "Curating needs more packages".
        extra (`str`): that brings them.
    """
    try:
        yield
    except ImportError as error:
        sys.exit(f"{doing} needs more packages ({error}): pip install 'multiverse-transformers[cli,{extra}]'")
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
