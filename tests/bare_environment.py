"""An environment of nothing but torch and transformers: a folder of links into the one that runs the tests."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from packaging.requirements import Requirement

PACKAGES = ("torch", "transformers")


def closure(names: tuple[str, ...]) -> set[str]:
    """The distributions that `names` need, themselves included; extras left out."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        key = name.lower().replace("_", "-")
        if key in found:
            continue
        try:
            requirements = distribution(name).requires or []
        except PackageNotFoundError:  # another platform's, or not wanted by this build of torch
            continue
        found.add(key)
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def build(folder: Path, *more: str) -> Path:
    """Links the packages into `folder`, with `more` beside torch and transformers."""
    folder.mkdir()
    for name in closure((*PACKAGES, *more)):
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            source = Path(str(distribution(name).locate_file(top)))
            if source.exists() and not (folder / top).exists():
                (folder / top).symlink_to(source)
    return folder


def run(packages: Path, script: str, home: Path, *arguments: str) -> str:
    """What a script prints in an interpreter that finds `packages` and the standard library only."""
    paths = f"import sys; sys.path.append({str(packages)!r})\n"
    # Neither the user's nor the tests' site-packages; no terminal that could be asked.
    command = [str(Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")]
    command += ["-I", "-S", "-c", paths + script, *arguments]
    # Results are compared bit by bit, and sums depend on how many threads share them.
    threads = str(torch.get_num_threads())
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, cwd=home
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
