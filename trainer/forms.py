"""The two forms of an answer, and the system messages that ask for them (arXiv 2506.09991, section 6.1)."""

from typing import Literal

Form = Literal["parallel", "sequential"]

PARALLEL_PROMPT = "Think step by step and in parallel."
SEQUENTIAL_PROMPT = "Think step by step."
#: What the system message asks for, by form.
PROMPTS: dict[str, str] = {"parallel": PARALLEL_PROMPT, "sequential": SEQUENTIAL_PROMPT}
