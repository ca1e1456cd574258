"""A model of transformers' in this process: no HTTP, no key, one call at a time."""

import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from multiverse.curator.completion import CallRefused, CallUnanswered, Completion
from multiverse.curator.model_options import ModelOptions
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList


class LocalModels:
    """Answers calls with models that are loaded at their first call and kept.

    Generation runs in a thread, so that the event loop goes on; a call that is cancelled or takes longer than
    `timeout` ends at its next token.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, tuple[Any, Any]] = {}
        self._lock = threading.Lock()

    async def complete(self, messages: Sequence[Mapping[str, str]], options: ModelOptions) -> Completion:
        """Writes one answer.

        Args:
            messages (`Sequence[Mapping[str, str]]`): chat messages.
            options (`ModelOptions`): the model; `extra_body` goes to `generate()`.

        Raises:
            CallRefused: if the model cannot be loaded, or the messages do not fit into its context.
            CallUnanswered: if the answer takes longer than `timeout`.
        """
        stop = threading.Event()
        work = asyncio.get_running_loop().run_in_executor(None, self._answer, messages, options, stop)
        try:
            return await asyncio.wait_for(asyncio.shield(work), options.timeout)
        except (asyncio.TimeoutError, TimeoutError):
            late = CallUnanswered(
                options.model, f"{options.model!r} wrote for more than {options.timeout:g} s. Raise `timeout`."
            )
        finally:
            stop.set()
            # An error after that has nobody to go to, and asyncio would complain of it.
            work.add_done_callback(lambda done: done.cancelled() or done.exception())
        raise late

    def _answer(
        self, messages: Sequence[Mapping[str, str]], options: ModelOptions, stop: threading.Event
    ) -> Completion:
        with self._lock:
            if stop.is_set():
                raise CallUnanswered(options.model, "The call was given up before it began.")
            model, tokenizer = self._load(options.model)
            prompt = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            ).to(model.device)
            length = prompt["input_ids"].shape[1]
            context = getattr(model.config, "max_position_embeddings", None)
            if context is not None and length >= context:
                raise CallRefused(
                    options.model,
                    f"{options.model!r} takes {context} tokens, and a call has {length}. Choose a model with a longer "
                    "context, or shorter chains.",
                )
            room = options.max_tokens if context is None else min(options.max_tokens, context - length)
            with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), torch.no_grad():
                if options.seed is not None:
                    torch.manual_seed(options.seed)
                ids = model.generate(
                    **prompt,
                    **_generation(model, tokenizer, options),
                    max_new_tokens=room,
                    stopping_criteria=StoppingCriteriaList([_Stop(stop)]),
                )[0, length:].tolist()
        ends = model.generation_config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        ended = bool(ids) and ids[-1] in ends
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return Completion(text, "stop" if ended or len(ids) < room else "length", length, len(ids), options.model)

    def _load(self, name: str) -> tuple[Any, Any]:
        if name not in self._loaded:
            try:
                tokenizer = AutoTokenizer.from_pretrained(name)
                model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
            except (OSError, ValueError) as error:
                raise CallRefused(
                    name,
                    f"`model` {name!r} cannot be loaded: {error}. Give a folder or an id on the Hub.",
                    for_all=True,
                ) from None
            if tokenizer.chat_template is None:
                raise CallRefused(name, f"`model` {name!r} has no chat template. Choose a chat model.", for_all=True)
            self._loaded[name] = model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer
        return self._loaded[name]


class _Stop(StoppingCriteria):
    """Ends generation once an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._event.is_set(), dtype=torch.bool, device=input_ids.device)


def _generation(model: Any, tokenizer: Any, options: ModelOptions) -> dict[str, Any]:
    """Arguments of `generate()`; what sampling alone uses is taken out where there is none, or it would warn."""
    chosen: dict[str, Any] = {}
    if options.temperature == 0:
        chosen = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    elif options.temperature is not None:
        chosen = {"do_sample": True, "temperature": float(options.temperature)}
    if model.generation_config.pad_token_id is None:
        chosen["pad_token_id"] = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    return {**chosen, **options.extra_body}
