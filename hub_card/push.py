"""Uploads an exported checkpoint to the Hub. Whether others could load it is seen to before anything is sent; the
upload itself, its progress bars and its resumption are huggingface_hub's."""

import ast
import glob
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import (
    DEFAULT_IGNORE_PATTERNS,
    filter_repo_objects,
    get_token_to_send,
    validate_repo_id,
)
from multiverse.configuration_multiverse import CONFIG_CLASSES
from multiverse.tags import TAGS
from multiverse.version import __version__
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

#: What `auto_map` must name for the model to load by its name.
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
_PICKLES = (".bin", ".ckpt", ".distcp", ".pickle", ".pkl", ".pt", ".pth")
_TRAINING = ("optimizer", "scheduler", "rng_state", "training_args")


def push(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    repo_type: str = "model",
) -> CommitInfo:
    """Uploads a folder that `multiverse export` wrote, as it is.

    Files that the repository has already are not sent again, so the same call goes on with an upload that was cut off.
    Weights and adapters of an earlier model that this one has no file for are removed by the same commit; all else in
    the repository stays.

    Args:
        folder (`str` or `Path`): the exported checkpoint. Nothing in it is changed.
        repo_id (`str`): such as `"me/my-model"`; the repository is made when it is not there.
        private (`bool`, *optional*): whether others may see the repository; by default as it is, or public when new.
        revision (`str`, *optional*): branch to push to, made from `main` when it is not there; by default `main`.
        commit_message (`str`, *optional*): first line of the commit.
        create_pr (`bool`): opens a pull request in the place of pushing.
        token (`str` or `bool`, *optional*): by default `HF_TOKEN`, or what `hf auth login` stored.
        repo_type (`str`): checkpoints load from repositories of type `"model"` only.

    Returns:
        `CommitInfo`: the last commit, a `str` that is its URL; `pr_url` is that of the pull request.

    Raises:
        ValueError: if an argument cannot be right, or the folder is not one that others can load; before anything is
            sent. Also if the repository exists and is not as `private` says, or the Hub refuses the card's metadata;
            before any file is sent.
        OSError: if the Hub refuses the push or the connection does not hold.
    """
    folder = Path(folder)
    _check_arguments(repo_id, revision, create_pr, repo_type)
    token = _usable_token(token)
    check_folder(folder)
    api = HfApi(token=token, library_name="multiverse-transformers", library_version=__version__)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # Of a repository that exists, `create_repo` leaves this as it is, and says nothing.
        if private is not None and api.model_info(repo_id).private != private:
            raise ValueError(
                f"`private` is {private}, but {repo_id} exists and is {'public' if private else 'private'}. Change it "
                "in the repository's settings, name another repository, or leave `private` out."
            )
        # A branch of a pull request is there or not; `main` always is.
        if revision not in (None, "main") and not str(revision).startswith("refs/"):
            api.create_branch(repo_id, branch=str(revision), exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload Multiverse checkpoint",
            delete_patterns=_outdated(api.list_repo_files(repo_id, revision=revision), folder) or None,
        )
    except ValueError:
        raise
    # Of huggingface_hub, hf_xet and the HTTP library, which have no class in common.
    except Exception as error:
        raise OSError(f"{repo_id} was not pushed: {_reason(error)} {_remedy(error, folder, create_pr)}") from error


def pushed_files(folder: str | Path) -> list[Path]:
    """The files of a folder that `push` uploads: all but what git and huggingface_hub keep for themselves."""
    folder = Path(folder)
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [folder / name for name in filter_repo_objects(found, ignore_patterns=DEFAULT_IGNORE_PATTERNS)]


def check_folder(folder: Path) -> None:
    """Raises unless a folder holds all that loading by name needs, and nothing that should not be published.

    Args:
        folder (`Path`): as `multiverse export` wrote it.

    Raises:
        ValueError: naming the first thing that is wrong.
    """
    if not folder.is_dir():
        raise _wrong(folder, "is no folder", "Write one with `multiverse export`.")
    files = pushed_files(folder)
    names = [file.relative_to(folder) for file in files]
    parts = {folder.resolve().name, *(part for name in names for part in name.parts)}
    if any(part.endswith(".partial") for part in parts):
        raise _wrong(folder, "is, or holds, what an interrupted export left", "Run the export again.")
    adapters = [name for name in names if name.name.startswith("adapter_")]
    if adapters:
        raise _wrong(
            folder,
            f"holds a LoRA adapter ({adapters[0]}), but what is pushed must load by itself",
            f"Merge it into its base first (`multiverse export {folder} MERGED`) and push that.",
        )
    unwanted = [
        name
        for name in names
        if name.suffix.lower() in _PICKLES or (name.name.startswith(_TRAINING) and name.suffix != ".py")
    ]
    if unwanted:
        raise _wrong(
            folder,
            f"holds {_listed(unwanted)}: pickles, which can hide code, or the state of a training run",
            f"Export it (`multiverse export {folder} CLEAN`) and push that.",
        )
    config = _checked_config(folder)
    _check_code(folder, config["auto_map"])
    _check_weights(folder, names)
    _check_tokenizer(folder, config["multiverse_token_ids"])
    _check_card(folder)


def _check_arguments(repo_id: str, revision: str | None, create_pr: bool, repo_type: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id` is {repo_id!r}: {error} Give `user/name` or `organization/name`.") from error
    if repo_type != "model":
        raise ValueError(f"`repo_type` is {repo_type!r}, but checkpoints load from type 'model' only. Leave it out.")
    if create_pr and revision not in (None, "main"):
        raise ValueError(
            f"`revision` is {revision!r}, but a pull request (`create_pr`) is always one to main. Leave one of them "
            "out; to add to a pull request that is open, give `revision='refs/pr/N'` alone."
        )
    if revision is not None and re.fullmatch(r"\s*|[0-9a-fA-F]{40}", revision):
        raise ValueError(f"`revision` is {revision!r}, which is no branch to push to. Name a branch, such as 'v2'.")


def _usable_token(token: str | bool | None) -> str:
    try:
        found = get_token_to_send(token)
    except LocalTokenNotFoundError:
        found = None
    if not found:
        raise ValueError(
            f"`token` is {token!r} and no other was found, but nothing is pushed without one. Log in with `hf auth "
            "login`, or set HF_TOKEN, with a token that may write (https://huggingface.co/settings/tokens)."
        )
    # The HTTP library would quote the whole header in its error.
    if not re.fullmatch(r"[!-~]+", found):
        raise ValueError(
            "`token` (not shown) holds blanks, line breaks or letters that no token has. Copy it again from "
            "https://huggingface.co/settings/tokens."
        )
    return found


def _outdated(names: Iterable[str], folder: Path) -> list[str]:
    """Patterns of the files in a repository from which `from_pretrained` would load something else."""
    loaded = [name for name in names if re.fullmatch(r"adapter_[^/]+|[^/]+\.safetensors(\.index\.json)?", name)]
    return [glob.escape(name) for name in loaded if not (folder / name).is_file()]


def _wrong(folder: Path, what: str, remedy: str = "Export the checkpoint again.") -> ValueError:
    return ValueError(f"`folder` ({folder}) {what}. {remedy}")


def _listed(names: Iterable[object]) -> str:
    shown = [str(name) for name in names]
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return ", ".join(shown[:4]) + more


def _checked_config(folder: Path) -> dict[str, Any]:
    remedy = f"Write a folder with `multiverse export {folder} EXPORTED` and push that."
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _wrong(folder, f"holds no {CONFIG_NAME} that can be read ({error})", remedy) from error
    config = config if isinstance(config, dict) else {}
    supported = [each.model_type for each in CONFIG_CLASSES.values()]
    if config.get("model_type") not in supported:
        raise _wrong(folder, f"has `model_type` {config.get('model_type')!r}, none of {_listed(supported)}", remedy)
    auto_map, token_ids = config.get("auto_map"), config.get("multiverse_token_ids")
    if not isinstance(auto_map, dict) or not set(AUTO_CLASSES) <= set(auto_map):
        raise _wrong(
            folder,
            f"has no `auto_map` in {CONFIG_NAME} that names {_listed(AUTO_CLASSES)}: only with this package installed "
            "would the model load",
            remedy,
        )
    if not isinstance(token_ids, dict) or set(token_ids) != set(TAGS):
        raise _wrong(folder, f"does not give the ids of the twelve tags in {CONFIG_NAME}", remedy)
    return config


def _check_code(folder: Path, auto_map: dict[str, Any]) -> None:
    classes: dict[str, set[str]] = {}
    for file in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(file.read_bytes(), str(file))
            compile(tree, str(file), "exec")
        except (SyntaxError, ValueError) as error:
            raise _wrong(folder, f"holds {file.name}, which is not valid Python ({error})") from error
        classes[file.stem] = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for name, reference in auto_map.items():
        # `owner/repo--module.Class` would be the code of another repository.
        module, _, class_name = str(reference).rpartition(".")
        if class_name not in classes.get(module, ()):
            raise _wrong(folder, f"names {reference!r} as {name} in `auto_map`, which no file of it defines")
        try:
            # Reads every one of them.
            get_relative_import_files(folder / f"{module}.py")
        except FileNotFoundError as error:
            raise _wrong(folder, f"lacks {Path(error.filename).name}, which {module}.py needs") from error


def _check_weights(folder: Path, names: list[Path]) -> None:
    shards: dict[str, set[str]] = {SAFE_WEIGHTS_NAME: set()}
    # Where both are, transformers takes the single file.
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        if not index.is_file():
            raise _wrong(folder, f"holds no weights ({SAFE_WEIGHTS_NAME})")
        shards = {}
        try:
            for weight, shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
                shards.setdefault(shard, set()).add(weight)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _wrong(folder, f"holds {index.name}, which cannot be read ({error!r})") from error
    missing = [shard for shard in sorted(shards) if not (folder / shard).is_file()]
    if missing:
        raise _wrong(folder, f"lacks {_listed(missing)}, which {SAFE_WEIGHTS_INDEX_NAME} names")
    for shard, wanted in sorted(shards.items()):
        try:
            # Reads the header, and compares it with the size of the file.
            with safe_open(folder / shard, "pt") as weights:
                absent = sorted(wanted - set(weights.keys()))
        except (SafetensorError, OSError) as error:
            raise _wrong(folder, f"holds {shard}, which is damaged or cut off ({error})") from error
        if absent:
            raise _wrong(folder, f"has no {_listed(absent)} in {shard}, where {SAFE_WEIGHTS_INDEX_NAME} says")
    unused = [name for name in names if name.suffix == ".safetensors" and name.as_posix() not in shards]
    if unused:
        raise _wrong(folder, f"holds weights that nothing loads ({_listed(unused)})", "Remove them.")


def _check_tokenizer(folder: Path, token_ids: dict[str, int]) -> None:
    remedy = "Save the tokenizer that `add_multiverse_tokens` was given, or export the checkpoint again."
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        found = {tag: tokenizer.encode(tag, add_special_tokens=False) for tag in TAGS}
    # Of transformers, tokenizers, and the readers of some ten file formats.
    except Exception as error:
        raise _wrong(folder, f"holds no tokenizer that loads ({error})", remedy) from error
    for tag in TAGS:
        if found[tag] != [token_ids[tag]]:
            told = f"has a tokenizer that encodes {tag} as {found[tag]}, where {CONFIG_NAME} says {token_ids[tag]}"
            raise _wrong(folder, told, remedy)


def _check_card(folder: Path) -> None:
    card = folder / REPOCARD_NAME
    if not card.is_file():
        raise _wrong(folder, f"holds no model card ({REPOCARD_NAME})", "`multiverse export` writes one.")
    remedy = "Mend the block between the first two lines `---`: https://huggingface.co/docs/hub/model-cards."
    try:
        metadata = ModelCard.load(card).data.to_dict()
    # Of the YAML reader, and of whatever odd values do to the class of the metadata.
    except Exception as error:
        raise _wrong(folder, f"holds a {REPOCARD_NAME} whose metadata cannot be read ({error})", remedy) from error
    if not metadata:
        raise _wrong(folder, f"holds a {REPOCARD_NAME} without metadata, such as the licence", remedy)
    bases = metadata.get("base_model", [])
    for base in bases if isinstance(bases, list) else [bases]:
        try:
            validate_repo_id(base)
        except HFValidationError as error:
            told = f"holds a {REPOCARD_NAME} whose `base_model` is {base!r}, which cannot be a model on the Hub"
            raise _wrong(folder, told, "Name the model that this one was made from, or leave it out.") from error


def _reason(error: BaseException) -> str:
    # huggingface_hub says which file, and its cause says why.
    texts = [" ".join(str(each).split()) for each in (error, error.__cause__) if each is not None]
    # Addresses of the storage are signed: who has them may write there for a while.
    parts = [re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text) for text in texts]
    return " ".join(dict.fromkeys(part for part in parts if part)) or repr(error)


def _remedy(error: BaseException, folder: Path, create_pr: bool) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403, 404):
        return "The token must be valid and may write there: `hf auth login`, https://huggingface.co/settings/tokens."
    again = "The same call goes on from there"
    if create_pr:
        again = "If the pull request is open already, `revision='refs/pr/N'` goes on in it, without `create_pr`"
    return f"{folder} is as it was. {again}; what arrived is not sent again."
