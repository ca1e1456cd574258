"""A tiny checkpoint that forks, answers and ends by itself, questions for it, and processes that evaluate it."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch
from forward import fresh_models
from grpo_runs import FORK
from multiverse import MultiverseForCausalLM
from multiverse.evaluation.answering import Answerer
from multiverse.evaluation.plan import Batch, Row
from multiverse.evaluation.runner import Rank, run
from multiverse.evaluation.settings import Condition, EvaluationSettings
from multiverse.evaluation.tasks import TaskData, load_task
from tiny import CHAT_TEMPLATE, DIGITS, EOS, PAD, VOCABULARY, WORDS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

#: An id that no word of the fixed vocabulary has.
ANSWER = 60
LONGEST = 100
#: Seconds that a process may take.
PATIENCE = 240
#: Makes a random model answer with a digit, and end with it; padding, which is no word of the text, is never said.
BIASES = [
    [[PAD], -100.0],
    [[ANSWER], 2.0],
    *([[ANSWER, digit], 9.0] for digit in DIGITS.values()),
    *([[ANSWER, digit, EOS], 6.0] for digit in DIGITS.values()),
]

#: Starts processes as forks of one that has imported what takes long.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["multiverse.evaluation.runner", "hypothesis", "pytest"])


def tokenizer() -> PreTrainedTokenizerFast:
    """Words between blanks, one of them `Answer:`, and a chat template."""
    words = {**WORDS, "Answer:": ANSWER}
    spare = {f"w{number}": number for number in range(VOCABULARY) if number not in words.values()}
    inner = Tokenizer(models.WordLevel({**words, **spare}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="$", pad_token=f"w{PAD}")
    fast.chat_template = CHAT_TEMPLATE.replace("<|im_start|>", " i ").replace("<|im_end|>", " _ ")
    return fast


def write_checkpoint(folder: Path, plain: bool = False) -> Path:
    """A model in float64 and its tokenizer; `plain` gives it a tokenizer without tags."""
    model, _ = fresh_models("llama")
    model.generation_config.sequence_bias = [*BIASES, *FORK]
    model.generation_config.eos_token_id = model.config.eos_token_id
    words = tokenizer()
    if plain:
        model.config.multiverse_token_ids = {}
        model.generation_config.sequence_bias = BIASES
        words = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(words.backend_tokenizer.to_str().replace("Parallel>", "parallel>")),
            eos_token="$",
            pad_token=f"w{PAD}",
        )
        words.chat_template = tokenizer().chat_template
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_questions(path: Path, model: Path, count: int = 9) -> Path:
    """Questions of a few words; right is, for two of three, the number that the checkpoint says last, greedily."""
    texts = [" ".join("abcdefghij"[number : number + 2 + number % 3]) for number in range(count)]

    def write(answers: list[int]) -> None:
        rows = [{"question": text, "answer": answer} for text, answer in zip(texts, answers, strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write([0] * count)
    settings = EvaluationSettings(model=str(model), max_new_tokens=LONGEST)
    loaded = MultiverseForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    answerer = Answerer(loaded, AutoTokenizer.from_pretrained(model), settings)
    task = load_task("own", TaskData(path, kind="number"))
    batch = Batch(Condition("own"), 0, tuple(Row(number, 0) for number in range(count)))
    said = [record["answer"] for record in answerer.answer(batch, task)]
    write([int(answer) if answer and number % 3 else 10**6 for number, answer in enumerate(said)])
    return path


def settings_of(model: Path, questions: Path, **options: Any) -> EvaluationSettings:
    """A run of the checkpoint on the questions, in batches of two."""
    given = {"batch_size": 2, "max_new_tokens": LONGEST, "dtype": "float64", **options}
    data = {"own": {"path": str(questions), "kind": "number"}}
    return EvaluationSettings(model=str(model), tasks=("own",), data=data, **given)


def evaluate_alone(settings: dict[str, Any], folder: str, number: int = 0, world: int = 1) -> None:
    """What a process of its own runs, on one thread."""
    torch.set_num_threads(1)
    run(EvaluationSettings.from_dict(settings), folder, show=False, rank=Rank(number, world))


def evaluate_elsewhere(settings: EvaluationSettings, folder: Path, world: int = 1) -> None:
    """Evaluates in processes of their own, which share the run; all must come to their end."""
    processes = [
        PROCESSES.Process(target=evaluate_alone, args=(settings.to_dict(), str(folder), number, world))
        for number in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=PATIENCE)
        if process.is_alive():
            process.kill()
        assert process.exitcode == 0


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records as a rerun gives them too."""
    return [{name: value for name, value in record.items() if name != "times"} for record in records]
