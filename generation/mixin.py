"""`model.generate()` for Multiverse models.

transformers prepares everything as usual (configuration, processors, criteria, limits, padding); only the inner loop
is ours. It is reached through `_sample`, which `generate()` looks up on the class.
"""

from collections.abc import Callable
from typing import Any

import torch
from multiverse.cache_argument import CACHE_ARGUMENT, take_cache
from multiverse.forced import HeaderTokens
from multiverse.kernels.dispatch import resolve_decode_attention
from multiverse.masking_multiverse import CachedStructure
from multiverse.tags import check_token_ids
from transformers import Cache, GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from .arguments import (
    GENERATION_DEFAULTS,
    check_decoding,
    check_generate_arguments,
    check_input_preparation,
    fills_steps,
    in_stock_loop,
    packs_linears,
    row_seeds,
)
from .attachment import attached
from .criteria import criteria_of_row
from .engine import Engine, EngineOptions
from .output import MultiverseGenerateOutput, collect_output
from .past import WANTED, cached_columns, check_past_structure, return_past
from .processors import RowPrefixConstraint, processors_of_row
from .request import Request, RequestRules
from .sampling import SamplingOptions


class MultiverseGenerationMixin(GenerationMixin):
    """Greedy and multinomial decoding in which the paths of a block run side by side.

    Arguments of `generate()` beyond transformers' own, also as attributes of `generation_config`:

    - `parallel` (`bool`, default `True`): `False` decodes the same layout one path at a time.
    - `max_paths` (`int`, default 64): most paths of a request that run side by side; further ones wait their turn.
    - `max_depth` (`int`, default 8): most blocks around a token; deeper paths are not offered another block.
    - `max_path_tokens` (`int`, *optional*): a path that holds this many tokens itself is closed.
    - `max_sequential_steps` (`int`, *optional*): budget of the critical path; then everything open is closed.
    - `max_kv_slots` (`int`, *optional*): cache slots a request may hold, one per token of prompt and answer; then
      everything open is closed.
    - `seed` (`int` or `list[int]`, *optional*): what a sampled request draws from, whatever else is in the batch; an
      `int` stands for itself, itself + 1, ... over the rows. Without it, seeds come from torch's global generator.
    - `decode_attention` (`str`, default `"auto"`): `"path_decode"` is the Triton kernel, `"folded"` runs the branches
      and heads of a request as rows of one attention call, `"model"` is the model's own implementation. Automatic:
      `"path_decode"` on a GPU, `"folded"` on a CPU, `"model"` under `eager` and `flex_attention`.
    - `pack_linears` (`bool`, *optional*): whether to decode on copies of the weights in oneDNN's layout, for models on
      a CPU. Automatic: where there is memory for them and enough tokens to gain from it.
    - `static_shapes` (`bool`, *optional*): whether decode steps are filled up to one of a few sizes, so that what is
      compiled or tuned for a shape serves every step. Automatic: on a GPU.

    `max_new_tokens` counts every token made, in all branches, forced ones included. Tags that would break the
    structure where they stand are never sampled. With `return_dict_in_generate=True` the result is a
    [`MultiverseGenerateOutput`]. An exception in the middle of decoding (a streamer's, a criterion's, Ctrl-C) carries
    what was made until then, closed and well-formed, as its attribute `partial_output`.

    With `parallel=False`, beam search and beam sampling (`num_beams`), assisted decoding (`assistant_model`,
    `assistant_early_exit`) and prompt lookup (`prompt_lookup_num_tokens`) run in transformers' own loops, with its own
    outputs. The tags that the model writes have the meaning of LAYOUT.md there too, but that is all: nothing is forced
    and nothing banned, so path headers, separators, `<Conclusion>` and a sound structure are up to the model, and of
    the arguments above only `parallel` counts; `max_path_tokens`, `max_sequential_steps`, `max_kv_slots` and `seed`
    are refused.

    `past_key_values` of an earlier turn may be passed along with the whole text, the cached tokens first: the returned
    `sequences` and what follows them. The cache that is passed is filled anew, so one `DynamicCache` serves a whole
    conversation, and forward passes too. transformers from 5.24 on calls the argument `cache`; both names work there.
    """

    def set_generation_defaults(self) -> None:
        """Gives `generation_config` the engine's fields where it lacks them (a checkpoint of a plain model)."""
        # Marked as derived from the model's configuration, it would lose them when it is saved and loaded again.
        self.generation_config._from_model_config = False
        for name, default in GENERATION_DEFAULTS.items():
            if not hasattr(self.generation_config, name):
                setattr(self.generation_config, name, default)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `GenerationMixin.generate`; see the class for the additional arguments.

        Raises:
            ValueError: before any work is done, for empty or malformed input, limits that are not positive, and
                decoding modes that cannot fork (beam search and assisted decoding without `parallel=False`,
                contrastive search, paged caches).
        """
        self.set_generation_defaults()
        if (past := take_cache(kwargs)) is not None:
            kwargs[CACHE_ARGUMENT] = past
            setattr(past, WANTED, True)
        given = inputs if inputs is not None else kwargs.get("input_ids")
        check_generate_arguments(given, generation_config, kwargs, self.generation_config)
        if self.config.multiverse_token_ids:
            config, _ = self._prepare_generation_config(generation_config, **kwargs)
            if not in_stock_loop(config, kwargs) and prefix_allowed_tokens_fn is not None:
                constraint = RowPrefixConstraint(prefix_allowed_tokens_fn)
                logits_processor = LogitsProcessorList([*(logits_processor or []), constraint])
                prefix_allowed_tokens_fn = None
        return super().generate(
            inputs, generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, **kwargs
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the paged cache of continuous batching knows no branches."""
        raise ValueError(
            "Continuous batching (`generate_batch`, `init_continuous_batching`) needs a paged cache, which cannot "
            "fork. Give the prompts to `generate()` as one left-padded batch: its requests share every step."
        )

    def create_masks_for_generate(self, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Leaves masks to the backbone, which knows the branches (transformers would prepare a plain causal one)."""
        return attention_mask

    def _reorder_cache(self, past_key_values: Cache, beam_idx: torch.LongTensor) -> Cache:
        """Lets the recorded branches go with their rows (beam search calls this between steps).

        Args:
            beam_idx (`torch.LongTensor` of shape `(rows,)`): for every row the one that it goes on from.
        """
        CachedStructure.reorder(past_key_values, beam_idx)
        return past_key_values

    def _sample(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> MultiverseGenerateOutput | torch.LongTensor:
        """Runs the branch engine; a model without tags, or one that drafts for another, does as its base class."""
        if not self.config.multiverse_token_ids or generation_config.is_assistant:
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                **model_kwargs,
            )
        check_decoding(generation_config, synced_gpus)
        check_input_preparation(self)
        eos_criteria = [criteria for criteria in stopping_criteria if isinstance(criteria, EosTokenCriteria)]
        eos = {int(token) for criteria in eos_criteria for token in criteria.eos_token_id.flatten()}
        handled = (EosTokenCriteria, MaxLengthCriteria)
        rules = RequestRules(
            token_ids=check_token_ids(self.config.multiverse_token_ids),
            header=HeaderTokens(self.config.multiverse_separator_ids, self.config.multiverse_label_ids),
            eos_token_ids=frozenset(eos),
            max_new_tokens=(stopping_criteria.max_length or generation_config.max_length) - input_ids.shape[1],
            max_path_tokens=generation_config.max_path_tokens,
            max_depth=generation_config.max_depth,
            max_sequential_steps=generation_config.max_sequential_steps,
            max_kv_slots=generation_config.max_kv_slots,
        )
        mask = model_kwargs.get("attention_mask")
        real = torch.ones_like(input_ids, dtype=torch.bool).cpu() if mask is None else mask.bool().cpu()
        prompts = [row[kept].tolist() for row, kept in zip(input_ids.cpu(), real, strict=True)]
        if not all(prompts):
            raise ValueError("`attention_mask` hides every token of a row. Give each row at least one prompt token.")
        past = take_cache(model_kwargs)
        columns = cached_columns(past, input_ids, real)
        as_dict = bool(generation_config.return_dict_in_generate)
        sampling = SamplingOptions(
            processors=[
                processors_of_row(logits_processor, row, input_ids.shape[1] - len(prompt))
                for row, prompt in enumerate(prompts)
            ],
            seeds=row_seeds(generation_config.seed, len(prompts)) if generation_config.do_sample else None,
            keep_logits=as_dict and bool(generation_config.output_logits),
            keep_scores=as_dict and bool(generation_config.output_scores),
            keep_logprobs=as_dict,
        )
        requests = [Request(prompt, rules) for prompt in prompts]
        if past is not None and columns is not None:
            check_past_structure(past, [request.machine for request in requests], [len(own) for own in columns])
        criteria = StoppingCriteriaList(each for each in stopping_criteria if not isinstance(each, handled))
        rows = [
            criteria_of_row(criteria, len(prompts), input_ids[row : row + 1, : input_ids.shape[1] - len(prompt)])
            for row, prompt in enumerate(prompts)
        ]
        pad_token_id = generation_config.pad_token_id
        if pad_token_id is None:
            pad_token_id = min(eos) if eos else 0

        def collected() -> MultiverseGenerateOutput:
            return collect_output(input_ids, real, requests, int(pad_token_id), sampling)

        with attached(self, pack=packs_linears(self, generation_config.pack_linears, rules.max_new_tokens)) as own:
            options = EngineOptions(
                implementation=resolve_decode_attention(generation_config.decode_attention, own, self.device),
                width=generation_config.max_paths if generation_config.parallel else 1,
                static_shapes=fills_steps(generation_config.static_shapes, self.device),
            )
            try:
                engine = Engine(self, requests, sampling, rows, options, streamer)
                engine.run(past, columns)
            except BaseException as error:
                # Ctrl-C included: hours of decoding must not be lost with it.
                for request in requests:
                    if not request.finished:
                        request.close("interrupted")
                error.partial_output = collected()  # type: ignore[attr-defined]
                raise
            output = collected()
            wanted = getattr(past, WANTED, False)
            if past is not None and (as_dict or wanted):
                if wanted:
                    engine.model_step.run_rest()
                assert output.sequences is not None and output.branch_ids is not None  # noqa: PT018
                real = torch.cat([real, output.branch_ids[:, real.shape[1] :].cpu() >= 0], dim=1)
                return_past(past, engine.model_step.cache, requests, output.sequences, real)
                setattr(output, CACHE_ARGUMENT, past)
        return output if as_dict else output.sequences
