r"""What a model is asked: system message, question and the request for a form of answer that can be judged.

The system message asks for one of the paper's two conditions (arXiv 2506.09991, section 6.1) in the words that the
trainers use (`multiverse.trainer.forms.PROMPTS`). The user's message is the question; below it stand the options,
if there are any, and how to give the answer. Problems of this project's own families stand by themselves: the demo
learned them so.
"""

from collections.abc import Mapping
from typing import Any, get_args

import torch
from jinja2 import TemplateError
from multiverse.evaluation.judge import AnswerKind
from multiverse.evaluation.task_rows import LETTERS, Question
from multiverse.evaluation.tasks import Task
from multiverse.trainer.forms import PROMPTS, Form
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchEncoding, PreTrainedTokenizerBase

Message = dict[str, str]

#: What the user's message ends with, by kind of answer.
REQUESTS: dict[AnswerKind, str] = {
    "math": r"Put your final answer within \boxed{}.",
    "choice": r"Put the letter of the right option within \boxed{}.",
    "number": "",
}

#: Day that Llama's chat templates are told: their own default. They would write today's, and tomorrow's rerun would be
#: asked something else.
DATE = "26 Jul 2024"


def chat_messages(question: Question, prompt: Form, instructions: Mapping[str, str] | None = None) -> list[Message]:
    """The conversation up to the answer.

    Args:
        question (`Question`): what is asked.
        prompt (`str`): `"parallel"` or `"sequential"` thinking.
        instructions (`Mapping[str, str]`, *optional*): system messages by form, in the place of the usual ones. An
            empty one is left out.

    Returns:
        `list[dict]`: messages with `role` and `content`.

    Raises:
        ValueError: if `prompt` is no form.
    """
    if prompt not in PROMPTS:
        raise ValueError(f"`prompt` must be one of {', '.join(map(repr, PROMPTS))}, got {prompt!r}.")
    system = (instructions or {}).get(prompt, PROMPTS[prompt])
    options = "\n".join(f"{letter}) {each}" for letter, each in zip(LETTERS, question.choices, strict=False))
    content = "\n\n".join(part for part in (question.text, options, REQUESTS[question.kind]) if part)
    asked = [{"role": "user", "content": content}]
    return [{"role": "system", "content": system}, *asked] if system else asked


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """The text that a model goes on from, special tokens included.

    By the tokenizer's chat template, with the beginning of the answer. A base model has none; its text is the
    contents, system message first, with an empty line between, the question named as such:

        Think step by step.

        Question: How much is 1+1?
        Answer:

    Raises:
        ValueError: if the chat template refuses the messages.
    """
    if not tokenizer.chat_template:
        *before, last = [message["content"] for message in messages]
        return "\n\n".join([*before, f"Question: {last}\nAnswer:"])
    try:
        return str(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, date_string=DATE)
        )
    except TemplateError as error:
        raise ValueError(
            f"`tokenizer`: its chat template refuses the messages: {error}. If it knows no system message, pass empty "
            "`instructions`, such as {'parallel': '', 'sequential': ''}."
        ) from error


def render_prompts(tokenizer: PreTrainedTokenizerBase, messages: list[list[Message]]) -> BatchEncoding:
    """A batch for `generate()`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the model; without a padding token another takes its place, which the
            mask leaves out.
        messages (`list[list[dict]]`): conversations, one a row.

    Returns:
        `BatchEncoding`: `input_ids` and `attention_mask`, integers of shape `(rows, longest)`, padded on the left.

    Raises:
        ValueError: if there are none, or the chat template refuses them.
    """
    if not messages:
        raise ValueError("`messages` is empty. Pass at least one conversation.")
    # A template writes the special tokens itself; a base model knows those that its tokenizer adds.
    own = not tokenizer.chat_template
    rows = [
        torch.tensor(tokenizer.encode(render_prompt(tokenizer, each), add_special_tokens=own)) for each in messages
    ]
    padding = next((each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)
    return BatchEncoding(
        {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=padding, padding_side="left"),
            "attention_mask": pad_sequence(
                [torch.ones_like(row) for row in rows], batch_first=True, padding_side="left"
            ),
        }
    )


def published_prompts(
    task: Task,
    instructions: Mapping[str, str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, Any]:
    """The prompts of a task as they are published with a run: the exact text, with placeholders for a question.

    No question stands in them, since some benchmarks (GPQA) ask not to be published.

    Args:
        task (`Task`): what is asked.
        instructions (`Mapping[str, str]`, *optional*): as for `chat_messages`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): renders them, where one is given.

    Returns:
        `dict`: by form, `messages` and `text`, the latter `None` without a tokenizer.
    """
    most = max(len(question.choices) for question in task.questions)
    options = tuple(f"{{option {letter}}}" for letter in LETTERS[:most])
    question = Question("", "{question}", "", task.questions[0].kind, options)
    published: dict[str, Any] = {}
    for form in get_args(Form):
        messages = chat_messages(question, form, instructions)
        text = None if tokenizer is None else render_prompt(tokenizer, messages)
        published[form] = {"messages": messages, "text": text}
    return published
