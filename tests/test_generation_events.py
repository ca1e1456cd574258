"""Events of the branches: each in its place, and together the whole text."""

import pytest
import torch
from cases import both_modes
from decoding import FORK_AND_END, MIXED, NESTED, PROMPTS, TWO_PATHS, follow, padded
from multiverse import TAGS, add_multiverse_tokens
from multiverse.generation.streaming import BranchEvent, BranchStreamer, EventStreamer
from tiny import tiny_ids, tiny_model, tiny_tokenizer
from transformers import LogitsProcessorList


class Events(EventStreamer):
    def __init__(self, tokenizer) -> None:
        super().__init__(tokenizer)
        self.events: list[BranchEvent] = []
        self.tokens: list[list[list[int]]] = []

    def on_event(self, event: BranchEvent) -> None:
        self.events.append(event)

    def put_step(self, requests) -> None:
        super().put_step(requests)
        self.tokens = [[token.id for token in request.root.tokens()] for request in requests]

    def row(self, number: int) -> list[BranchEvent]:
        return [event for event in self.events if event.request == number]


class WordTokenizer:
    """Shows ids as they are: what a test needs to compare texts."""

    def decode(self, ids, skip_special_tokens=False) -> str:
        return "".join(f"[{token}]" for token in ids)


@both_modes
@pytest.mark.parametrize("script", [TWO_PATHS, NESTED], ids=["two paths", "nested"])
def test_events_tell_the_story_of_a_script(script, parallel: bool) -> None:
    events = Events(WordTokenizer())
    follow(script, streamer=events, parallel=parallel)
    state: dict[str, str] = {"": "opened"}
    following = {"text": ("opened",), "closed": ("opened",), "merged": ("closed",)}
    for event in events.events:
        if event.kind == "opened":
            # Labels come again in a later block.
            assert state.get(event.path, "merged") == "merged"
            state[event.path] = "opened"
        else:
            assert state[event.path] in following[event.kind]
            state[event.path] = state[event.path] if event.kind == "text" else event.kind
    assert {path: last for path, last in state.items() if path} == dict.fromkeys(set(state) - {""}, "merged")
    closed = [event.path for event in events.events if event.kind == "closed"]
    assert sorted(closed) == sorted(event.path for event in events.events if event.kind == "merged")
    assert "".join(event.text for event in events.events).count("[") == len(script.ids) - 1
    if parallel:
        texts = [event.path for event in events.events if event.kind == "text" and event.path in ("1", "2")]
        assert texts[:4] == ["1", "2", "1", "2"], "siblings grow side by side"


def test_texts_of_a_branch_are_the_text_of_the_branch() -> None:
    events = Events(WordTokenizer())
    prompts = [tiny_ids(PROMPTS[name]) for name in MIXED]
    tiny_model().generate(
        **padded(prompts),
        logits_processor=LogitsProcessorList([FORK_AND_END]),
        max_new_tokens=90,
        streamer=events,
    )
    for number, tokens in enumerate(events.tokens):
        found = [token for event in events.row(number) for token in event.token_ids]
        assert sorted(found) == sorted(tokens)
        for event in events.row(number):
            assert event.text == "".join(f"[{token}]" for token in event.token_ids)


def test_characters_of_several_tokens_come_whole() -> None:
    tokenizer = tiny_tokenizer()
    events = Events(tokenizer)
    model = tiny_model(dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    token_ids = add_multiverse_tokens(model, tokenizer)
    assert set(token_ids) == set(TAGS)
    text = "naïve — 你好 \N{GRINNING FACE} done"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)

    class Say:
        def __call__(self, input_ids, scores):
            made = input_ids.shape[1]
            kept = torch.full_like(scores, -torch.inf)
            kept[:, ids[made] if made < len(ids) else tokenizer.eos_token_id] = 0
            return kept

    model.generate(
        torch.tensor([ids[:1]]),
        logits_processor=LogitsProcessorList([Say()]),
        max_new_tokens=len(ids) - 1,
        eos_token_id=tokenizer.eos_token_id,
        streamer=events,
    )
    pieces = [event.text for event in events.events if event.kind == "text"]
    assert "".join(pieces) == text[1:]
    assert not any("�" in piece for piece in pieces)


@pytest.mark.parametrize(("base", "missing"), [(EventStreamer, "on_event"), (BranchStreamer, "put_step")])
def test_streamer_without_a_handler_is_refused_before_it_is_used(base: type, missing: str) -> None:
    with pytest.raises(TypeError, match=missing):
        type("Unfinished", (base,), {})()
