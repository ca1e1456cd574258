"""A small stand-in of the Hub on this machine: the endpoints that huggingface_hub 2.4 calls to create, upload, commit
and download, with the Hub's own refusals.

It holds to the API in what it asks for (authorisation, rights, sizes and hashes of objects, that a commit refers to
nothing but what was uploaded) and answers everything else with 404, kept in `unknown`. Big files travel as they do
there: over the LFS protocol to a storage server of its own, which takes signed addresses and no token, or over Xet,
whose store is a folder (hf_xet's own `local://`). Downloads are redirected to the storage server.
"""

import base64
import hashlib
import hmac
import json
import re
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from hub_http import Fault, Handler, Refusal, Request, StorageHandler, serve
from hub_objects import LFS_SUFFIXES, Account, Blob, Commit, Repo, card_errors, goes_over_lfs, shard_files
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import close_session
from huggingface_hub.utils._validators import REPO_ID_REGEX
from transformers.utils import hub as transformers_hub

#: Tokens: of the account `someone`, of the same for reading only, and of another account.
TOKEN, READ_TOKEN, STRANGERS_TOKEN = ("hf_" + letter * 34 for letter in "wrs")
ACCOUNTS = {
    TOKEN: Account("someone"),
    READ_TOKEN: Account("someone", writes=False),
    STRANGERS_TOKEN: Account("stranger"),
}


class HubStandIn:
    """The Hub and its storage on two ports of 127.0.0.1.

    Args:
        folder (`Path`): where the Xet store is.

    Attributes:
        repos (`dict[str, Repo]`): by id.
        requests (`list[Request]`): to both servers, in order.
        unknown (`list[Request]`): those that no endpoint is for.
    """

    def __init__(self, folder: Path) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.unknown: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.xet_store = folder / "xet-store"
        self.xet_store.mkdir()
        self._secret = secrets.token_bytes(16)
        self._servers = [serve(self, HubHandler), serve(self, StorageHandler)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fail(self, pattern: str, times: float = 1, drop: bool = False) -> Fault:
        """From now on answers matching requests with 500, or (`drop`) breaks the connection amid what is sent."""
        self.faults.append(Fault(pattern, times, drop))
        return self.faults[-1]

    def sent(self, pattern: str) -> list[Request]:
        """Requests whose `METHOD path` holds a pattern."""
        return [request for request in self.requests if re.search(pattern, " ".join(request))]

    def signed(self, method: str, repo: Repo, oid: str) -> str:
        """Address of an object on the storage server, good for one method."""
        path = f"/{repo.id}/{oid}"
        return f"{self.storage_url}{path}?signature={self.signature(method, path)}"

    def signature(self, method: str, path: str) -> str:
        return hmac.new(self._secret, f"{method} {path}".encode(), "sha256").hexdigest()

    def xet_content(self, sha256: str) -> bytes | None:
        """What was uploaded over Xet under this hash, put together from its chunks."""
        found = {}
        for shard in self.xet_store.rglob("xorbs/shards/*.mdb"):
            found.update(shard_files(shard.read_bytes()))
        if sha256 not in found:
            return None
        from hf_xet import XetFileInfo, XetSession

        target = self.xet_store / "read"
        options: dict[str, Any] = {"endpoint": f"local://{self.xet_store}", "token": "-"}
        expiry = int(time.time()) + 600
        with XetSession().new_file_download_group(**options, token_expiry_unix_secs=expiry) as group:
            group.start_download_file(XetFileInfo(*found[sha256]), str(target))
        return target.read_bytes()


@contextmanager
def connected(hub: HubStandIn, home: Path, token: str | None = TOKEN, xet: bool = False) -> Iterator[None]:
    """Lets huggingface_hub and transformers, in this process, take the stand-in for the Hub.

    Args:
        home (`Path`): for the cache and the token that `hf auth login` would store.
        token (`str`, *optional*): in HF_TOKEN.
        xet (`bool`): whether to upload over Xet, or else over LFS.
    """
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": not xet,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(constants, name, value)
        # Both were made when they were imported.
        patch.setattr(hf_api.api, "endpoint", hub.url)
        patch.setattr(transformers_hub, "_hf_api", None)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        if token is not None:
            patch.setenv("HF_TOKEN", token)
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1")
        close_session()
        yield
        close_session()


class HubHandler(Handler):
    """The endpoints. Each takes what its pattern names, and refuses as the Hub does."""

    def answer(self, request: Request) -> None:
        for method, pattern, name in ENDPOINTS:
            # HEAD is GET without the content.
            if method == request.method or (method, request.method) == ("GET", "HEAD"):
                found = re.fullmatch(pattern, urlsplit(self.path).path)
                if found is not None:
                    values = {key: unquote(value or "") for key, value in found.groupdict().items()}
                    getattr(self, name)(**values)
                    return
        self.hub.unknown.append(request)
        raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    # Who asks, and for what.

    def account(self) -> Account | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        account = ACCOUNTS.get(header.removeprefix("Bearer "))
        if account is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return account

    def someone(self) -> Account:
        account = self.account()
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        return account

    def repo(self, name: str, write: bool = False) -> Repo:
        repo, account = self.hub.repos.get(name), self.account()
        owner = account is not None and account.name == name.split("/")[0]
        if repo is None or (repo.private and not owner):
            # To those without a token, a private repository and none look alike.
            raise Refusal(401 if account is None else 404, "Repository not found", "RepoNotFound")
        if write and not (owner and self.someone().writes):
            raise Refusal(403, f"You don't have the rights to write to {name}")
        return repo

    def repo_to_change(self, name: str, revision: str) -> Repo:
        """Everybody may open a pull request, and add to their own."""
        repo, account = self.repo(name), self.someone()
        pull = repo.pulls.get(int(revision.rpartition("/")[2])) if re.fullmatch("refs/pr/[0-9]+", revision) else None
        own = self.for_pull_request() or (pull is not None and pull["author"]["name"] == account.name)
        return repo if own and account.writes else self.repo(name, write=True)

    def commit_of(self, repo: Repo, revision: str) -> Commit:
        if revision not in repo.refs and revision not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo.head(revision)

    def for_pull_request(self) -> bool:
        return parse_qs(urlsplit(self.path).query).get("create_pr") == ["1"]

    # Repositories.

    def whoami(self) -> None:
        account = self.someone()
        self.send(200, {"type": "user", "name": account.name, "orgs": []})

    def create_repo(self) -> None:
        account, asked = self.someone(), json.loads(self.body)
        owner = asked.get("organization") or account.name
        name = f"{owner}/{asked['name']}"
        if not account.writes or owner != account.name:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        if not REPO_ID_REGEX.fullmatch(name) or asked.get("type", "model") != "model":
            raise Refusal(400, "Invalid repository")
        answer = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repos:
            self.send(409, {"error": "You already created this model repo", **answer})
            return
        repo = self.hub.repos[name] = Repo(name, asked.get("visibility") == "private")
        rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repo.add("main", Commit({".gitattributes": Blob(rules.encode())}, "initial commit"))
        self.send(200, answer)

    def info(self, repo: str, revision: str = "") -> None:
        found = self.repo(repo)
        commit = self.commit_of(found, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        self.send(200, {"id": repo, "sha": commit.oid, "private": found.private, "tags": [], "siblings": siblings})

    def tree(self, repo: str, revision: str, path: str) -> None:
        commit = self.commit_of(self.repo(repo), revision)
        inside = {name: blob for name, blob in commit.files.items() if name.startswith(f"{path}/" if path else "")}
        if path and not inside:
            raise Refusal(404, f"{path} does not exist on {revision!r}", "EntryNotFound", commit.oid)
        entries: list[dict[str, Any]] = []
        for name, blob in sorted(inside.items()):
            entries.append({"type": "file", "path": name, "size": len(blob.content), "oid": blob.oid})
            if blob.sha256 is not None:
                entries[-1]["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
        self.send(200, entries)

    def branch(self, repo: str, revision: str) -> None:
        found = self.repo(repo, write=True)
        if revision.startswith("refs/"):
            raise Refusal(400, f"Invalid reference for a branch: {revision}")
        if revision in found.refs:
            raise Refusal(409, "Reference already exists")
        start = self.commit_of(found, json.loads(self.body or b"{}").get("startingPoint", "main"))
        found.refs[revision] = start.oid
        self.send(201, {})

    def open_pull(self, repo: str) -> None:
        found, account, asked = self.repo(repo), self.someone(), json.loads(self.body)
        number = self._new_pull(found, account, asked["title"], asked["pullRequest"])
        self.send(200, {"num": number, "pullRequest": True, "url": f"{self.hub.url}/{repo}/discussions/{number}"})

    def pull(self, repo: str, number: str) -> None:
        self.send(200, self.repo(repo).pulls[int(number)])

    def _new_pull(self, repo: Repo, account: Account, title: str, is_pull: bool = True) -> int:
        if not is_pull or not account.writes:
            raise Refusal(403, "This token may not open pull requests")
        number = len(repo.pulls) + 1
        repo.refs[f"refs/pr/{number}"] = repo.refs["main"]
        repo.pulls[number] = {
            **{"num": number, "title": title, "author": {"name": account.name}, "status": "draft", "events": []},
            **{"createdAt": "2026-01-01T00:00:00.000Z", "repo": {"name": repo.id, "type": "model"}},
            **{"isPullRequest": True, "changes": {"base": "refs/heads/main"}, "filesWithConflicts": []},
        }
        return number

    # Uploads, in the order in which they call.

    def validate_yaml(self) -> None:
        errors = card_errors(json.loads(self.body)["content"])
        self.send(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        commit = self.commit_of(self.repo_to_change(repo, revision), revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            over_lfs = goes_over_lfs(file["path"], base64.b64decode(file["sample"]), file["size"])
            there = commit.files.get(file["path"])
            oid = None if there is None else there.sha256 or there.oid
            mode = "lfs" if over_lfs else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send(200, {"files": answers})

    def lfs_batch(self, repo: str) -> None:
        asked = json.loads(self.body)
        # Without a branch it is for a pull request, which everybody may open.
        found = self.repo(repo, write="ref" in asked)
        self.someone()
        if asked["operation"] != "upload" or asked["hash_algo"] != "sha256" or "basic" not in asked["transfers"]:
            raise Refusal(422, "Not offered here")
        objects = []
        for wanted in asked["objects"]:
            objects.append({"oid": wanted["oid"], "size": wanted["size"]})
            if wanted["oid"] not in found.objects:
                actions = {"upload": {"href": self.hub.signed("PUT", found, wanted["oid"])}}
                actions["verify"] = {"href": f"{self.hub.url}/{repo}.git/info/lfs/objects/verify"}
                objects[-1]["actions"] = actions
        self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_verify(self, repo: str) -> None:
        self.someone()
        asked, objects = json.loads(self.body), self.repo(repo).objects
        if asked["oid"] not in objects or len(objects[asked["oid"]]) != asked["size"]:
            raise Refusal(404, "The object was not uploaded, or has another size")
        self.send(200, {})

    def xet_token(self, repo: str, revision: str) -> None:
        self.repo_to_change(repo, revision)
        place, token, expiry = f"local://{self.hub.xet_store}", secrets.token_hex(8), int(time.time()) + 600
        headers = {"X-Xet-Cas-Url": place, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expiry)}
        self.send(200, {"casUrl": place, "accessToken": token, "exp": expiry}, headers)

    def commit(self, repo: str, revision: str) -> None:
        found, account = self.repo_to_change(repo, revision), self.someone()
        if self.headers.get("Content-Type") != "application/x-ndjson":
            raise Refusal(400, "Expected application/x-ndjson")
        lines = [json.loads(line) for line in self.body.splitlines()]
        if not lines or lines[0]["key"] != "header" or not lines[0]["value"]["summary"]:
            raise Refusal(400, "The commit has no header")
        header = lines[0]["value"]
        parent = self.commit_of(found, revision)
        if header.get("parentCommit") not in (None, parent.oid):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines[1:]:
            path = line["value"]["path"]
            if line["key"] == "deletedFile" and path in files:
                del files[path]
            elif line["key"] in ("file", "lfsFile"):
                files[path] = self._blob(found, line["key"], line["value"])
            else:
                raise Refusal(400, f"Not a known change: {line['key']} {path}")
        changed = {path for path in {*files, *parent.files} if files.get(path) != parent.files.get(path)}
        answer = {}
        if self.for_pull_request():
            number = self._new_pull(found, account, header["summary"])
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        new = found.add(revision, Commit(files, header["summary"], parent.oid, frozenset(changed)))
        self.send(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{new.oid}", "commitOid": new.oid, **answer})

    def _blob(self, repo: Repo, key: str, value: Mapping[str, Any]) -> Blob:
        path = value["path"]
        if key == "file":
            content = base64.b64decode(value["content"])
            if value["encoding"] != "base64" or goes_over_lfs(path, content[:512], len(content)):
                raise Refusal(400, f"{path} is binary or too big, and must be uploaded over LFS")
            errors = card_errors(content.decode()) if path == "README.md" else []
            if errors:
                raise Refusal(400, errors[0])
            return Blob(content)
        found = repo.objects.get(value["oid"], self.hub.xet_content(value["oid"]))
        if value["algo"] != "sha256" or found is None or hashlib.sha256(found).hexdigest() != value["oid"]:
            raise Refusal(400, f"{path} refers to an object that was not uploaded: {value['oid']}")
        if len(found) != value["size"]:
            raise Refusal(400, f"{path} has {len(found)} bytes, not {value['size']}")
        repo.objects[value["oid"]] = found
        return Blob(found, value["oid"])

    # Downloads.

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self.repo(repo)
        commit = self.commit_of(found, revision)
        headers = {"X-Repo-Commit": commit.oid}
        blob = commit.files.get(path)
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit.oid)
        if blob.sha256 is None:
            self.send(200, blob.content, {**headers, "ETag": f'"{blob.oid}"'})
            return
        place = {"Location": self.hub.signed("GET", found, blob.sha256)}
        linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        self.send(302, headers={**headers, **place, **linked})


_REPO, _REVISION, _PATH = r"(?P<repo>[\w.-]+/[\w.-]+)", "(?P<revision>[^/]+)", "(?P<path>.+)"
#: Method, path and the method of `HubHandler`.
ENDPOINTS = (
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create_repo"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("GET", f"/api/models/{_REPO}", "info"),
    ("GET", f"/api/models/{_REPO}/revision/{_REVISION}", "info"),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}(?:/{_PATH})?", "tree"),
    ("GET", f"/api/models/{_REPO}/xet-write-token/{_REVISION}", "xet_token"),
    ("POST", f"/api/models/{_REPO}/branch/{_REVISION}", "branch"),
    ("POST", f"/api/models/{_REPO}/discussions", "open_pull"),
    ("GET", f"/api/models/{_REPO}/discussions/(?P<number>[0-9]+)", "pull"),
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", "preupload"),
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", "commit"),
    ("POST", f"/{_REPO}.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", f"/{_REPO}.git/info/lfs/objects/verify", "lfs_verify"),
    ("GET", f"/{_REPO}/resolve/{_REVISION}/{_PATH}", "resolve"),
)
