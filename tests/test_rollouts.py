"""Rollouts under stock GRPOTrainer: its log-probabilities, what its loss leaves out, and the model afterwards."""

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from decoding import NESTED, TWO_PATHS, Follow
from grpo_runs import (
    FORK,
    MIXED,
    WORD_OF_ID,
    fresh,
    grpo_config,
    lengths,
    recomputed,
    rollouts,
    trained_tokens,
    with_adapter,
    word_trainer,
)
from multiverse import BranchLayout
from multiverse.trainer.choice import CHOICE_PROBLEMS, rollout_row
from multiverse.trainer.rollouts import MultiverseRollouts, merged_adapters, new_problems
from multiverse.trainer.synthetic import generate_problems
from tiny import EOS, TOKEN_IDS, tiny_ids, tiny_model
from transformers import LogitsProcessorList
from trl import GRPOTrainer


def by_definition(model, inputs: dict[str, torch.Tensor], temperature: float) -> torch.Tensor:
    """Log-probability of every trained token: one unpadded forward pass a row, from the token before in its branch."""
    values = []
    for row, kept in enumerate(trained_tokens(inputs)):
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist()
        completion = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()].tolist()
        ids = [*prompt, *completion]
        branches = BranchLayout.from_token_ids(ids, model.config.multiverse_token_ids).branch_ids.tolist()
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double() / temperature
        for place in (kept.nonzero().flatten() + len(prompt)).tolist():
            before = max(index for index in range(place) if branches[index] == branches[place])
            values.append(logits[before].log_softmax(-1)[ids[place]])
    return torch.stack(values)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_log_probabilities_of_the_trainer_are_those_of_the_rollout(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    trainer = word_trainer(tmp_path, MIXED, model)
    inputs = rollouts(trainer)
    kept = trained_tokens(inputs)
    assert kept.sum() > 100
    assert (inputs["completion_ids"] == TOKEN_IDS["<Path>"]).sum() > 8
    assert len({int(length) for length in inputs["completion_mask"].sum(dim=1)}) > 1, "padding on both sides"
    sampled_with = inputs["sampling_per_token_logps"]
    assert (sampled_with[~kept] == 0).all()
    # The trainer keeps them in float32.
    difference = (recomputed(trainer, inputs) - sampled_with).abs()
    assert difference[kept].max() <= 1e-5
    expected = by_definition(model, inputs, temperature=1.0)
    torch.testing.assert_close(sampled_with[kept].double(), expected, atol=1e-5, rtol=0)

    model.config.multiverse_token_ids = None
    assert (recomputed(trainer, inputs) - sampled_with).abs()[kept].max() > 0.1, "the layout must matter"


def test_at_another_temperature_the_trainer_goes_by_its_own_log_probabilities(tmp_path: Path) -> None:
    trainer = word_trainer(tmp_path, MIXED, temperature=0.7)
    inputs = rollouts(trainer)
    assert "sampling_per_token_logps" not in inputs
    found = recomputed(trainer, inputs)[trained_tokens(inputs)].double()
    torch.testing.assert_close(found, by_definition(trainer.model, inputs, 0.7), atol=1e-5, rtol=0)


@pytest.mark.parametrize("script", [TWO_PATHS, NESTED], ids=["two paths", "nested"])
def test_loss_leaves_out_exactly_what_the_engine_forces(script, tmp_path: Path) -> None:
    starts = [1, 6, 14]
    prompts = [" ".join(WORD_OF_ID[token_id] for token_id in script.ids[:start]) for start in starts]
    seen: dict[str, list] = {}

    def keep(reports, structure_problems, **columns):
        seen.update(reports=reports, problems=structure_problems)
        return [0.0] * len(reports)

    trainer = word_trainer(tmp_path, prompts, rewards=keep, generation_kwargs={}, max_completion_length=500)
    processors = LogitsProcessorList([Follow(script)])
    trainer.model.generate = functools.partial(trainer.model.generate, logits_processor=processors)
    inputs = rollouts(trainer)
    for row, start in enumerate(start for start in starts for _ in range(2)):
        real = inputs["completion_mask"][row].bool()
        ids = inputs["completion_ids"][row][real].tolist()
        # `NESTED` ends two of its paths by an end of sequence, and the trainer would cut an answer there.
        assert ids == script.ids[start:]
        assert EOS not in ids[:-1]
        expected = [int(index not in script.forced) for index in range(start, len(script.ids))]
        assert inputs["tool_mask"][row][real].tolist() == expected
        assert inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist() == script.ids[:start]
    assert seen["problems"] == [[]] * 6
    assert [report.forced_tokens for report in seen["reports"]] == [len(script.forced)] * 6
    assert {report.finish_reason for report in seen["reports"]} == {"eos"}


@pytest.mark.parametrize("limit", ["length", "max_path_tokens", "max_sequential_steps"])
def test_row_that_a_limit_closes_brings_no_padding_and_has_no_end(limit: str, tmp_path: Path) -> None:
    limits = {"length": {}, "max_path_tokens": {limit: 8}, "max_sequential_steps": {limit: 15}}[limit]
    trainer = word_trainer(
        tmp_path, MIXED, max_completion_length=30, generation_kwargs={"sequence_bias": FORK, **limits}
    )
    made = MultiverseRollouts()([prompt for prompt in MIXED for _ in range(2)], trainer)
    endings = {branch.finish_reason for report in made["reports"] for branch in report.branches}
    assert limit in endings | {report.finish_reason for report in made["reports"]}
    for ids, mask, report in zip(made["completion_ids"], made["env_mask"], made["reports"], strict=True):
        assert len(ids) == len(mask) == report.generated_tokens <= 30
        assert len(mask) - sum(mask) == report.forced_tokens
        # By its last token the trainer tells what was cut off.
        assert (ids[-1] == EOS) == (report.finish_reason == "eos")


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dapo"},
        {"loss_type": "grpo"},
        {"loss_type": "dr_grpo", "entropy_coef": 0.1},
        {"loss_type": "bnpo", "top_entropy_quantile": 0.5},
        {"loss_type": "cispo", "epsilon_high": 5.0},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_no_gradient_reaches_the_logits_of_forced_tokens(options: dict, tmp_path: Path) -> None:
    trainer = word_trainer(tmp_path, MIXED, tiny_model(dtype=torch.float32), **options)
    inputs = rollouts(trainer)
    hidden: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        output.retain_grad()
        hidden.append(output)

    trainer.model.model.norm.register_forward_hook(keep)
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    # A last hidden state serves nothing but the prediction of the next token.
    reached = hidden[-1].grad.ne(0).any(dim=-1)
    prompt = inputs["prompt_ids"].shape[1]
    expected = torch.zeros_like(reached)
    weighted = trained_tokens(inputs)
    assert 0 < weighted.sum() < inputs["completion_mask"].sum()
    if "entropy_coef" not in options:
        weighted = weighted & (inputs["advantages"] != 0)[:, None]
    expected[:, prompt - 1 : -1] = weighted
    assert expected.sum() > 50
    if "top_entropy_quantile" in options:
        assert 0 < reached.sum() < expected.sum()
        assert not (reached & ~expected).any()
    else:
        assert torch.equal(reached, expected)

    honest = trainer._get_per_token_logps_and_entropies

    def perturbed(*arguments, **keywords):
        log_probabilities, entropies, rest = honest(*arguments, **keywords)
        elsewhere = (~trained_tokens(inputs)).float()
        return log_probabilities - 3 * elsewhere, entropies + 5 * elsewhere, rest

    trainer._get_per_token_logps_and_entropies = perturbed
    if "top_entropy_quantile" not in options:
        assert torch.equal(trainer.compute_loss(trainer.model, dict(inputs)), loss)


def test_rollouts_repeat_with_the_seed_and_differ_within_a_group(tmp_path: Path) -> None:
    trainer = word_trainer(tmp_path, MIXED)
    first, again, other = (rollouts(trainer, seed)["completion_ids"].tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert all(first[row] != first[row + 1] for row in range(0, len(first), 2))
    assert trainer.model.training


def test_prompts_are_tokenised_as_the_trainer_does(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    problems = generate_problems(2, 0, CHOICE_PROBLEMS)
    for prompts in (
        [rollout_row(problem, "free", tokenizer)["prompt"] for problem in problems],
        [problem.question for problem in problems],
    ):
        dataset = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
        config = grpo_config(tmp_path, 2, max_completion_length=2, generation_kwargs={})
        trainer = GRPOTrainer(model, lengths, config, dataset, processing_class=tokenizer)
        made = MultiverseRollouts()(prompts, trainer)
        assert made["prompt_ids"] == trainer._tokenize_prompts(prompts)[0]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_adapters_are_merged_for_the_rollout_and_the_weights_put_back_bit_by_bit(tied: bool, tmp_path: Path) -> None:
    model = with_adapter(tiny_model(tie_word_embeddings=tied, initializer_range=0.2))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = word_trainer(tmp_path, MIXED, model)
    plain_head = model.get_base_model().get_output_embeddings().original_module
    merged_head: list[torch.Tensor] = []
    plain_head.register_forward_hook(lambda module, *_: merged_head.append(module.weight.detach().clone()))
    inputs = rollouts(trainer)
    assert not torch.equal(
        merged_head[0],
        before[next(name for name in before if "lm_head" in name and name.endswith("base_layer.weight"))],
    )
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())
    kept = trained_tokens(inputs)
    assert (recomputed(trainer, inputs) - inputs["sampling_per_token_logps"]).abs()[kept].max() <= 1e-5

    trainer.rollout_func = MultiverseRollouts(merge_adapters=False)
    unmerged = rollouts(trainer)
    assert unmerged["completion_ids"].tolist() == inputs["completion_ids"].tolist()
    difference = unmerged["sampling_per_token_logps"] - inputs["sampling_per_token_logps"]
    assert difference.abs().max() <= 1e-5


def test_dropout_is_off_while_completions_are_made(tmp_path: Path) -> None:
    trainer = word_trainer(tmp_path, MIXED, with_adapter(tiny_model(), dropout=0.5))
    trainer.rollout_func = MultiverseRollouts(merge_adapters=False)
    inputs = rollouts(trainer)
    assert trainer.model.training
    kept = trained_tokens(inputs)
    assert (recomputed(trainer, inputs) - inputs["sampling_per_token_logps"]).abs()[kept].max() > 0.1
    trainer.model.eval()
    assert (recomputed(trainer, inputs) - inputs["sampling_per_token_logps"]).abs()[kept].max() <= 1e-5


def test_interrupted_rollout_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = with_adapter(tiny_model())
    trainer = word_trainer(tmp_path, MIXED, model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}

    def interrupted(**arguments):
        raise KeyboardInterrupt

    model.generate = interrupted
    with pytest.raises(KeyboardInterrupt):
        rollouts(trainer)
    assert model.training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_weights_in_half_precision_are_not_merged() -> None:
    model = with_adapter(tiny_model(dtype=torch.bfloat16))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with merged_adapters(model):
        assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_problems_of_the_prompt_are_not_held_against_the_completion() -> None:
    prompt = tiny_ids("</Path> a <Parallel> <Goal> <Outline> 1 : b </Outline> </Goal>")
    rest = tiny_ids("_ <Path> _ 1 : c </Path> _ <Conclusion> d </Conclusion> </Parallel> e")
    assert new_problems(prompt, rest, TOKEN_IDS) == []
    found = new_problems(prompt, [*rest, TOKEN_IDS["</Path>"]], TOKEN_IDS)
    assert [(problem.kind, problem.index) for problem in found] == [("stray close", len(prompt) + len(rest))]


def test_options_without_branches_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = word_trainer(tmp_path, MIXED[:1])
    rollout = MultiverseRollouts()
    for name, value in (("use_vllm", True), ("use_transformers_continuous_batching", True), ("tools", [lengths])):
        with monkeypatch.context() as patch:
            patch.setattr(trainer, name, value)
            with pytest.raises(ValueError, match=f"`{name}`"):
                rollout(MIXED[:1], trainer)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.accelerator.state, "fsdp_plugin", SimpleNamespace(fsdp_version=2), raising=False)
        with pytest.raises(ValueError, match="`fsdp`"):
            rollout(MIXED[:1], trainer)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.generation_config, "num_beams", 2)
        with pytest.raises(ValueError, match="`generation_kwargs`"):
            rollout(MIXED[:1], trainer)
    trainer.model.config.multiverse_token_ids = None
    with pytest.raises(ValueError, match="`token_ids` is empty"):
        rollout(MIXED[:1], trainer)
