"""What the loopback Hub writes: the routes by which huggingface_hub creates repos and uploads files, with LFS.

    with WritableHub(tmp_path / "store") as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(home, HF_TOKEN=TOKEN)})
        assert hub.uploads == {...}

Large files go to the other origin, as on the real Hub, which must see no token. Faults are what a test asks for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.hub_server import REPO, REVISION, ROUTES, TOKEN, Cut, Handler, HubServer, Refusal, Repo, files_in

READ_TOKEN = "hf_loopback_reads"  # known, and may write nowhere
WRITABLE = "org"  # where TOKEN may write


@dataclass
class Fault:
    """Answers requests whose method and path match with `status`, so many times, from the `after`-th on."""

    pattern: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0


class WritableHub(HubServer):
    """A Hub to push to; `store` is a folder that it fills."""

    def __init__(self, store: Path) -> None:
        super().__init__(WritingHandler)
        self.store = store
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.upload_cuts: list[Cut] = []  # each breaks the connection in the middle of an upload
        self.uploads: Counter[str] = Counter()  # whole uploads, by sha256
        self.messages: list[str] = []  # of commits

    def reset(self) -> None:
        super().reset()
        self.faults.clear()
        self.upload_cuts.clear()
        self.uploads.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.reset()
        self.repos.clear()
        self.blobs.clear()
        self.messages.clear()
        shutil.rmtree(self.store, ignore_errors=True)

    def folder(self, repo_id: str, ref: str = "main") -> Path:
        """The files of a repo at a branch."""
        repo = self.repos[repo_id]
        return repo.commits[repo.refs[ref]]

    def next_commit(self, repo_id: str, ref: str) -> Path:
        """A copy of the files at `ref`, to be changed and committed."""
        number = len(self.repos[repo_id].commits)
        folder = self.store / repo_id.replace("/", "--") / f"{number}"
        if ref in self.repos[repo_id].refs:
            shutil.copytree(self.folder(repo_id, ref), folder)
        else:
            folder.mkdir(parents=True)
        return folder


class WritingHandler(Handler):
    hub: WritableHub  # type: ignore[assignment]

    def do_POST(self) -> None:
        self.route()

    def do_PUT(self) -> None:
        self.route()

    def routes(self) -> dict[str, Callable[..., None]]:
        writes = {pattern: handler for (method, pattern), handler in WRITES.items() if method == self.command}
        return writes if self.command in ("POST", "PUT") else ROUTES

    def before(self) -> None:
        self.body = self._read_body() if self.command in ("POST", "PUT") else b""
        for fault in self.hub.faults:
            if re.search(fault.pattern, f"{self.command} {self.path}"):
                fault.after -= 1
                if fault.after < 0 and fault.times > 0:
                    fault.times -= 1
                    raise Refusal(fault.status, "", "as the test asks", fault.headers)

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        size = int(self.headers.get("Content-Length", 0))
        cut = next((cut for cut in self.hub.upload_cuts if cut.times > 0), None)
        if self.command == "PUT" and cut is not None:
            cut.times -= 1
            self.rfile.read(min(size, cut.after_bytes))
            self.connection.close()
            raise ConnectionError("cut, as the test asks")
        return self.rfile.read(size)

    def may_write(self, repo_id: str) -> None:
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if sent not in (TOKEN, READ_TOKEN):
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        if sent == READ_TOKEN or not repo_id.startswith(f"{WRITABLE}/"):
            raise Refusal(403, "", f"You don't have the rights to write to {repo_id}")

    def create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        self.may_write(repo_id)
        url = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            return self.answer(409, json.dumps({**url, "error": "You already created this model repo"}).encode(), {})
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repos[repo_id] = Repo()
        folder = self.hub.next_commit(repo_id, "main")
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        self.hub.add(repo_id, folder, private=private)
        self.json(url)

    def branch(self, repo: str, branch: str) -> None:
        self.may_write(repo)
        found = self.hub.repos[repo]
        if branch in found.refs:
            raise Refusal(409, "", "Reference already exists")
        found.refs[branch] = found.refs["main"]
        self.json({})

    def validate(self) -> None:
        text = json.loads(self.body)["content"]
        matter = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        try:
            assert matter, "no front matter"
            assert isinstance(yaml.safe_load(matter[1]), dict)
        except Exception as error:
            return self.answer(400, json.dumps({"errors": [{"message": str(error)}], "warnings": []}).encode(), {})
        self.json({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        self.may_write(repo)
        _, _, folder = self.commit(repo, revision)
        there, answers = files_in(folder), []
        for file in json.loads(self.body)["files"]:
            base64.b64decode(file["sample"])
            mode, oid = "lfs" if file["path"].endswith(".safetensors") else "regular", None
            if file["path"] in there:
                content = there[file["path"]].read_bytes()
                git = hashlib.sha1(f"blob {len(content)}\0".encode() + content)
                oid = (hashlib.sha256(content) if mode == "lfs" else git).hexdigest()
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.json({"files": answers, "commitOid": "0" * 40})

    def batch(self, repo: str) -> None:
        self.may_write(repo)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            href = f"{self.hub.storage}/upload/{asked['oid']}"
            missing = {} if asked["oid"] in self.hub.blobs else {"actions": {"upload": {"href": href}}}
            objects.append({"oid": asked["oid"], "size": asked["size"], **missing})
        self.json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        assert "Authorization" not in self.headers, "the storage must not see the token"
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "", "not what was announced")
        self.hub.blobs[oid] = self.body
        self.hub.uploads[oid] += 1
        self.answer(200, b"", {})

    def write(self, repo: str, revision: str) -> None:
        self.may_write(repo)
        lines = [json.loads(line) for line in self.body.splitlines()]
        folder = self.hub.next_commit(repo, revision)
        for line in lines[1:]:
            path = folder / line["value"]["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "file":
                path.write_bytes(base64.b64decode(line["value"]["content"]))
            elif line["key"] == "lfsFile":
                path.write_bytes(self.hub.blobs[line["value"]["oid"]])
            else:
                assert line["key"] == "deletedFile", line
                path.unlink()
        commit = self.hub.add(repo, folder, ref=revision)
        self.hub.messages.append(lines[0]["value"]["summary"])
        self.json({"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{commit}", "commitOid": commit, "success": True})

    def route(self) -> None:
        try:
            super().route()
        except ConnectionError:  # one that a test asked for
            self.close_connection = True

    def log_error(self, *args: Any) -> None:
        pass


WRITES: dict[tuple[str, str], Callable[..., None]] = {
    ("POST", "/api/repos/create"): WritingHandler.create,
    ("POST", "/api/validate-yaml"): WritingHandler.validate,
    ("POST", rf"/api/models/{REPO}/branch/(?P<branch>[^/]+)"): WritingHandler.branch,
    ("POST", rf"/api/models/{REPO}/preupload/{REVISION}"): WritingHandler.preupload,
    ("POST", rf"/api/models/{REPO}/commit/{REVISION}"): WritingHandler.write,
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch"): WritingHandler.batch,
    ("PUT", r"/upload/(?P<oid>[0-9a-f]{64})"): WritingHandler.upload,
}
