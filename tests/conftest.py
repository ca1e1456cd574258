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
    "test_loading.py::test_configuration_of_another_architecture_raises": (
        "MultiverseXConfig.from_pretrained accepts a checkpoint of another architecture",
        (
            "llama-qwen2",
            "llama-qwen3",
            "qwen2-llama",
            "qwen2-qwen3",
            "qwen3-llama",
            "qwen3-qwen2",
        ),
    ),
    "test_loading.py::test_plain_checkpoint_loads_without_a_warning": (
        "MultiverseXConfig.from_pretrained warns about the base model type",
        (
            "configuration class-llama",
            "configuration class-qwen2",
            "configuration class-qwen3",
        ),
    ),
    "test_loading.py::test_sliding_windows_can_be_turned_off_as_the_error_message_says": (
        "use_sliding_window=False in from_pretrained does not rebuild layer_types",
        (
            "qwen2",
            "qwen3",
        ),
    ),
    "test_model.py::test_cropped_cache_remembers_the_positions_that_its_prefill_was_given": (
        "a cropped untagged cache forgets positions that were given from outside",
        (
            "29-llama",
            "29-qwen2",
            "29-qwen3",
            "3-llama",
            "3-qwen2",
            "3-qwen3",
            "37-llama",
            "37-qwen2",
            "37-qwen3",
        ),
    ),
    "test_model.py::test_rows_of_an_untagged_cache_may_be_reordered_before_a_block_opens": (
        "rows of an untagged cache that are reordered or repeated keep their old positions",
        (
            "llama",
            "qwen2",
            "qwen3",
        ),
    ),
    "test_model.py::test_rows_of_an_untagged_cache_may_be_repeated_before_a_block_opens": (
        "rows of an untagged cache that are reordered or repeated keep their old positions",
        (
            "positions-llama",
            "positions-qwen2",
            "positions-qwen3",
        ),
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the known gaps as expected failures."""
    for item in items:
        name, _, parameters = f"{item.path.name}::{item.name}".partition("[")
        reason, held = KNOWN_GAPS.get(name, ("", ()))
        if reason and (not held or parameters.rstrip("]") in held):
            item.add_marker(pytest.mark.xfail(strict=True, reason=reason))
