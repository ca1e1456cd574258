"""Stock GRPOTrainer on rollouts of the branch engine: log-probabilities, what the loss leaves out, a run for real."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from decoding import NESTED, PROMPTS, TWO_PATHS, Follow
from multiverse import BranchLayout, MultiverseForCausalLM, add_multiverse_tokens
from multiverse.trainer.choice import CHOICE_PROBLEMS, FREE_PROMPT, mixture, rollout_row, write_mixture
from multiverse.trainer.choice_results import answers, by_form, run_log
from multiverse.trainer.grpo import GRPOScriptArguments, build_trainer, check_arguments, main
from multiverse.trainer.peft_support import add_tag_rows, give_wrapped_head_its_bias
from multiverse.trainer.rewards import AccelerationReward, AnswerReward, FormatReward
from multiverse.trainer.rollouts import MultiverseRollouts, merged_adapters, new_problems
from multiverse.trainer.sft import load_model_and_tokenizer
from multiverse.trainer.synthetic import generate_problems
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import EOS, PAD, TOKEN_IDS, VOCABULARY, WORDS, tiny_config, tiny_ids, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LogitsProcessorList, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser

#: Prompts of different lengths, three of them inside a block.
MIXED = [PROMPTS[name] for name in ("plain", "inside a later path", "after a goal", "inside a nested path")]
#: Makes random models fork and end.
FORK = [[[token_id], 2.5] for token_id in TOKEN_IDS.values()] + [[[EOS], 2.0]]
_WORD_OF_ID = {token_id: word for word, token_id in WORDS.items()}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """The fixed vocabulary of `tiny_model` as a tokenizer of words between blanks."""
    spare = {f"w{token_id}": token_id for token_id in range(VOCABULARY) if token_id not in _WORD_OF_ID}
    tokenizer = Tokenizer(models.WordLevel({**WORDS, **spare}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="$", pad_token=f"w{PAD}")


def lengths(completion_ids, **columns) -> list[float]:
    """A reward that differs within a group."""
    return [len(ids) / 100 for ids in completion_ids]


def grpo_config(folder: Path, rows: int, **options) -> GRPOConfig:
    """Options of a short run on the CPU with one generation batch of `rows` completions."""
    return GRPOConfig(
        output_dir=str(folder),
        **{
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "num_generations": 2,
            "per_device_train_batch_size": rows,
            "max_completion_length": 60,
            "shuffle_dataset": False,
            "scale_rewards": "none",
            "generation_kwargs": {"sequence_bias": FORK},
            **options,
        },
    )


def word_trainer(
    folder: Path, prompts: list[str], model=None, rewards=lengths, columns=None, **options
) -> GRPOTrainer:
    """A trainer of a tiny model over prompts in its fixed vocabulary."""
    rows = [{"prompt": prompt, **(columns or {})} for prompt in prompts]
    trainer = GRPOTrainer(
        tiny_model() if model is None else model,
        rewards,
        grpo_config(folder, 2 * len(prompts), **options),
        Dataset.from_list(rows),
        processing_class=word_tokenizer(),
        rollout_func=MultiverseRollouts(),
    )
    # Set in the loop of training, which these tests look into.
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def rollouts(trainer: GRPOTrainer, seed: int = 0) -> dict[str, torch.Tensor]:
    """What the trainer makes of the first generation batch."""
    torch.manual_seed(seed)
    trainer.model.train()
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def recomputed(trainer: GRPOTrainer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities as the trainer computes them for its loss, shape `(rows, completion)`."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with torch.no_grad():
        found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, inputs["completion_ids"].shape[1])
    return found[0]


def trained_tokens(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Bool mask of the completion tokens in the loss."""
    return (inputs["completion_mask"] * inputs["tool_mask"]).bool()


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
    prompts = [" ".join(_WORD_OF_ID[token_id] for token_id in script.ids[:start]) for start in starts]
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


def fresh(architecture: str = "llama", **fields) -> tuple[MultiverseForCausalLM, PreTrainedTokenizerFast]:
    """A tiny model with its tags and a byte-level tokenizer."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = tiny_config(architecture, len(tokenizer), **fields)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = MultiverseForCausalLM(config)
    add_multiverse_tokens(model, tokenizer)
    return model, tokenizer


def with_adapter(model: MultiverseForCausalLM, dropout: float = 0.0) -> PeftModel:
    """A LoRA model whose matrices and tag rows say something."""
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, init_lora_weights=False)
    adapted = get_peft_model(model, add_tag_rows(lora, model))
    give_wrapped_head_its_bias(model)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "trainable_tokens" in name:
                weight += 0.3 * torch.randn_like(weight)
    return adapted


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


def test_advantages_are_centred_in_the_group_and_not_scaled(tmp_path: Path) -> None:
    answer = AnswerReward(judge=lambda text, expected: len(text) % 2 == expected)
    functions = [answer, FormatReward(), AccelerationReward(answer)]
    given: list[list[float]] = []

    def recording(function):
        def reward(**columns):
            given.append(function(**columns))
            return given[-1]

        return reward

    weights = [1.0, 0.2, 0.6]
    trainer = word_trainer(
        tmp_path,
        MIXED,
        rewards=[recording(function) for function in functions],
        columns={"answer": 1, "reference_steps": 60},
        reward_weights=weights,
    )
    inputs = rollouts(trainer)
    values = torch.tensor(given, dtype=torch.float64)
    assert (values[0] == 1).any()
    assert values[2].unique().numel() > 2
    totals = (torch.tensor(weights, dtype=torch.float64)[:, None] * values).sum(dim=0)
    groups = totals.view(-1, 2)
    expected = (groups - groups.mean(dim=1, keepdim=True)).flatten()
    torch.testing.assert_close(inputs["advantages"].double(), expected, atol=1e-6, rtol=0)


def test_problems_of_the_prompt_are_not_held_against_the_completion() -> None:
    prompt = tiny_ids("</Path> a <Parallel> <Goal> <Outline> 1 : b </Outline> </Goal>")
    rest = tiny_ids("_ <Path> _ 1 : c </Path> _ <Conclusion> d </Conclusion> </Parallel> e")
    assert new_problems(prompt, rest, TOKEN_IDS) == []
    found = new_problems(prompt, [*rest, TOKEN_IDS["</Path>"]], TOKEN_IDS)
    assert [(problem.kind, problem.index) for problem in found] == [("stray close", len(prompt) + len(rest))]


def script_arguments(folder: Path, model: Path, token_ids: dict[str, int], eos: int, *more: str) -> list[str]:
    """Command line of a short run on synthetic problems."""
    bias = [[[token_id], 3.0] for token_id in token_ids.values()] + [[[eos], 2.0], [[token_ids["<Parallel>"]], 6.0]]
    return [
        "--model_name_or_path", str(model), "--dtype", "float32", "--output_dir", str(folder),
        "--synthetic_samples", "6", "--synthetic_test_samples", "2", "--synthetic_paths", "2", "2",
        "--synthetic_terms", "2", "3", "--scale_rewards", "none", "--num_generations", "2",
        "--per_device_train_batch_size", "4", "--max_completion_length", "40", "--max_steps", "2",
        "--learning_rate", "1e-2", "--use_cpu", "true", "--bf16", "false", "--report_to", "none",
        "--gradient_checkpointing", "false", "--disable_tqdm", "true", "--logging_steps", "1",
        "--save_strategy", "steps", "--save_steps", "1", "--generation_kwargs", json.dumps({"sequence_bias": bias}),
        *more,
    ]  # fmt: skip


def test_the_script_trains_evaluates_saves_and_resumes(tmp_path: Path) -> None:
    model, tokenizer = fresh("qwen3")
    model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    arguments = script_arguments(
        tmp_path / "out", tmp_path / "start", model.config.multiverse_token_ids, tokenizer.eos_token_id,
        "--eval_strategy", "steps", "--eval_steps", "2", "--per_device_eval_batch_size", "4",
    )  # fmt: skip
    parser = TrlParser((GRPOScriptArguments, GRPOConfig, ModelConfig))
    trainer = main(*parser.parse_args_and_config(arguments))
    assert trainer.state.global_step == 2
    history = trainer.state.log_history
    logged = [entry for entry in history if "fork_share" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    for entry in logged:
        assert entry["fork_share"] > 0
        assert 1 < entry["degree_of_parallelism"] <= 40
        assert 0 <= entry["rewards/format/mean"] <= 1
        assert 0 <= entry["rewards/acceleration/mean"] <= entry["rewards/answer/mean"] <= 1
        assert 0 < entry["sequential_steps"] <= 41
    (evaluated,) = [entry for entry in history if "eval_fork_share" in entry]
    assert evaluated["eval_sequential_steps"] > 0
    trained = trainer.model.state_dict()
    saved, _ = load_model_and_tokenizer(str(tmp_path / "out"))
    assert all(torch.equal(weight, trained[name]) for name, weight in saved.state_dict().items())

    resumed = main(*parser.parse_args_and_config([*arguments, "--resume_from_checkpoint", "true", "--max_steps", "3"]))
    assert resumed.state.global_step == 3


def test_a_step_makes_better_completions_likelier(tmp_path: Path) -> None:
    trainer = word_trainer(tmp_path, MIXED, tiny_model(dtype=torch.float32), learning_rate=1e-3, max_steps=1)
    kept: list[dict[str, torch.Tensor]] = []
    prepare = trainer._generate_and_score_completions
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}

    def keep(inputs):
        kept.append(prepare(inputs))
        kept.append({"log_probabilities": recomputed(trainer, kept[0])})
        return kept[0]

    trainer._generate_and_score_completions = keep
    trainer.train()
    inputs, start = kept
    assert any(not torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())
    gained = (recomputed(trainer, inputs) - start["log_probabilities"]) * trained_tokens(inputs)
    assert (gained.sum(dim=1) * inputs["advantages"]).sum() > 0


def test_the_script_goes_on_with_an_adapter_and_keeps_it_as_reference(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    adapter = with_adapter(model)
    adapter.save_pretrained(tmp_path / "adapter")
    arguments = script_arguments(
        tmp_path / "out", tmp_path / "start", model.config.multiverse_token_ids, tokenizer.eos_token_id,
        "--adapter_path", str(tmp_path / "adapter"), "--beta", "0.1", "--save_strategy", "no", "--max_steps", "1",
        "--gradient_checkpointing", "true",
    )  # fmt: skip
    parser = TrlParser((GRPOScriptArguments, GRPOConfig, ModelConfig))
    script, config, model_config = parser.parse_args_and_config(arguments)
    loaded, tokenizer = load_model_and_tokenizer(str(tmp_path / "start"))
    rows = [rollout_row(problem, "free", tokenizer) for problem in generate_problems(2, 0, CHOICE_PROBLEMS)]
    dataset = {"train": Dataset.from_list(rows)}
    trainer = build_trainer(loaded, tokenizer, dataset, script, config, model_config)
    trainer.current_gradient_accumulation_steps = 1
    with torch.no_grad():
        ids = torch.tensor([tokenizer.encode("<Parallel><Goal>Answer")])
        torch.testing.assert_close(trainer.model(ids).logits, adapter(ids).logits, atol=1e-5, rtol=0)
    inputs = rollouts(trainer)
    torch.testing.assert_close(inputs["ref_per_token_logps"], recomputed(trainer, inputs), atol=1e-5, rtol=0)

    trained = main(script, config, model_config)
    assert trained.state.global_step == 1
    assert trained.state.log_history[0]["fork_share"] > 0
    base, _ = load_model_and_tokenizer(str(tmp_path / "start"))
    reloaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids).logits, trained.model.eval()(ids).logits, atol=1e-5, rtol=0)


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


def test_bad_script_arguments_are_named(tmp_path: Path) -> None:
    config = grpo_config(tmp_path, 2)
    with pytest.raises(ValueError, match="`dataset_name`"):
        check_arguments(GRPOScriptArguments(), config)
    with pytest.raises(ValueError, match="`synthetic_first`"):
        check_arguments(GRPOScriptArguments(synthetic_samples=1, synthetic_first=-1), config)
    with pytest.raises(ValueError, match="`scale_rewards`"):
        main(GRPOScriptArguments(synthetic_samples=1), grpo_config(tmp_path, 2, scale_rewards="group"), ModelConfig())
    check_arguments(GRPOScriptArguments(synthetic_samples=1), config)
    assert config.reward_weights == [1.0, 0.1, 0.5]


def test_reference_without_branches_is_refused(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    dataset = {"train": Dataset.from_list([{"prompt": "a", "answer": 1, "reference_steps": 9}])}
    config = grpo_config(tmp_path, 2, beta=0.1)
    with pytest.raises(ValueError, match="`beta`"):
        build_trainer(model, tokenizer, dataset, GRPOScriptArguments(), config, ModelConfig())


def test_choice_shows_both_forms_under_one_prompt(tmp_path: Path) -> None:
    problems = generate_problems(10, 0, CHOICE_PROBLEMS)
    rows = mixture(problems, 0.3, seed=1)
    assert rows == mixture(problems, 0.3, seed=1) != mixture(problems, 0.3, seed=2)
    forms = []
    for problem, row in zip(problems, rows, strict=True):
        assert row["prompt"] == [
            {"role": "system", "content": FREE_PROMPT},
            {"role": "user", "content": problem.question},
        ]
        forms.append(row["completion"][0]["content"] == problem.parallel())
        assert forms[-1] or row["completion"][0]["content"] == problem.sequential()
    assert sum(forms) == 3

    write_mixture(tmp_path / "data", samples=4, parallel_share=0.5, held_out=2, seed=0)
    lines = (tmp_path / "data" / "train.jsonl").read_text().splitlines()
    assert sum("<Parallel>" in line for line in lines) == 2 == len(lines) - 2

    _, tokenizer = fresh()
    problem = problems[0]
    free = rollout_row(problem, "free", tokenizer)
    assert free["prompt"] == rows[0]["prompt"]
    assert free["reference_steps"] == len(tokenizer.encode(problem.sequential())) + 1
    assert "wants_block" not in free
    for form in ("parallel", "sequential"):
        asked = rollout_row(problem, form, tokenizer)
        assert asked["prompt"] == problem.messages(form)["prompt"]
        assert asked["wants_block"] == (form == "parallel")
    with pytest.raises(ValueError, match="`prompt`"):
        rollout_row(problem, "both", tokenizer)
    with pytest.raises(ValueError, match="`parallel_share`"):
        mixture(problems, 1.2)


def test_results_say_what_was_chosen_and_how_often_it_was_right(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    problems = generate_problems(2, 0, CHOICE_PROBLEMS)
    bias = [[[model.config.multiverse_token_ids["<Parallel>"]], 99.0]]
    records = list(answers(model, tokenizer, problems, max_new_tokens=30, sequence_bias=bias, seed=0))
    assert [record["forked"] for record in records] == [True, True]
    assert [record["valid"] for record in records] == [False, False], "a limit has closed them"
    assert all(0 < record["sequential_steps"] < record["generated_tokens"] <= 30 for record in records)

    given = [{"forked": row < 4, "right": row in (0, 1, 2, 7)} for row in range(10)]
    summary = by_form(given)
    assert summary["fork_share"] == 0.4
    assert (summary["forked"]["right"], summary["forked"]["of"]) == (3, 4)
    assert (summary["sequential"]["right"], summary["sequential"]["of"]) == (1, 6)
    assert "sequential" not in by_form(given[:4])


def test_log_of_a_run_is_that_of_its_newest_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`run`"):
        run_log(tmp_path)
    entry = {"fork_share": 0.5, "sequential_steps": 9.0, "degree_of_parallelism": 2.0, "rewards/answer/mean": 1.0}
    for steps in (9, 10):
        folder = tmp_path / f"checkpoint-{steps}"
        folder.mkdir()
        history = [{**entry, "step": step, "loss": 0.1} for step in range(1, steps + 1)] + [{"train_loss": 0.1}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert run_log(tmp_path) == [{"step": step, **entry} for step in range(1, 11)]
