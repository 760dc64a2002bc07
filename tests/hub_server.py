"""A loopback Hub for tests: the read routes that huggingface_hub uses, over local folders; hub_writes.py adds writing.

    with HubServer() as hub:
        commit = hub.add("org/name", folder)
        subprocess.run([...], env={**os.environ, **hub.environment(tmp_path / "home")})
        assert hub.bytes_served["model.safetensors"] < 10_000

huggingface_hub reads its endpoint when it is imported, so the client belongs in a process of its own.
As on the real Hub, *.safetensors files redirect to another origin, which must see no token.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"  # what a private or gated repo asks for


@dataclass
class Repo:
    """Folders by commit, commits by branch or tag."""

    commits: dict[str, Path] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False  # looks missing without the token
    gated: bool = False  # described to everyone, its files closed without the token


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    authorized: bool


@dataclass
class Cut:
    """Breaks the connection after so many bytes of a file's body, so many times."""

    after_bytes: int
    times: int


class HubServer:
    """Serves until the `with` block ends."""

    def __init__(self, handler: type[BaseHTTPRequestHandler] | None = None) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.bytes_served: Counter[str] = Counter()  # of file contents, by file name
        self.cuts: dict[str, Cut] = {}
        self.fail_with: int | None = None  # answer everything with this status
        self.on_download: Callable[[str], None] | None = None  # called before a whole large file is sent
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler or Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self._port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self.storage = f"http://localhost:{self._port}"  # the same server, another origin

    def __enter__(self) -> HubServer:
        # polled often, or every test would wait half a second for the end
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo_id: str, folder: Path, ref: str = "main", **state: bool) -> str:
        """Serve `folder` as `ref` of a repo, new or not; returns its commit."""
        repo = self.repos.setdefault(repo_id, Repo())
        commit = hashlib.sha1(f"{repo_id} {ref} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[commit] = folder
        repo.refs[ref] = commit
        for name, value in state.items():
            setattr(repo, name, value)
        return commit

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """What a client process needs in its environment; `home` holds its cache."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),  # other packages set it when they are imported
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "",
            **more,
        }

    def reset(self) -> None:
        """Forget what was asked and served, and behave again."""
        self.requests.clear()
        self.bytes_served.clear()
        self.cuts.clear()
        self.fail_with = None
        self.on_download = None


class Refusal(Exception):
    """An error answer: status, the Hub's error code, a message; then headers, and a page in place of JSON."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.route()

    def do_HEAD(self) -> None:
        self.route()

    def log_message(self, *args: Any) -> None:
        pass

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    @property
    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def routes(self) -> dict[str, Callable[..., None]]:
        return ROUTES

    def before(self) -> None:
        """What comes before any route."""

    def route(self) -> None:
        asked = Request(self.command, self.path, self.headers.get("Range"), "Authorization" in self.headers)
        self.hub.requests.append(asked)
        try:
            self.before()
            if self.hub.fail_with:
                raise Refusal(self.hub.fail_with, "", "something broke")
            for pattern, handler in self.routes().items():
                if match := re.fullmatch(pattern, urlsplit(self.path).path):
                    return handler(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
            raise Refusal(404, "", f"no route {self.path}")
        except Refusal as refusal:
            status, code, message, *more = refusal.args
            headers = {**(more[0] if more else {}), "X-Error-Code": code, "X-Error-Message": message}
            page = more[1] if more[1:] else b""
            self.answer(status, page or json.dumps({"error": message}).encode(), headers)

    def commit(self, repo_id: str, revision: str, files: bool = False) -> tuple[Repo, str, Path]:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.authorized):
            raise Refusal(404, "RepoNotFound", "Repository not found")
        if files and repo.gated and not self.authorized:
            raise Refusal(401, "GatedRepo", f"Access to model {repo_id} is restricted")
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, commit, repo.commits[commit]

    def _model_info(self, repo: str, revision: str = "main") -> None:
        found, commit, folder = self.commit(repo, revision)
        siblings: list[dict[str, Any]] = [{"rfilename": file} for file in files_in(folder)]
        if "blobs=" in self.path:
            siblings = [{"rfilename": file, **_described(file, path)} for file, path in files_in(folder).items()]
        info = {"id": repo, "modelId": repo, "sha": commit, "private": found.private, "gated": found.gated}
        self.json({**info, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def _tree(self, repo: str, revision: str, under: str) -> None:
        _, _, folder = self.commit(repo, revision)
        files = {file: path for file, path in files_in(folder).items() if file.startswith(under)}
        if not files:
            raise Refusal(404, "EntryNotFound", f"{under} does not exist")
        self.json([{"type": "file", "path": file, **_described(file, path)} for file, path in files.items()])

    def _commits(self, repo: str, revision: str) -> None:
        found, _, _ = self.commit(repo, revision)
        author = [{"user": "somebody"}]
        date = "2024-01-01T00:00:00.000Z"
        commits = [
            {"id": commit, "title": "", "message": "", "date": date, "authors": author} for commit in found.commits
        ]
        self.json(commits[::-1])

    def _resolve(self, repo: str, revision: str, file: str) -> None:
        _, commit, folder = self.commit(repo, revision, files=True)
        path = folder / file
        if not path.is_file():
            raise Refusal(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(path)}"'}
        if not file.endswith(".safetensors"):
            return self._file(path, headers)
        headers |= {"X-Linked-Size": str(path.stat().st_size), "X-Linked-Etag": headers["ETag"]}
        headers["Location"] = f"{self.hub.storage}/storage/{repo}/{commit}/{file}"
        return self.answer(302, b"", headers)

    def _storage(self, repo: str, commit: str, file: str) -> None:
        if self.hub.on_download and "Range" not in self.headers:
            self.hub.on_download(file)
        self._file(self.hub.repos[repo].commits[commit] / file, {})

    def _file(self, path: Path, headers: dict[str, str]) -> None:
        content = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self.answer(200, content, headers, path.name)
        begin, end = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
        if begin >= len(content):
            raise Refusal(416, "", "range beyond the end")
        headers = {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"}
        return self.answer(206, content[begin:end], headers, path.name)

    def json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str], file: str | None = None) -> None:
        self.send_response(status)
        for name, value in {"Accept-Ranges": "bytes", **headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cuts.get(file) if file else None
        if cut is not None and cut.times > 0:
            cut.times -= 1
            body = body[: cut.after_bytes]
            self.close_connection = True
        self.wfile.write(body)
        if file:
            self.hub.bytes_served[file] += len(body)


REPO, REVISION, FILE = r"(?P<repo>[^/]+(?:/[^/]+)?)", r"(?P<revision>[^/]+)", r"(?P<file>.+)"
ROUTES: dict[str, Callable[..., None]] = {
    rf"/api/models/{REPO}/tree/{REVISION}(?:/(?P<under>.*))?": Handler._tree,
    rf"/api/models/{REPO}/revision/{REVISION}": Handler._model_info,
    rf"/api/models/{REPO}/commits/{REVISION}": Handler._commits,
    rf"/api/models/{REPO}": Handler._model_info,
    rf"/storage/{REPO}/(?P<commit>[0-9a-f]{{40}})/{FILE}": Handler._storage,
    rf"/{REPO}/resolve/{REVISION}/{FILE}": Handler._resolve,
}


def files_in(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _described(file: str, path: Path) -> dict[str, Any]:
    size, sha256 = path.stat().st_size, _etag(path)
    large = (
        {"lfs": {"size": size, "sha256": sha256, "oid": sha256, "pointerSize": 130}}
        if file.endswith(".safetensors")
        else {}
    )
    git = hashlib.sha1(f"blob {size}\0".encode() + path.read_bytes()).hexdigest()
    return {"size": size, "oid": git, "blobId": git, **large}


def _etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
