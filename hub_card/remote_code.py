"""The package's code as flat files beside a checkpoint, for `trust_remote_code=True`.

transformers finds the files of a checkpoint's code by their relative imports and copies siblings only, so modules of
sub-packages get a name of one part (`multiverse.kernels.dense` becomes `kernels_dense.py`), and every import within
the package is written anew. Nothing else is changed. A checkpoint that was loaded through such files is saved again
with the files it came with; that is transformers' own doing.
"""

import ast
import importlib.util
from functools import cache
from pathlib import Path

from multiverse.version import __version__

PACKAGE = "multiverse"
#: Modules that `auto_map` names; the others are those that they import.
ROOTS = ("multiverse.configuration_multiverse", "multiverse.modeling_multiverse")


def write_remote_code(folder: str | Path) -> list[Path]:
    """Writes the code that configuration and models need into `folder`.

    Args:
        folder (`str` or `Path`): of a checkpoint; files of the same names are replaced.

    Returns:
        `list[Path]`: the files, in the order of their names.

    Raises:
        ValueError: if a module imports something that cannot be written as a flat file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, text in sorted(flat_sources().items()):
        files.append(folder / f"{name}.py")
        files[-1].write_text(text, encoding="utf-8")
    return files


def flat_sources() -> dict[str, str]:
    """Text of every flat module by its name."""
    sources: dict[str, str] = {}
    waiting, seen = list(ROOTS), set(ROOTS)
    while waiting:
        module = waiting.pop()
        name = flat_name(module)
        if name in sources:
            raise ValueError(f"Two modules would be written as {name}.py, one of them {module}. Rename it.")
        sources[name], imported = _flatten(module)
        waiting += sorted(imported - seen)
        seen |= imported
    return sources


def flat_name(module: str) -> str:
    """`kernels_dense` for `multiverse.kernels.dense`."""
    return module.removeprefix(f"{PACKAGE}.").replace(".", "_")


# A training run saves many checkpoints, all with the same code.
@cache
def _flatten(module: str) -> tuple[str, frozenset[str]]:
    """The text of a module with its imports rewritten, and the modules of the package that it imports."""
    path = _file_of(module)
    text = path.read_text(encoding="utf-8")
    # Columns are counted in bytes.
    lines = [line.encode() for line in text.splitlines(keepends=True)]
    imported: set[str] = set()
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    # From the end, so that places further up stay where they are.
    for node in sorted(nodes, key=lambda each: each.lineno, reverse=True):
        source = _imported_module(node, module)
        if source is None:
            continue
        imported.add(source)
        assert node.end_lineno is not None
        first, last = node.lineno - 1, node.end_lineno - 1
        names = ", ".join(alias.name + (f" as {alias.asname}" if alias.asname else "") for alias in node.names)
        statement = f"from .{flat_name(source)} import {names}".encode()
        lines[first : last + 1] = [lines[first][: node.col_offset] + statement + lines[last][node.end_col_offset :]]
    header = f"# Written by multiverse {__version__} from its module {module}, which is the one to edit.\n"
    return header + b"".join(lines).decode(), frozenset(imported)


def _imported_module(node: ast.Import | ast.ImportFrom, module: str) -> str | None:
    """The module of the package that a statement in `module` imports names from; `None` for other packages."""
    if isinstance(node, ast.Import):
        found = [alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE]
    else:
        relative = "." * node.level + (node.module or "")
        source = importlib.util.resolve_name(relative, module.rpartition(".")[0])
        if source.split(".")[0] != PACKAGE:
            return None
        # Of a package, only the modules in it could be meant, which have no name in a flat file.
        is_package = source == PACKAGE or _file_of(source).name == "__init__.py"
        if not is_package:
            return source
        found = [f"{source}.{alias.name}" for alias in node.names]
    if found:
        raise ValueError(
            f"{module}, line {node.lineno}, imports {found[0]}, for which a flat file has no statement. Import names "
            "from the module that defines them."
        )
    return None


def _file_of(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"{module} has no source file, so it cannot be written beside a checkpoint.")
    return Path(spec.origin)
