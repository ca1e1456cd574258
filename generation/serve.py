"""transformers' own OpenAI-compatible server, for Multiverse checkpoints.

`python -m multiverse.generation.serve MODEL` takes the options of `transformers serve` and runs it. Answers fork and
merge, and arrive in linear order.
"""

import inspect
from typing import Any

import typer
from multiverse.kernels.dispatch import SUPPORTED_ATTENTION
from multiverse.modeling_multiverse import ARCHITECTURES
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager


def expose_architectures() -> None:
    """Makes the Multiverse classes attributes of the module `transformers`.

    The server finds a checkpoint's class by `getattr(transformers, config.architectures[0])`, past the auto classes,
    which know ours. Three new names are all that this lookup needs, and they replace nothing; any other way in would
    patch the server's code, and have to follow it from version to version.
    """
    # The one that the lookup holds: transformers puts a new module into `sys.modules` when its processors are first
    # imported, so that there may be two of that name.
    for _, _, model_class in ARCHITECTURES:
        setattr(model_manager.transformers, model_class.__name__, model_class)


def serve(**options: Any) -> None:
    """Checks the options that `generate()` would refuse at every request, then runs transformers' command."""
    if options["continuous_batching"]:
        raise typer.BadParameter(
            "--continuous-batching decodes by a loop of its own, which cannot fork. Leave it out; the branches of a "
            "request are batched without it."
        )
    if options["compile"]:
        raise typer.BadParameter("--compile needs a static cache, but branches share one growing cache. Leave it out.")
    attention = options["attn_implementation"]
    if attention is not None and attention not in SUPPORTED_ATTENTION:
        raise typer.BadParameter(
            f"--attn-implementation is {attention!r}, which cannot express branch visibility. Use one of "
            f"{SUPPORTED_ATTENTION}."
        )
    expose_architectures()
    Serve(**options)


# The command line is made from the signature and the docstring: they are transformers' own, in every version.
serve.__signature__ = inspect.signature(Serve)  # type: ignore[attr-defined]
app = typer.Typer(add_completion=False)
app.command(help=inspect.getdoc(Serve))(serve)

if __name__ == "__main__":
    app()
