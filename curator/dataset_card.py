"""The card of a curated dataset: made from `dataset_card.md.jinja`, its statistics and the provenance of its rows."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData
from multiverse.curator.records import STAGES
from multiverse.curator.statistics import CorpusStatistics
from multiverse.trainer.formatting import TrajectoryColumns
from multiverse.version import __version__

_TEMPLATE = Path(__file__).resolve().parent / "dataset_card.md.jinja"
_TAGS = ["multiverse", "parallel-decoding", "reasoning"]
#: Most rows of every size category of the Hub.
_SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
)
_LARGEST = "n>10M"
#: What the curator's own measures are.
MEANINGS = {
    "answer_checked": "1 where the final answer could be compared with the known one",
    "content_distance": "edits in characters between the original and the text put together again, over the longer",
    "path_distance": "largest share of a path's words that differ from its original's",
}


@dataclass(frozen=True)
class DatasetFacts:
    """What only the maker of a dataset knows; everything may be left out, and the card then says so.

    Attributes:
        name (`str`): name of the dataset, or its id on the Hub, as the card's snippet loads it.
        summary (`str`): what it is, in the place of the template's own sentence.
        method (`str`): how it was made, beside what the provenance of its rows says. Markdown.
        license (`str`): licence of the data, by the Hub's identifier.
        licence_note (`str`): licences of source and rows in words.
        sources (`tuple[str, ...]`): Hub ids of the datasets that the chains are from.
        language (`tuple[str, ...]`): ISO 639-1 codes.
        limits (`str`): Markdown.
        tags (`tuple[str, ...]`): for the Hub's search, beside the usual ones.
    """

    name: str = "multiverse-dataset"
    summary: str = ""
    method: str = ""
    license: str = ""
    licence_note: str = ""
    sources: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    limits: str = ""
    tags: tuple[str, ...] = ()


@dataclass
class ProvenanceSummary:
    """What the provenance of many rows says in sum.

    Of a row's provenance are read, where they are there: `models` and `prompts` (name or version by stage), `attempts`
    (number by stage), `measures` (number by name) and `bounds` (of these, likewise).
    """

    models: dict[str, set[str]] = field(default_factory=dict)
    prompts: dict[str, set[str]] = field(default_factory=dict)
    attempts: dict[str, list[float]] = field(default_factory=dict)
    measures: dict[str, list[float]] = field(default_factory=dict)
    bounds: dict[str, set[float]] = field(default_factory=dict)

    def add(self, provenance: Mapping[str, Any]) -> None:
        """Takes in one row."""
        for name, named in (("models", self.models), ("prompts", self.prompts)):
            for stage, value in _mapping(provenance, name):
                named.setdefault(stage, set()).add(str(value))
        for name, counted in (("attempts", self.attempts), ("measures", self.measures)):
            for stage, value in _mapping(provenance, name):
                if isinstance(value, int | float):
                    counted.setdefault(stage, []).append(value)
        for measure, bound in _mapping(provenance, "bounds"):
            if isinstance(bound, int | float):
                self.bounds.setdefault(measure, set()).add(bound)

    def stages(self) -> list[dict[str, str]]:
        """Rows of the card's table, in the order of the pipeline."""
        names = {*self.models, *self.prompts, *self.attempts}
        ordered = [*(stage for stage in STAGES if stage in names), *sorted(names - set(STAGES))]
        rows = []
        for name in ordered:
            attempts = self.attempts.get(name, [])
            rows.append(
                {
                    "name": name,
                    "models": ", ".join(sorted(self.models.get(name, ()))),
                    "prompts": ", ".join(sorted(self.prompts.get(name, ()))),
                    "mean": f"{sum(attempts) / len(attempts):.2f}" if attempts else "",
                    "most": f"{max(attempts):g}" if attempts else "",
                }
            )
        return rows

    def measured(self) -> dict[str, dict[str, Any]]:
        """How every measure is distributed, see `distribution`; with its bound where there is one."""
        return {
            name: {**distribution(values), **({"bound": max(self.bounds[name])} if name in self.bounds else {})}
            for name, values in sorted(self.measures.items())
        }

    def described(self) -> dict[str, str]:
        """The same in words, for the card."""
        return {
            name: describe(values, self.bounds.get(name, ())) + (f": {MEANINGS[name]}" if name in MEANINGS else "")
            for name, values in sorted(self.measures.items())
        }


def distribution(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, ninth decile (both a value that is there) and the largest of some values."""
    ordered = sorted(values)
    ranks = {"median": 0.5, "ninth_decile": 0.9}
    found = {name: ordered[math.ceil(share * len(ordered)) - 1] for name, share in ranks.items()}
    return {"mean": sum(ordered) / len(ordered), **found, "most": ordered[-1]}


def describe(values: Sequence[float], bounds: Iterable[float] = ()) -> str:
    """How values are distributed, in words, and which bound they had to keep."""
    found = distribution(values)
    allowed = "".join(f", {bound:g} allowed" for bound in sorted(set(bounds)))
    return (
        f"{found['mean']:.4f} on average, {found['most']:.4f} at most{allowed}; half of them up to "
        f"{found['median']:.4f}, nine in ten up to {found['ninth_decile']:.4f}"
    )


def make_dataset_card(
    facts: DatasetFacts,
    statistics: CorpusStatistics,
    provenance: ProvenanceSummary,
    *,
    data_file: str,
    picture: str,
    others: Sequence[str] = (),
    rejected: Mapping[str, int] | None = None,
) -> DatasetCard:
    """The card of a dataset.

    Args:
        facts (`DatasetFacts`): what its maker says.
        statistics (`CorpusStatistics`): of its parallel trajectories.
        provenance (`ProvenanceSummary`): of its rows.
        data_file (`str`): path of the rows in the repository; all other files are no part of the data.
        picture (`str`): path of the drawn statistics in the repository.
        others (sequence of `str`): columns that came from the source.
        rejected (`Mapping[str, int]`, *optional*): chains that are not among the rows, by the stage that failed.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    text = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts,
        columns=TrajectoryColumns(),
        others=others,
        figures=statistics.to_dict(),
        picture=picture,
        stages=provenance.stages(),
        measures=provenance.described(),
        rejected=_in_order(rejected or {}),
        version=__version__,
        card_data=_metadata(facts, len(statistics.texts), data_file).to_yaml(),
    )
    return DatasetCard(text)


def _metadata(facts: DatasetFacts, rows: int, data_file: str) -> DatasetCardData:
    return DatasetCardData(
        language=list(facts.language) or None,
        license=facts.license or None,
        pretty_name=facts.name.rpartition("/")[2],
        size_categories=[next((name for most, name in _SIZES if rows < most), _LARGEST)],
        source_datasets=list(facts.sources) or None,
        task_categories=["text-generation"],
        tags=[*_TAGS, *facts.tags],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": data_file}]}],
    )


def _in_order(rejected: Mapping[str, int]) -> dict[str, int]:
    places: dict[str, int] = {stage: number for number, stage in enumerate(STAGES)}
    return {name: rejected[name] for name in sorted(rejected, key=lambda name: (places.get(name, len(places)), name))}


def _mapping(provenance: Mapping[str, Any], name: str) -> Iterable[tuple[str, Any]]:
    value = provenance.get(name)
    return value.items() if isinstance(value, Mapping) else ()
