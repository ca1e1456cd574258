"""What an evaluation is asked for: all that its numbers depend on, in plain values that are published with it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from typing import Any, Literal, get_args

from multiverse.trainer.forms import Form

Mode = Literal["parallel", "sequential"]

#: The checkpoint that ships with the project, by the name it goes by in settings.
DEMO = "demo"
DTYPES = ("auto", "float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, order=True)
class Condition:
    """What generations are compared by.

    Attributes:
        task (`str`): name of the task.
        prompt (`str`): what the system message asks for, `"parallel"` or `"sequential"` thinking: the two conditions
            of the paper (arXiv 2506.09991, section 6.1).
        mode (`str`): `"parallel"` or `"sequential"`, one path at a time: the twin of the same weights.
        budget (`int`, *optional*): `max_sequential_steps`; `None` where steps are not limited.
    """

    task: str
    prompt: Form = "parallel"
    mode: Mode = "parallel"
    budget: int | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Condition":
        """That of a record, or of a row of a summary."""
        return cls(record["task"], record["prompt"], record["mode"], record["budget"])

    def label(self) -> str:
        """In words."""
        limit = "" if self.budget is None else f", {self.budget} steps"
        return f"{self.task}, {self.prompt} prompt, {self.mode} mode{limit}"


@dataclass(frozen=True)
class EvaluationSettings:
    """Everything that a rerun must have in common to give the same numbers.

    Attributes:
        model (`str`): folder or Hub id of a checkpoint, folder of a LoRA adapter, or `"demo"` for the shipped one.
        base (`str`, *optional*): of an adapter, in the place of the one that it names.
        revision (`str`, *optional*): of a checkpoint on the Hub.
        dtype (`str`): of the weights; `"auto"` is the checkpoint's own.
        device (`str`, *optional*): by default a GPU where there is one, of several that of the process.
        attn_implementation (`str`, *optional*): of the prefill; the model's default by default.
        decode_attention (`str`): of the decode steps.
        tasks (`tuple[str, ...]`): names of tasks, see `multiverse.evaluation.tasks`.
        data (`dict`, *optional*): where a task's questions are read from, by the task's name: keyword arguments of
            `TaskData`, such as `{"aime24": {"path": "aime24.jsonl"}}`.
        limit (`int`, *optional*): only the first questions of every task.
        prompts (`tuple[str, ...]`): forms that are asked for.
        modes (`tuple[str, ...]`): how paths are decoded.
        budgets (`tuple[int | None, ...]`): limits of sequential steps.
        samples (`int`, *optional*): generations per question, by default what is usual for the task (8 for AIME) with
            sampling, and 1 without.
        seed (`int`): what every generation's own seed is derived from.
        do_sample (`bool`): greedy decoding otherwise.
        temperature, top_p, top_k: of sampling; `top_k` 0 is no limit.
        max_new_tokens (`int`): longest answer, in tokens of all branches.
        batch_size (`int`): questions answered side by side.
        batch_sizes (`tuple[int, ...]`): batches that are timed (paper, figure 8); none by default.
        lengths (`tuple[int, ...]`): longest answers with which they are timed; the answers' own by default.
        repeats (`int`): timed runs of each.
        instructions (`dict[str, str]`): system messages by form, in the place of the published ones.
    """

    model: str = DEMO
    base: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    attn_implementation: str | None = None
    decode_attention: str = "auto"
    tasks: tuple[str, ...] = ("sums",)
    data: dict[str, dict[str, Any]] | None = None
    limit: int | None = None
    prompts: tuple[Form, ...] = ("parallel",)
    modes: tuple[Mode, ...] = ("parallel",)
    budgets: tuple[int | None, ...] = (None,)
    samples: int | None = None
    seed: int = 0
    do_sample: bool = False
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    max_new_tokens: int = 1200
    batch_size: int = 8
    batch_sizes: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    repeats: int = 5
    instructions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tasks", "prompts", "modes", "budgets", "batch_sizes", "lengths"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if len(set(values)) < len(values):
                raise ValueError(f"`{name}` names something twice: {values}. Name it once.")
        for name in ("tasks", "prompts", "modes", "budgets"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is empty. Name at least one, or leave it out.")
        for name in ("prompts", "modes"):
            if not set(getattr(self, name)) <= set(get_args(Form)):
                raise ValueError(f"`{name}` may hold {' and '.join(get_args(Form))}, got {getattr(self, name)}.")
        if not set(self.instructions) <= set(get_args(Form)):
            raise ValueError(f"`instructions` are for {get_args(Form)}, got {sorted(self.instructions)}.")
        self._check_numbers()
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if not self.do_sample and (self.samples or 1) > 1:
            raise ValueError(
                f"`samples` is {self.samples}, but greedy decoding gives the same answer each time. Pass "
                "`do_sample=True`, or leave it out."
            )

    def _check_numbers(self) -> None:
        counted: dict[str, tuple[int | None, ...]]
        counted = {"limit": (self.limit,), "samples": (self.samples,), "max_new_tokens": (self.max_new_tokens,)}
        counted |= {"batch_size": (self.batch_size,), "repeats": (self.repeats,), "budgets": self.budgets}
        for name, values in {**counted, "batch_sizes": self.batch_sizes, "lengths": self.lengths}.items():
            for value in values:
                if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                    raise ValueError(f"`{name}` must be positive, got {value!r}.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"`temperature` must be above 0, got {self.temperature}. For 0, leave `do_sample` out.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must lie in (0, 1], got {self.top_p}.")
        if self.top_k < 0:
            raise ValueError(f"`top_k` must not be negative, got {self.top_k}. 0 is no limit.")

    def conditions(self) -> list[Condition]:
        """All combinations, in the order in which they are run."""
        return [Condition(*each) for each in product(self.tasks, self.prompts, self.modes, self.budgets)]

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EvaluationSettings":
        """What `to_dict` has given.

        Raises:
            ValueError: if there is something else in it.
        """
        unknown = sorted(values.keys() - {each.name for each in fields(cls)})
        if unknown:
            raise ValueError(f"`values` holds {unknown}, which are no settings of this version.")
        return cls(**values)

    def differences(self, other: "EvaluationSettings") -> dict[str, tuple[Any, Any]]:
        """The settings that are not the same, with both values."""
        own, others = self.to_dict(), other.to_dict()
        return {name: (value, others[name]) for name, value in own.items() if value != others[name]}
