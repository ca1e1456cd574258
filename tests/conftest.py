"""Lets pytest explain a failed assertion in the support modules as it does in the test files, and chooses how Triton
kernels and torch run."""

import logging
import os
import signal
from collections.abc import Iterator

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background by a shell script; the tests interrupt themselves and their processes.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Read when torch is imported: workers that each use all cores wait for one another most of the time.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

pytest.register_assert_rewrite(
    "batches",
    "curated",
    "curated_chain",
    "curated_problems",
    "decode_cases",
    "decoding",
    "forward",
    "hub_http",
    "hub_objects",
    "hub_stand_in",
    "kernel_cases",
    "one_record",
    "page_reader",
    "placing",
    "published",
    "scripted_llm",
    "scripted_requests",
    "tiny",
    "training",
    "turns",
)

# Triton reads it when a kernel is decorated, so it must stand before anything imports one. Without a GPU the kernels
# run in Triton's interpreter; with one, `TRITON_INTERPRET=0 pytest` compiles them.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def warnings_of_transformers() -> Iterator[list[str]]:
    """What transformers and this package log from warnings on (their loggers do not propagate to `caplog`)."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler = Collector(level=logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("transformers", "multiverse")]
    for logger in loggers:
        logger.addHandler(handler)
    yield found
    for logger in loggers:
        logger.removeHandler(handler)
