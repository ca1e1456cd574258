"""Known gaps: tests of behaviour that is promised and not there yet. Strict: one that passes must leave the list."""

import pytest

#: Test (file::name), reason, and the parameter sets it holds for (none: all).
KNOWN_GAPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "test_generation.py::test_minimum_of_new_tokens_counts_from_the_end_of_every_rows_prompt": (
        "min_new_tokens counts the padding of left-padded rows",
        (),
    ),
    "test_generation.py::test_prefix_function_is_told_the_row": (
        "prefix_allowed_tokens_fn is always told batch_id 0",
        (),
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the known gaps as expected failures."""
    for item in items:
        name, _, parameters = f"{item.path.name}::{item.name}".partition("[")
        reason, held = KNOWN_GAPS.get(name, ("", ()))
        if reason and (not held or parameters.rstrip("]") in held):
            item.add_marker(pytest.mark.xfail(strict=True, reason=reason))
