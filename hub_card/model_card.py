"""The model card: made from `model_card.md.jinja`, the configuration, and what the model's maker says of it."""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from multiverse.evaluation.markdown import table
from multiverse.evaluation.model_index import eval_results, hub_id
from multiverse.evaluation.report_tables import card_table
from multiverse.evaluation.run_folder import check_summary
from multiverse.version import __version__
from transformers import PreTrainedConfig

#: Name of the file of facts beside a checkpoint or an adapter.
FACTS_FILE = "card.yaml"
CARD = "README.md"
_TEMPLATE = Path(__file__).resolve().parent / "model_card.md.jinja"
_TAGS = ["multiverse", "parallel-decoding"]


@dataclass(frozen=True)
class CardFacts:
    """What only the maker of a model knows; everything may be left out, and the card then says so.

    Attributes:
        name (`str`): name of the model, or its id on the Hub, as the card's snippet loads it.
        summary (`str`): what the model does, in the place of the template's own three sentences.
        license (`str`): licence of the weights, by the Hub's identifier.
        licence_note (`str`): licences of base and data in words.
        base_model (`str`): Hub id of the base model.
        datasets (`list[str]`): Hub ids of the training data.
        language (`list[str]`): ISO 639-1 codes.
        training, evaluation, speed, limits (`str`): Markdown.
        results (`dict`): summary of `multiverse evaluate run`; in a file, the path of its summary.json, seen from
            there.
        example (`dict`): `messages` and `max_new_tokens` of a prompt that the exporter lets the model answer.
    """

    name: str = ""
    summary: str = ""
    license: str = ""
    licence_note: str = ""
    base_model: str = ""
    datasets: list[str] = field(default_factory=list)
    language: list[str] = field(default_factory=list)
    training: str = ""
    evaluation: str = ""
    speed: str = ""
    limits: str = ""
    results: dict[str, Any] = field(default_factory=dict)
    example: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> "CardFacts":
        """Reads a YAML file with the fields above.

        Raises:
            ValueError: if the file is no mapping, has other fields or fields of another type, or names results that
                do not exist.
        """
        path = Path(path)
        try:
            given = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"`card` ({path}) cannot be read as YAML: {error}") from error
        if not isinstance(given, dict):
            raise ValueError(f"`card` ({path}) must hold fields with values, got a {type(given).__name__}.")
        results = given.get("results")
        if isinstance(results, str):
            file = path.parent / results
            if not file.is_file():
                raise ValueError(f"`card` ({path}): `results` ({file}) does not exist. Write it, or leave it out.")
            given = {**given, "results": json.loads(file.read_text(encoding="utf-8"))}
        known = asdict(cls())
        for name, value in given.items():
            if name not in known:
                raise ValueError(f"`card` ({path}) has the field {name!r}, which no card has. Known: {sorted(known)}.")
            if not isinstance(value, kind := type(known[name])):
                raise ValueError(f"`card` ({path}): `{name}` must be a {kind.__name__}, got {value!r}.")
        fields: dict[str, Any] = {
            name: value.strip() if isinstance(value, str) else value for name, value in given.items()
        }
        facts = cls(**fields)
        facts.check()
        return facts

    def check(self) -> None:
        """Refuses what the card could not be made of.

        Raises:
            ValueError: for an example without messages or length, and results that are no summary of an evaluation.
        """
        example = self.example
        if example:
            messages = example.get("messages")
            fit = isinstance(messages, list) and messages and all(isinstance(each, dict) for each in messages)
            fit = fit and set(example) == {"messages", "max_new_tokens"} and isinstance(example["max_new_tokens"], int)
            if not fit:
                raise ValueError(f"`example` needs a list of `messages` and `max_new_tokens`, got {example!r}.")
        if self.results:
            check_summary(self.results, "results")


@dataclass(frozen=True)
class Answer:
    """What the model wrote when it was given the example."""

    text: str
    tokens: int
    steps: int


def make_card(facts: CardFacts, config: PreTrainedConfig, answer: Answer | None = None) -> ModelCard:
    """The card of a model.

    Args:
        facts (`CardFacts`): with a name.
        config (`PreTrainedConfig`): of the model; a base model that the facts leave out is taken from it.
        answer (`Answer`, *optional*): to the facts' example.
    """
    from jinja2 import Environment, StrictUndefined

    base = facts.base_model or hub_id(config.name_or_path)
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    environment.filters["pretty"] = _pretty
    text = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts,
        summary=facts.summary or _summary(facts.name, base, config),
        answer=answer,
        fence=_fence(answer.text if answer else ""),
        results=table(card_table(facts.results)) if facts.results else "",
        version=__version__,
        card_data=_metadata(facts, base).to_yaml(),
    )
    return ModelCard(text)


def write_card_where_none_is(folder: str | Path, config: PreTrainedConfig, name: str | None = None) -> None:
    """Gives a saved model a card that says what is known and what is not.

    A card that somebody has written is left alone; transformers' card of a new repository, unfilled, is not one.
    """
    folder = Path(folder)
    if not (folder / CARD).exists() or is_unfilled(folder / CARD):
        make_card(CardFacts(name=name or folder.resolve().name), config).save(folder / CARD)


def is_unfilled(card: Path) -> bool:
    """Whether a card is the Hub's template with nothing in it but a line of description."""
    marker = "0f1e2d3c"
    before, after = ModelCard.from_template(ModelCardData(), model_description=marker).text.split(marker)
    text = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).text
    filled = text.strip().removeprefix(before.strip()).removesuffix(after.strip()).strip()
    return text.strip().startswith(before.strip()) and text.strip().endswith(after.strip()) and "\n" not in filled


def answer_example(facts: CardFacts, model: Any, tokenizer: Any) -> Answer | None:
    """Lets the model answer the facts' example, greedily."""
    if not facts.example:
        return None
    prompt = tokenizer.apply_chat_template(
        facts.example["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    output = model.eval().generate(
        **prompt, do_sample=False, max_new_tokens=facts.example["max_new_tokens"], return_dict_in_generate=True
    )
    report = output.reports[0]
    text = tokenizer.decode(output.sequences[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return Answer(text, report.generated_tokens, report.sequential_steps)


def _metadata(facts: CardFacts, base: str) -> ModelCardData:
    results = eval_results(facts.results, facts.results.get("tasks") or {}) if facts.results else None
    return ModelCardData(
        base_model=base or None,
        datasets=facts.datasets or None,
        language=facts.language or None,
        library_name="transformers",
        license=facts.license or None,
        pipeline_tag="text-generation",
        tags=_TAGS,
        metrics=sorted({each.metric_type for each in results}) if results else None,
        model_name=facts.name if results else None,
        eval_results=results or None,
    )


def _summary(name: str, base: str, config: PreTrainedConfig) -> str:
    family = type(config).__name__.removeprefix("Multiverse").removesuffix("Config")
    origin = f", made from [{base}](https://huggingface.co/{base})," if base else ""
    return (
        f"{name} is a {family} model{origin} that decides by itself when to work in parallel. It writes a goal with "
        "one outline per part, works on all parts at the same time, and concludes from all of them. The parts do not "
        "see each other, so `model.generate()` decodes them side by side, in fewer sequential steps than one text "
        "needs."
    )


def _fence(text: str) -> str:
    """A code fence that `text` cannot close."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))


def _pretty(messages: list[dict[str, str]]) -> str:
    """Messages as Python source, one a line."""
    lines = [f"    {json.dumps(message, ensure_ascii=False)}," for message in messages]
    return "\n".join(["[", *lines, "]"])
