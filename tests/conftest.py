"""Lets pytest explain a failed assertion in the support modules as it does in the test files, and chooses how Triton
kernels run."""

import os

import pytest

pytest.register_assert_rewrite(
    "decode_cases", "decoding", "forward", "kernel_cases", "scripted_requests", "tiny", "turns"
)

# Triton reads it when a kernel is decorated, so it must stand before anything imports one. Without a GPU the kernels
# run in Triton's interpreter; with one, `TRITON_INTERPRET=0 pytest` compiles them.
os.environ.setdefault("TRITON_INTERPRET", "1")
