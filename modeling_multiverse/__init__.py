"""Multiverse for Transformers: language models that decide by themselves when to work in parallel.

```python
>>> from multiverse import MultiverseForCausalLM, add_multiverse_tokens
```
"""

from pathlib import Path as _Path

if __name__ != "multiverse":
    raise ImportError(
        f"modeling_multiverse is the folder of the package `multiverse` and cannot be imported as {__name__!r}. "
        "Install the project (`pip install -e .`) and `import multiverse`."
    )

# The sub-packages (generation, trainer, ...) are folders beside this one in a checkout and below it in a wheel.
# From a checkout, let `multiverse.generation` be found in the repository root.
_here = _Path(__file__).resolve().parent
if not (_here / "generation").is_dir() and (_here.parent / "generation").is_dir():
    __path__.append(str(_here.parent))

from .configuration_multiverse import (  # noqa: E402  (the path must stand first)
    MultiverseConfig,
    MultiverseLlamaConfig,
    MultiverseQwen2Config,
    MultiverseQwen3Config,
)
from .hub_card.beside import write_beside  # noqa: E402
from .layout import BranchLayout, IncrementalLayout  # noqa: E402
from .modeling_multiverse import (  # noqa: E402
    MultiverseForCausalLM,
    MultiverseLlamaForCausalLM,
    MultiverseLlamaModel,
    MultiverseQwen2ForCausalLM,
    MultiverseQwen2Model,
    MultiverseQwen3ForCausalLM,
    MultiverseQwen3Model,
    register_auto_classes,
)
from .problems import Problem  # noqa: E402
from .structure import Block, Path  # noqa: E402
from .tags import TAGS  # noqa: E402
from .tokens import add_multiverse_tokens  # noqa: E402
from .version import __version__  # noqa: E402

register_auto_classes()
MultiverseConfig.folder_writer = write_beside

__all__ = [
    "TAGS",
    "Block",
    "BranchLayout",
    "IncrementalLayout",
    "MultiverseConfig",
    "MultiverseForCausalLM",
    "MultiverseLlamaConfig",
    "MultiverseLlamaForCausalLM",
    "MultiverseLlamaModel",
    "MultiverseQwen2Config",
    "MultiverseQwen2ForCausalLM",
    "MultiverseQwen2Model",
    "MultiverseQwen3Config",
    "MultiverseQwen3ForCausalLM",
    "MultiverseQwen3Model",
    "Path",
    "Problem",
    "__version__",
    "add_multiverse_tokens",
]
