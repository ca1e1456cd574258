"""Lets pytest explain a failed assertion in the support modules as it does in the test files."""

import pytest

pytest.register_assert_rewrite("decoding", "forward", "scripted_requests", "tiny")
