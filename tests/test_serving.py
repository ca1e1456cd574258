"""The server as an OpenAI client sees it: the text of `generate()`, whole or streamed, while its branches run."""

import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from front_door import GOAL, answer, check_forked, front_door
from multiverse import MultiverseForCausalLM
from multiverse.generation import serve as entry_point
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager
from typer.testing import CliRunner

#: Seconds that nothing here takes by far; they only keep a broken server from holding up the tests.
PATIENCE = 120

CHAT = [{"role": "user", "content": "Add it up."}]
OTHER_CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add up these two numbers."}]
TOKENS = 90


class Server:
    """`python -m multiverse.generation.serve` on a checkpoint, in a process of its own on a free port.

    Args:
        folder (`Path`): the checkpoint; output goes to a file in it.
    """

    def __init__(self, folder: Path) -> None:
        self.model = str(folder)
        self.log = folder / "server.log"
        command = [sys.executable, "-m", "multiverse.generation.serve", self.model]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", "0", "--device", "cpu"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The place in its log that a pattern matches, once there is one."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(pattern, self.log.read_text()):
                return found
            time.sleep(0.1)
        pytest.fail(f"{pattern!r} is not to be found in the server's log:\n{self.log.read_text()}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)


@pytest.fixture(scope="module")
def door():
    return front_door()


@pytest.fixture(scope="module")
def server(door, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("checkpoint")
    for each in door:
        each.save_pretrained(folder)
    server = Server(folder)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    address = server.wait_for(r"running on (http://127\.0\.0\.1:\d+)")[1]
    # Proxies of the environment are for other machines.
    http_client = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(
        base_url=f"{address}/v1", api_key="none", timeout=PATIENCE, max_retries=0, http_client=http_client
    ) as client:
        yield client


def request(server: Server, chat: list = CHAT, **options: Any) -> dict[str, Any]:
    """Arguments of a greedy chat completion; `generation_config` is sent as the server wants it."""
    if "generation_config" in options:
        options["extra_body"] = {"generation_config": json.dumps(options.pop("generation_config"))}
    return {"model": server.model, "messages": chat, "temperature": 0, "max_tokens": TOKENS, **options}


def complete(client: openai.OpenAI, server: Server, *args: Any, **options: Any):
    """A whole completion: its text, why it ended, how many tokens it says there are."""
    completion = client.chat.completions.create(**request(server, *args, **options))
    (choice,) = completion.choices
    return choice.message.content, choice.finish_reason, completion.usage


def stream(client: openai.OpenAI, server: Server, *args: Any, **options: Any):
    """A streamed completion: its pieces, why it ended, how many tokens it says there are."""
    chunks = list(client.chat.completions.create(stream=True, **request(server, *args, **options)))
    pieces = [chunk.choices[0].delta.content for chunk in chunks]
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
    return [piece for piece in pieces if piece], chunks[-1].choices[0].finish_reason, chunks[-1].usage


# --- Answers ---------------------------------------------------------------------------------------------------------


def test_completion_is_the_linear_text_of_a_forked_block(door, server: Server, client: openai.OpenAI) -> None:
    # What `generate()` makes one path at a time, in this process.
    expected = answer(*door, CHAT, parallel=False, do_sample=False, max_new_tokens=TOKENS)
    check_forked(expected.text)
    text, finish_reason, usage = complete(client, server)
    assert text == expected.text
    assert finish_reason == "length"
    assert usage.prompt_tokens == expected.prompt_tokens
    assert usage.completion_tokens == expected.report.generated_tokens == TOKENS
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_streamed_pieces_make_the_whole_text(server: Server, client: openai.OpenAI) -> None:
    text, finish_reason, usage = complete(client, server)
    pieces, streamed_finish_reason, streamed_usage = stream(client, server)
    assert "".join(pieces) == text
    assert len(pieces) > TOKENS / 2, "it did not come piece by piece"
    assert (streamed_finish_reason, streamed_usage) == (finish_reason, usage)


def test_requests_do_not_affect_each_other(door, server: Server, client: openai.OpenAI) -> None:
    expected = [answer(*door, chat, do_sample=False, max_new_tokens=TOKENS).text for chat in (CHAT, OTHER_CHAT)]
    assert expected[0] != expected[1]
    check_forked(expected[1])
    assert complete(client, server)[0] == expected[0]
    assert complete(client, server, OTHER_CHAT)[0] == expected[1]
    assert "".join(stream(client, server)[0]) == expected[0]
    assert "".join(stream(client, server, OTHER_CHAT)[0]) == expected[1]


def test_text_completion_goes_on_in_a_block_of_its_prompt(door, server: Server, client: openai.OpenAI) -> None:
    prompt = f"Sums. {GOAL}"
    expected = answer(*door, prompt, do_sample=False, max_new_tokens=TOKENS)
    check_forked(expected.text)
    options = {"model": server.model, "prompt": prompt, "temperature": 0, "max_tokens": TOKENS}
    completion = client.completions.create(**options)
    assert completion.choices[0].text == expected.text
    assert completion.usage.prompt_tokens == expected.prompt_tokens
    pieces = [chunk.choices[0].text for chunk in client.completions.create(stream=True, **options)]
    assert "".join(pieces) == expected.text


def test_client_that_leaves_does_not_disturb_the_next_one(server: Server, client: openai.OpenAI) -> None:
    whole, _, _ = complete(client, server)
    with client.chat.completions.create(stream=True, **request(server, max_tokens=1000)) as chunks:
        pieces = [chunk.choices[0].delta.content or "" for chunk in itertools.islice(chunks, 12)]
    assert len("".join(pieces)) > len("<Path>\n1:")
    assert whole.startswith("".join(pieces))
    assert complete(client, server)[0] == whole


# --- Arguments of `generate()` ---------------------------------------------------------------------------------------


def test_branches_run_side_by_side_unless_told_otherwise(server: Server, client: openai.OpenAI) -> None:
    # A budget of rounds: one path at a time it ends within the second path, side by side within the conclusion.
    budget = {"max_sequential_steps": 25}
    parallel, finish_reason, usage = complete(client, server, generation_config=budget)
    sequential, _, sequential_usage = complete(client, server, generation_config={**budget, "parallel": False})
    check_forked(parallel)
    assert "<Conclusion></Conclusion>" not in parallel
    assert "<Conclusion></Conclusion>" in sequential
    assert usage.completion_tokens > sequential_usage.completion_tokens
    assert finish_reason == "stop"


def test_generation_config_carries_our_arguments(door, server: Server, client: openai.OpenAI) -> None:
    options = {"max_path_tokens": 10, "do_sample": True, "seed": 3, "temperature": 2.0}
    expected = answer(*door, CHAT, max_new_tokens=TOKENS, **options).text
    check_forked(expected)
    assert answer(*door, CHAT, max_new_tokens=TOKENS, **{**options, "seed": 4}).text != expected
    pieces, _, _ = stream(client, server, generation_config=options, temperature=2.0)
    assert "".join(pieces) == expected
    assert complete(client, server, generation_config=options, temperature=2.0)[0] == expected


def test_wrong_argument_fails_that_request_and_is_named_in_the_log(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError):
        complete(client, server, generation_config={"max_path_tokens": -1})
    server.wait_for("ValueError: `max_path_tokens` must be a positive integer, got -1")


def test_wrong_argument_ends_the_stream_with_an_error(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIError):
        stream(client, server, generation_config={"parallel": "no"})
    assert complete(client, server)[1] == "length"


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options that transformers' command was called with, in place of a server."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(entry_point, "Serve", lambda **options: calls.append(options))
    return calls


def test_command_hands_all_options_over(served: list[dict[str, Any]]) -> None:
    given = ["some/model", "--port", "8123", "--dtype", "bfloat16", "--attn-implementation", "eager", "--enable-cors"]
    result = CliRunner().invoke(entry_point.app, given)
    assert result.exit_code == 0, result.output
    parameters = inspect.signature(Serve).parameters
    changed = {
        "force_model": "some/model",
        "port": 8123,
        "dtype": "bfloat16",
        "attn_implementation": "eager",
        "enable_cors": True,
    }
    assert served == [{name: changed.get(name, parameter.default) for name, parameter in parameters.items()}]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--continuous-batching"], "--continuous-batching decodes by a loop of its own"),
        (["--compile"], "--compile needs a static cache"),
        (["--attn-implementation", "flash_attention_3"], "--attn-implementation is 'flash_attention_3'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_that_cannot_fork_are_refused_before_a_model_is_loaded(
    served: list[dict[str, Any]], given: list[str], message: str
) -> None:
    result = CliRunner().invoke(entry_point.app, ["some/model", *given], terminal_width=200)
    assert result.exit_code == 2
    assert message in result.output
    assert not served


def test_only_our_names_are_added_to_transformers(served: list[dict[str, Any]]) -> None:
    # The module in which the server looks for a checkpoint's class.
    transformers = model_manager.transformers
    before = dict(vars(transformers))
    CliRunner().invoke(entry_point.app, ["some/model"])
    assert len(served) == 1
    after = vars(transformers)
    names = [f"Multiverse{architecture}ForCausalLM" for architecture in ("Llama", "Qwen2", "Qwen3")]
    assert {name for name in after if after[name] is not before.get(name)} <= set(names)
    for name in names:
        assert issubclass(getattr(transformers, name), MultiverseForCausalLM)
        assert getattr(transformers, name).__name__ == name
