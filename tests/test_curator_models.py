"""Asking models: what is sent, what is tried again and after which pause, and that keys stay where they are."""

import asyncio
import email.utils
import logging
import threading

import pytest
import scripted_llm
import torch
from hub_http import whole_text
from multiverse.curator.completion import CallRefused, CallUnanswered, Completion, ModelError
from multiverse.curator.model_options import ModelOptions, StageOptions
from multiverse.curator.models import FIRST_PAUSE, LONGEST_PAUSE, Models
from scripted_llm import Mood, ScriptedLLM
from tiny import tiny_config, tiny_tokenizer
from transformers import LlamaForCausalLM

KEY = "sk-a-key-that-nobody-may-see-0123456789"
ASKED = [{"role": "user", "content": "How many paths?"}]


@pytest.fixture(autouse=True)
def _no_keys_of_this_machine(monkeypatch):
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self, jitter: float = 1.0) -> None:
        self.pauses: list[float] = []
        self.jitter = jitter

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)

    def models(self) -> Models:
        return Models(sleep=self.sleep, draw=lambda: self.jitter, now=lambda: 1_000_000.0)


def ask(models: Models, options: ModelOptions, messages=ASKED) -> Completion:
    async def once() -> Completion:
        async with models:
            return await models.complete(messages, options)

    return asyncio.run(once())


def faults(*before: str | None):
    """A personality that fails in these ways, one request after the other, and then answers."""
    return lambda digest, visit: Mood(before[visit - 1] if visit <= len(before) else None)


def two(messages) -> str:
    return "two paths"


def options_for(llm: ScriptedLLM, **fields) -> ModelOptions:
    return ModelOptions("scripted", base_url=llm.url, **fields)


def test_the_request_holds_the_options_and_the_answer_its_counts():
    with ScriptedLLM(two) as llm:
        options = options_for(llm, temperature=0.6, max_tokens=77, seed=5, extra_body={"top_p": 0.9})
        answer = ask(Models(), options)
    assert answer == Completion("two paths", "stop", 3, 2, "scripted")
    sent = {"model": "scripted", "messages": ASKED, "temperature": 0.6, "max_tokens": 77, "seed": 5, "top_p": 0.9}
    assert {name: llm.bodies[0].get(name) for name in sent} == sent
    assert not llm.bodies[0].get("stream")


def test_the_token_limit_can_have_the_newer_name():
    with ScriptedLLM(two) as llm:
        ask(Models(), options_for(llm, max_tokens=9, token_limit_field="max_completion_tokens", temperature=None))
    assert llm.bodies[0]["max_completion_tokens"] == 9
    assert not {"max_tokens", "temperature"} & set(llm.bodies[0])


def test_an_answer_cut_off_is_passed_on_with_its_reason():
    with ScriptedLLM(two, lambda digest, visit: Mood(spoil="truncated")) as llm:
        answer = ask(Models(), options_for(llm))
    assert (answer.text, answer.finish_reason) == ("two ", "length")


def test_half_a_surrogate_pair_becomes_a_replacement_character():
    with ScriptedLLM(lambda messages: "a\ud83d b") as llm:
        assert ask(Models(), options_for(llm)).text == "a\ufffd b"


@pytest.mark.parametrize("fault", ["429", "500", "503", "529", "408", "drop"])
def test_what_may_pass_is_tried_again(fault):
    clock = Clock()
    with ScriptedLLM(two, faults(fault, fault)) as llm:
        assert ask(clock.models(), options_for(llm)).text == "two paths"
    assert sum(llm.requests.values()) == 3
    assert clock.pauses == [FIRST_PAUSE, 2 * FIRST_PAUSE]


def test_a_hanging_endpoint_is_left_after_the_timeout_and_tried_again():
    clock = Clock()
    with ScriptedLLM(two, faults("hang")) as llm:
        assert ask(clock.models(), options_for(llm, timeout=1.0)).text == "two paths"
    assert sum(llm.requests.values()) == 2


def test_pauses_grow_exponentially_up_to_a_limit_with_full_jitter():
    for jitter in (0.0, 0.25, 1.0):
        clock = Clock(jitter)
        with ScriptedLLM(two, faults(*["500"] * 8)) as llm:
            ask(clock.models(), options_for(llm, tries=9))
        assert clock.pauses == [jitter * min(LONGEST_PAUSE, FIRST_PAUSE * 2**number) for number in range(8)]


def test_a_pause_is_never_shorter_than_retry_after_says():
    for header, least in (
        ("7", 7.0),
        ("2.5", 2.5),
        (email.utils.formatdate(1_000_030.0, usegmt=True), 30.0),
        ("x", 0),
    ):
        clock = Clock(0.5)
        with ScriptedLLM(two, faults("429"), retry_after=header) as llm:
            ask(clock.models(), options_for(llm))
        assert clock.pauses == [least + 0.5 * FIRST_PAUSE]


def test_an_endpoint_that_asks_for_too_long_a_pause_counts_as_unanswered():
    clock = Clock()
    with ScriptedLLM(two, faults("429"), retry_after="86400") as llm, pytest.raises(CallUnanswered, match="86400 s"):
        ask(clock.models(), options_for(llm))
    assert clock.pauses == []


def test_after_the_last_try_the_error_names_the_model_the_cause_and_the_remedy():
    with ScriptedLLM(two, faults(*["503"] * 9)) as llm, pytest.raises(CallUnanswered) as caught:
        ask(Clock().models(), options_for(llm, tries=4))
    assert sum(llm.requests.values()) == 4
    for part in ("'scripted'", llm.url, "4 tries", "HTTP 503", "concurrency"):
        assert part in str(caught.value)


def test_nobody_at_the_address_is_tried_again_too():
    clock = Clock()
    with ScriptedLLM(two) as llm:
        options = options_for(llm, tries=3)
    with pytest.raises(CallUnanswered, match="ConnectError"):
        ask(clock.models(), options)
    assert len(clock.pauses) == 2


@pytest.mark.parametrize(
    ("status", "for_all", "remedy"),
    [
        ("400", False, "context"),
        ("401", True, "api_key_variable"),
        ("402", True, "credit"),
        ("403", True, "key"),
        ("404", True, "base_url"),
        ("413", False, "longer context"),
        ("422", False, "extra_body"),
    ],
)
def test_what_would_be_refused_again_is_asked_once(status, for_all, remedy):
    clock = Clock()
    with ScriptedLLM(two, faults(*[status] * 9)) as llm, pytest.raises(CallRefused, match=remedy) as caught:
        ask(clock.models(), options_for(llm))
    assert sum(llm.requests.values()) == 1
    assert clock.pauses == []
    assert caught.value.for_all is for_all
    assert "'scripted'" in str(caught.value)
    assert f"HTTP {status}" in str(caught.value)


@pytest.mark.parametrize("content", ['"text"', "{}", '{"choices": []}', '{"choices": "x"}', "<html>", "[1]", ""])
def test_a_body_that_is_no_chat_completion_is_tried_again(content, monkeypatch):
    def send(handler, status, ignored, headers=None):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content.encode())

    monkeypatch.setattr(scripted_llm._Handler, "_send", send)
    with ScriptedLLM(two) as llm, pytest.raises(CallUnanswered, match="not a chat completion"):
        ask(Clock().models(), options_for(llm, tries=2))
    assert sum(llm.requests.values()) == 2


def test_every_personality_is_answered_in_the_end():
    for name, personality in scripted_llm.PERSONALITIES.items():
        with ScriptedLLM(two, personality) as llm:
            for number in range(4):
                ask(Clock().models(), options_for(llm, timeout=0.5), [{"role": "user", "content": f"{name} {number}"}])
            # Counted once it is sent, which the client may be quicker to see.
            llm.wait_until_idle()
            assert len(llm.answered) == 4


def test_calls_share_connections_beyond_the_pool_of_one_client():
    # Nobody is answered before all have arrived.
    everyone = threading.Barrier(120)

    def together(digest: str, visit: int) -> Mood:
        everyone.wait(60)
        return Mood()

    async def many(models: Models, options: ModelOptions) -> list[Completion]:
        async with models:
            calls = [models.complete([{"role": "user", "content": str(number)}], options) for number in range(120)]
            return await asyncio.gather(*calls)

    with ScriptedLLM(lambda messages: messages[0]["content"], together) as llm:
        found = asyncio.run(many(Models(), options_for(llm, tries=1)))
    assert [answer.text for answer in found] == list(map(str, range(120)))


# Keys


def test_keys_go_only_to_those_they_belong_to(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "-o")
    monkeypatch.setenv("MY_KEY", KEY + "-m")

    def key(**fields) -> str | None:
        return ModelOptions("m", **fields).find_api_key()

    assert key() == key(provider="together") == key(base_url="https://router.huggingface.co/v1") == KEY
    assert key(base_url="https://x.eu-west-1.aws.endpoints.huggingface.cloud/v1") == KEY
    assert key(base_url="https://api.openai.com/v1") == KEY + "-o"
    assert key(base_url="http://localhost:8000/v1") is None
    assert key(base_url="https://nothuggingface.co/v1") is None
    assert key(base_url="https://huggingface.co.example.org/v1") is None
    assert key(base_url="http://localhost:8000/v1", api_key_variable="MY_KEY") == KEY + "-m"
    assert key(local=True) is None


def test_an_endpoint_without_a_key_is_not_sent_the_login_of_this_machine(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", KEY)
    with ScriptedLLM(two) as llm:
        ask(Models(), options_for(llm))
    assert KEY not in str(llm.keys)


def test_a_missing_key_is_named_before_anything_is_sent():
    with ScriptedLLM(two) as llm, pytest.raises(CallRefused, match=r"MY_KEY is not set.*'scripted'") as caught:
        ask(Models(), options_for(llm, api_key_variable="MY_KEY"))
    assert not llm.requests
    assert caught.value.for_all


@pytest.mark.parametrize("fault", ["401", "400", "429", "500", "hang", "drop"])
def test_no_error_and_no_log_holds_the_key(fault, monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with ScriptedLLM(two, faults(*[fault] * 9)) as llm:
        options = options_for(llm, api_key_variable="MY_KEY", tries=2, timeout=1.0 if fault == "hang" else 60.0)
        with pytest.raises(ModelError) as caught:
            ask(Clock().models(), options)
        assert llm.keys[0] == f"Bearer {KEY}"
    for text in (whole_text(caught.value), caplog.text, repr(options), str(vars(caught.value))):
        assert KEY not in text
    assert caught.value.__context__ is None


def test_an_answer_that_repeats_the_key_loses_it(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with ScriptedLLM(lambda messages: f"your key is {KEY}") as llm:
        answer = ask(Models(), options_for(llm, api_key_variable="MY_KEY"))
    assert answer.text == "your key is [key]"


@pytest.mark.parametrize(
    "fields",
    [
        {"api_key_variable": KEY},
        {"base_url": f"https://user:{KEY}@example.org/v1"},
        {"base_url": f"https://example.org/v1?api_key={KEY}"},
        {"extra_body": {"api_key": KEY}},
        {"extra_body": {"headers": [{"Authorization": KEY}]}},
    ],
)
def test_options_with_a_key_in_them_are_refused_without_repeating_it(fields):
    with pytest.raises(ValueError, match=r"environment") as caught:
        ModelOptions("m", **fields)
    assert KEY not in whole_text(caught.value)


# Options


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": ""}, "`model` must be"),
        ({"base_url": "localhost:8000"}, "must start with http"),
        ({"base_url": "http://x/v1", "provider": "together"}, "exclude one another"),
        ({"temperature": -1}, r"`temperature` is out of range, got -1"),
        ({"max_tokens": 0}, r"`max_tokens` is out of range, got 0"),
        ({"max_tokens": 1.5}, r"`max_tokens` must be a whole number, got 1.5"),
        ({"timeout": float("nan")}, r"`timeout` is out of range"),
        ({"seed": True}, "`seed` must be a whole number, got True"),
        ({"token_limit_field": "limit"}, "must be one of"),
        ({"extra_body": {"model": "x"}}, "an option of its own"),
        ({"extra_body": {"x": object()}}, "what JSON can hold"),
    ],
)
def test_values_that_cannot_be_used_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelOptions(**{"model": "m", **fields})


def test_a_stage_takes_from_the_default_what_it_does_not_set(tmp_path):
    file = tmp_path / "models.yaml"
    file.write_text(
        "default: {model: large, base_url: 'http://localhost:1/v1', max_tokens: 9}\nbranches: {temperature: 0.7}\n"
    )
    options = StageOptions.load(file)
    assert options.of("steps") == ModelOptions("large", base_url="http://localhost:1/v1", max_tokens=9)
    assert options.of("branches") == ModelOptions(
        "large", base_url="http://localhost:1/v1", max_tokens=9, temperature=0.7
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "must have an entry `default`"),
        ({"default": {"temperature": 1}}, "`default` lacks `model`"),
        ({"default": {"model": "m"}, "branch": {}}, "'branch' is no stage"),
        ({"default": {"model": "m", "temperatur": 1}}, "Did you mean `temperature`"),
        ({"default": {"model": "m"}, "steps": {"max_tokens": 0}}, "`steps`: `max_tokens` is out of range"),
        ({"default": {"model": "m"}, "steps": 3}, "`steps` must be a mapping"),
    ],
)
def test_an_options_file_that_cannot_be_used_is_refused_by_place(content, message):
    with pytest.raises(ValueError, match=message):
        StageOptions.load(content)


def test_a_file_that_is_not_yaml_is_refused_without_quoting_it(tmp_path):
    file = tmp_path / "models.yaml"
    file.write_text(f"default:\n  model: [{KEY}\n")
    with pytest.raises(ValueError, match="is not YAML in line") as caught:
        StageOptions.load(file)
    assert KEY not in str(caught.value)


# A model in this process


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    config = tiny_config("llama", len(tokenizer), max_position_embeddings=256)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_local_model_answers_and_counts_its_tokens(model_folder):
    options = ModelOptions(model_folder, local=True, max_tokens=12)
    answer = ask(Models(), options)
    assert answer == ask(Models(), options)
    prompt = tiny_tokenizer().apply_chat_template(ASKED, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert answer.prompt_tokens == len(prompt)
    assert 0 < answer.completion_tokens <= 12
    assert answer.finish_reason == ("length" if answer.completion_tokens == 12 else "stop")


def test_a_local_model_samples_by_the_seed_and_leaves_the_random_state_alone(model_folder):
    def sampled(seed: int) -> str:
        return ask(Models(), ModelOptions(model_folder, local=True, max_tokens=24, temperature=1.0, seed=seed)).text

    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert sampled(1) == sampled(1) != sampled(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_local_model_refuses_what_does_not_fit_its_context(model_folder):
    long = [{"role": "user", "content": "x " * 200}]
    with pytest.raises(CallRefused, match="takes 256 tokens") as caught:
        ask(Models(), ModelOptions(model_folder, local=True), long)
    assert not caught.value.for_all


def test_a_local_model_that_is_not_there_is_refused_for_all_calls(tmp_path):
    with pytest.raises(CallRefused, match="cannot be loaded") as caught:
        ask(Models(), ModelOptions(str(tmp_path / "none"), local=True))
    assert caught.value.for_all


def test_a_local_answer_that_takes_too_long_ends_and_frees_the_model(model_folder):
    models = Models()
    quick = ModelOptions(model_folder, local=True, max_tokens=2)
    before = ask(models, quick)
    slow = ModelOptions(model_folder, local=True, max_tokens=200, timeout=0.01, extra_body={"min_new_tokens": 200})
    with pytest.raises(CallUnanswered, match=r"more than 0\.01 s"):
        ask(models, slow)
    assert ask(models, quick) == before
