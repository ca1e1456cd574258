"""`python -m multiverse` is the command `multiverse`."""

from multiverse.cli import app

app()
