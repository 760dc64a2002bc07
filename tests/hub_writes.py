"""What the loopback Hub writes: the routes by which huggingface_hub creates repos and uploads files, with LFS.

    with WritableHub(tmp_path / "store") as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(home, HF_TOKEN=TOKEN)})
        assert hub.uploads == {...}

Large files go to the other origin, as on the real Hub, which must see no token, under addresses that are signed: who
has one may write. Clients with hf_xet speak Xet instead, of which this knows what an upload asks for; it does not
unpack what it gets, so a test says what may come (`offer`). Faults are what a test asks for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.hub_server import REPO, REVISION, ROUTES, TOKEN, Cut, Handler, HubServer, Refusal, Repo, files_in

READ_TOKEN = "hf_loopback_reads"  # known, and may write nowhere
WRITABLE = "org"  # where TOKEN may write
XET_TOKEN = "xet_loopback"  # what the Hub gives for the storage
SIGNATURE = "5ea1ed"  # of addresses: as good as a token


@dataclass
class Fault:
    """Answers what matches with `status` (0: breaks the connection), so many times, from the `after`-th on."""

    pattern: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0
    page: bytes = b""  # in place of JSON, as proxies answer
    meanwhile: Callable[[], object] = lambda: None


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
        self.offered: dict[str, bytes] = {}  # what may come over Xet, by sha256
        self.lose_answer = False  # of the next commit
        self.on_commit: Callable[[], None] | None = None  # called before the next commit is made

    def reset(self) -> None:
        super().reset()
        self.faults.clear()
        self.upload_cuts.clear()
        self.uploads.clear()
        self.on_commit, self.lose_answer = None, False

    def clear(self) -> None:
        """Forget everything."""
        self.reset()
        self.repos.clear()
        self.blobs.clear()
        self.messages.clear()
        self.offered.clear()
        shutil.rmtree(self.store, ignore_errors=True)

    def folder(self, repo_id: str, ref: str = "main") -> Path:
        """The files of a repo at a branch."""
        repo = self.repos[repo_id]
        return repo.commits[repo.refs[ref]]

    def offer(self, folder: Path) -> None:
        """Expect the large files of a folder over Xet."""
        files = [path.read_bytes() for path in folder.rglob("*.safetensors")]
        self.offered |= {hashlib.sha256(content).hexdigest(): content for content in files}

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
        return writes if self.command in ("POST", "PUT") else {**READS, **ROUTES}

    def before(self) -> None:
        self.body = self._read_body() if self.command in ("POST", "PUT") else b""
        for fault in self.hub.faults:
            if re.search(fault.pattern, f"{self.command} {self.path}"):
                fault.after -= 1
                if fault.after < 0 and fault.times > 0:
                    fault.times -= 1
                    fault.meanwhile()
                    if fault.status == 0:
                        self.connection.close()
                        raise ConnectionError("cut, as the test asks")
                    raise Refusal(fault.status, "", "as the test asks", fault.headers, fault.page)

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

    def may_write(self, repo_id: str, revision: str = "main") -> None:
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if sent not in (TOKEN, READ_TOKEN):
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        if sent == READ_TOKEN and revision.startswith("refs/pr/"):
            return  # a pull request is for those who may not
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

    def auth_check(self, repo: str) -> None:
        self.commit(repo, "main")
        self.may_write(repo)
        self.json({})

    def branch(self, repo: str, branch: str) -> None:
        self.may_write(repo)
        found = self.hub.repos[repo]
        if branch in found.refs:
            raise Refusal(409, "", "Reference already exists")
        found.refs[branch] = json.loads(self.body).get("startingPoint", found.refs["main"])
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
        self.may_write(repo, revision)
        _, _, folder = self.commit(repo, revision)
        there, answers = files_in(folder), []
        ignored = there[".gitignore"].read_text().split() if ".gitignore" in there else []
        for file in json.loads(self.body)["files"]:
            base64.b64decode(file["sample"])
            mode, oid = "lfs" if file["path"].endswith(".safetensors") else "regular", None
            if file["path"] in there:
                content = there[file["path"]].read_bytes()
                git = hashlib.sha1(f"blob {len(content)}\0".encode() + content)
                oid = (hashlib.sha256(content) if mode == "lfs" else git).hexdigest()
            ignore = any(Path(file["path"]).match(line) for line in ignored)
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": ignore, "oid": oid})
        self.json({"files": answers, "commitOid": "0" * 40})

    def batch(self, repo: str) -> None:
        body = json.loads(self.body)
        self.may_write(repo, body["ref"]["name"])
        objects = []
        for asked in body["objects"]:
            href = f"{self.hub.storage}/upload/{asked['oid']}?X-Amz-Signature={SIGNATURE}"
            missing = {} if asked["oid"] in self.hub.blobs else {"actions": {"upload": {"href": href}}}
            objects.append({"oid": asked["oid"], "size": asked["size"], **missing})
        self.json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        assert "Authorization" not in self.headers, "the storage must not see the token"
        assert self.path.endswith(SIGNATURE)
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "", "not what was announced")
        self.hub.blobs[oid] = self.body
        self.hub.uploads[oid] += 1
        self.answer(200, b"", {})

    def xet_token(self, repo: str, revision: str) -> None:
        self.may_write(repo, revision)
        self.json({"casUrl": self.hub.storage, "accessToken": XET_TOKEN, "exp": int(time.time()) + 3600})

    def xorb(self, name: str) -> None:
        assert self.headers["Authorization"] == f"Bearer {XET_TOKEN}"
        self.hub.bytes_served["xorbs"] += len(self.body)
        self.json({"was_inserted": True})

    def shard(self) -> None:
        """What files the blocks of bytes that came before make up."""
        assert self.headers["Authorization"] == f"Bearer {XET_TOKEN}"
        for sha256, content in self.hub.offered.items():
            words = bytes.fromhex(sha256)
            if b"".join(words[i : i + 8][::-1] for i in range(0, 32, 8)) in self.body:
                self.hub.blobs[sha256] = content
                self.hub.uploads[sha256] += 1
        self.json({"result": 1})

    def telemetry(self) -> None:
        self.json({})

    def write(self, repo: str, revision: str) -> None:
        self.may_write(repo, revision)
        if self.hub.on_commit:
            meanwhile, self.hub.on_commit = self.hub.on_commit, None
            meanwhile()
        lines = [json.loads(line) for line in self.body.splitlines()]
        current = self.hub.repos[repo].refs[revision]
        if lines[0]["value"].get("parentCommit", current) != current:
            raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
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
        if self.hub.lose_answer:
            self.hub.lose_answer = False
            self.connection.close()
            raise ConnectionError("cut, as the test asks")
        self.json({"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{commit}", "commitOid": commit, "success": True})

    def route(self) -> None:
        try:
            super().route()
        except ConnectionError:  # one that a test asked for
            self.close_connection = True

    def log_error(self, *args: Any) -> None:
        pass


READS: dict[str, Callable[..., None]] = {
    rf"/api/models/{REPO}/auth-check/write": WritingHandler.auth_check,
    rf"/api/models/{REPO}/xet-write-token/{REVISION}": WritingHandler.xet_token,
}
WRITES: dict[tuple[str, str], Callable[..., None]] = {
    ("POST", "/api/repos/create"): WritingHandler.create,
    ("POST", "/api/validate-yaml"): WritingHandler.validate,
    ("POST", rf"/api/models/{REPO}/branch/(?P<branch>[^/]+)"): WritingHandler.branch,
    ("POST", rf"/api/models/{REPO}/preupload/{REVISION}"): WritingHandler.preupload,
    ("POST", rf"/api/models/{REPO}/commit/{REVISION}"): WritingHandler.write,
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch"): WritingHandler.batch,
    ("PUT", r"/upload/(?P<oid>[0-9a-f]{64})"): WritingHandler.upload,
    ("POST", r"/v1/xorbs/default/(?P<name>[0-9a-f]{64})"): WritingHandler.xorb,
    ("POST", r"/v1/shards"): WritingHandler.shard,
    ("POST", r"/v1/telemetry"): WritingHandler.telemetry,
}
