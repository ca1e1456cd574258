"""What the Hub's stand-in keeps: accounts, repositories with their commits and objects, and the rules for files."""

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils._validators import REPO_ID_REGEX

#: As in the .gitattributes that the Hub writes; binary files and those of `LFS_FROM` bytes go over LFS, too.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".pickle", ".pkl", ".zip")
LFS_FROM = 10_000_000


class Account(NamedTuple):
    """Who a token belongs to, and whether it may write."""

    name: str
    writes: bool = True


class Blob(NamedTuple):
    """A file of a commit; `sha256` where it came over LFS or Xet."""

    content: bytes
    sha256: str | None = None

    @property
    def oid(self) -> str:
        """What git calls it: the hash of the content, or of the pointer that stands for it."""
        content = self.content
        if self.sha256 is not None:
            content = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(content)}\n"
            ).encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Commit:
    """Files by path, and which of them it wrote or removed."""

    files: dict[str, Blob]
    message: str
    parent: str | None = None
    changed: frozenset[str] = frozenset()

    @property
    def oid(self) -> str:
        tree = sorted((path, blob.oid) for path, blob in self.files.items())
        return hashlib.sha1(repr((self.parent, self.message, tree)).encode()).hexdigest()


@dataclass
class Repo:
    """A model repository. `objects` are the LFS objects that were uploaded to it, committed or not."""

    id: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, dict[str, Any]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def head(self, revision: str = "main") -> Commit:
        return self.commits[self.refs.get(revision, revision)]

    def add(self, revision: str, commit: Commit) -> Commit:
        self.commits[commit.oid] = commit
        self.refs[revision] = commit.oid
        return commit

    def history(self, revision: str = "main") -> list[Commit]:
        """Commits of a branch, newest first, without the one that the Hub makes."""
        found = [self.head(revision)]
        while found[-1].parent is not None:
            found.append(self.commits[found[-1].parent])
        return found[:-1]


def goes_over_lfs(path: str, sample: bytes, size: int) -> bool:
    """Whether the Hub wants a file over LFS."""
    return size >= LFS_FROM or path.endswith(LFS_SUFFIXES) or b"\0" in sample


def card_errors(content: str) -> list[str]:
    """What the Hub has against the metadata of a README.md, as far as it is checked here."""
    block = REGEX_YAML_BLOCK.search(content)
    try:
        metadata = yaml.safe_load(block.group(2)) if block else {}
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"]
    if not isinstance(metadata, dict):
        return ["YAML Metadata Error: expected a mapping"]
    errors = []
    bases = metadata.get("base_model", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not REPO_ID_REGEX.fullmatch(str(base)):
            errors.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    languages = metadata.get("language", [])
    for language in languages if isinstance(languages, list) else [languages]:
        if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", str(language)):
            errors.append(f'"language" must only contain ISO 639 codes, got "{language}"')
    return errors


def shard_files(shard: bytes) -> dict[str, tuple[str, int]]:
    """Xet hash and size by sha256 of the files that a shard describes.

    Records of 48 bytes (https://huggingface.co/docs/xet/shard): a header, then for every file its hash, flags and
    number of segments, the segments, with flag 31 as many verification records, and with flag 30 the sha256.
    """

    def digest(position: int) -> str:
        # Written as four little-endian integers.
        return "".join(shard[start : start + 8][::-1].hex() for start in range(position, position + 32, 8))

    def number(position: int) -> int:
        return int.from_bytes(shard[position : position + 4], "little")

    found, position = {}, 48
    while shard[position : position + 32] != b"\xff" * 32:
        xet_hash, flags, segments = digest(position), number(position + 32), number(position + 36)
        size = sum(number(position + 48 * (1 + segment) + 36) for segment in range(segments))
        position += 48 * (1 + segments * (1 + (flags >> 31)))
        if flags >> 30 & 1:
            found[digest(position)] = (xet_hash, size)
            position += 48
    return found
