"""A Multiverse checkpoint as the model under lm-evaluation-harness, with what its own `hf` model leaves out.

The harness's `hf` model runs an exported checkpoint as it is. This subclass adds stop strings that leave the text
before them as it would be without them, adapters over a plain base, tags that stay in the text, and a report beside
every answer. It registers itself as `multiverse`:

`python -m multiverse.evaluation.lm_eval_model --model multiverse --model_args pretrained=my-model --tasks gsm8k ...`
"""

import json
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from multiverse import MultiverseForCausalLM, add_multiverse_tokens
from multiverse.evaluation.lm_eval_stop import StopOutsidePaths
from transformers import StoppingCriteriaList

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(f"The harness is missing ({error}): pip install 'multiverse-transformers[evaluate]'") from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


@register_model("multiverse")
class MultiverseLM(HFLM):
    """lm-evaluation-harness's `hf` model for checkpoints with tags.

    Log-likelihoods are those of `hf`: the forward pass reads the layout from the token ids by itself.

    Args:
        pretrained (`str` or `PreTrainedModel`): folder, Hub id, or a model (then with `tokenizer`).
        peft (`str`, *optional*): folder or Hub id of an adapter, merged into `pretrained`, which is given the tags
            where it lacks them.
        parallel (`bool`): `False` decodes one path at a time. `gen_kwargs` of a task go before it.
        reports (`str`, *optional*): JSON-lines file of the reports, written anew after every batch of requests.
        kwargs: as for `hf`. Arguments of `generate()` go into `gen_kwargs` (`max_gen_toks` for `max_new_tokens`).

    Attributes:
        records (`list[dict]`): per answer, in the order in which the harness asked: `task`, `doc_id`, `repeat` and the
            fields of a `RequestReport` (none of them where transformers' own loops have decoded).

    Raises:
        ValueError: if the model knows no tags, or `parallel` is no bool.
    """

    AUTO_MODEL_CLASS = MultiverseForCausalLM

    def __init__(
        self,
        pretrained: Any,
        peft: str | None = None,
        parallel: bool = True,
        reports: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(parallel, bool):
            raise ValueError(f"`parallel` must be True or False, got {parallel!r}.")
        super().__init__(pretrained=pretrained, peft=peft, **kwargs)
        if not self.model.config.multiverse_token_ids:
            raise ValueError(
                f"`pretrained` ({pretrained if isinstance(pretrained, str) else type(pretrained).__name__}) knows no "
                "Multiverse tags. Run a plain model with `--model hf`."
            )
        self.parallel = parallel
        self.reports = reports
        self.records: list[dict[str, Any]] = []
        self._contexts: list[str] = []
        self._made: dict[str, deque[dict[str, Any]]] = defaultdict(deque)
        tag_ids = set(self.model.config.multiverse_token_ids.values())
        self._left_out = set(self.tokenizer.all_special_ids) - tag_ids

    def _create_model(self, *args: Any, peft: str | None = None, **kwargs: Any) -> None:
        """As `hf`, which does not know how to give a base the tags that its adapter was trained with."""
        super()._create_model(*args, **kwargs)
        if peft is None:
            return
        from peft import PeftModel

        model = self.model
        add_multiverse_tokens(model, self.tokenizer)
        self._model = PeftModel.from_pretrained(model, peft).merge_and_unload()

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """Text without special tokens, apart from tags: published tokenizers hold them as special ones."""
        if skip_special_tokens:
            tokens = [
                token for token in ([tokens] if isinstance(tokens, int) else tokens) if token not in self._left_out
            ]
        return self.tokenizer.decode(tokens)

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As `hf`; keeps the prompts of a batch, which is generated next."""
        self._contexts = list(strings)
        return super().tok_batch_encode(strings, *args, **kwargs)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """Decodes a left-padded batch.

        Args:
            context (`torch.LongTensor` of shape `(batch_size, length)`): the prompts.
            max_length (`int`): of prompt and answer.
            stop (`list[str]`): the answer ends before the first of them.
            generation_kwargs: of the task, and `attention_mask`.

        Returns:
            `torch.LongTensor` of shape `(batch_size, at most max_length)`: prompts and answers in linear order.
        """
        generation_kwargs = {"parallel": self.parallel, **generation_kwargs}
        if not generation_kwargs.get("do_sample"):
            generation_kwargs.update(do_sample=False)
            generation_kwargs.pop("temperature", None)
        criterion = StopOutsidePaths(
            stop,
            self.tokenizer,
            self.model.config.multiverse_token_ids,
            context,
            generation_kwargs.get("attention_mask"),
        )
        with torch.autocast(
            device_type=self.device.type,
            dtype=self.mixed_precision_dtype,
            enabled=self.mixed_precision_dtype is not None,
        ):
            output = self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=StoppingCriteriaList([criterion]),
                pad_token_id=self.tokenizer.pad_token_id,
                return_dict_in_generate=True,
                **generation_kwargs,
            )
        reports = getattr(output, "reports", None)
        for row, text in enumerate(self._contexts):
            self._made[text].append({} if reports is None else reports[row].to_dict())
        return output.sequences

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """As `hf`; keeps a report of every answer in `records`."""
        self._made.clear()
        texts = super().generate_until(requests, disable_tqdm)
        # The harness answers one set of generation arguments after another, and equal prompts in their order.
        sets: dict[str, int] = {}
        turns = [
            sets.setdefault(json.dumps(each.args[1], sort_keys=True, default=str), len(sets)) for each in requests
        ]
        reports: dict[int, dict[str, Any]] = {}
        for _, index in sorted(zip(turns, range(len(requests)), strict=True)):
            reports[index] = self._made[requests[index].args[0]].popleft()
        repeats: Counter[tuple[Any, Any]] = Counter()
        for index, request in enumerate(requests):
            place = (request.task_name, request.doc_id)
            record = {"task": request.task_name, "doc_id": request.doc_id, "repeat": repeats[place]}
            self.records.append({**record, **reports[index]})
            repeats[place] += 1
        if self.reports is not None:
            self._write_records(Path(self.reports))
        return texts

    def _write_records(self, path: Path) -> None:
        if self.world_size > 1:
            path = path.with_name(f"{path.stem}_rank{self.rank}{path.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in self.records))

    def summary(self) -> dict[str, Any]:
        """Sums over `records`: tokens, sequential steps, degree of parallelism (their ratio), finish reasons."""
        known = [record for record in self.records if "sequential_steps" in record]
        tokens = sum(record["generated_tokens"] for record in known)
        steps = sum(record["sequential_steps"] for record in known)
        return {
            "parallel": self.parallel,
            "answers": len(known),
            "generated_tokens": tokens,
            "sequential_steps": steps,
            "degree_of_parallelism": tokens / max(steps, 1),
            "finish_reasons": dict(Counter(record["finish_reason"] for record in known)),
        }

    def get_model_info(self) -> dict[str, Any]:
        """As `hf`, with the summary: the harness puts it into the results' `config` after the run."""
        return {**super().get_model_info(), "multiverse": self.summary()}


def main(arguments: Sequence[str] | None = None) -> None:
    """The harness's own command (`lm-eval`), in which `--model multiverse` is known.

    Args:
        arguments (`Sequence[str]`, *optional*): of the command; by default the process's own.
    """
    if arguments is not None:
        sys.argv[1:] = arguments
    cli_evaluate()


if __name__ == "__main__":
    main()
