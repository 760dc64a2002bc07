"""Base, adapter and card to the Hub: what travels, what of it must name the repo, and what stands in the way there.

It is one commit or none: `upload_folder` makes several of many files, or where one fails, and what it leaves when it
breaks off in between is weights that nobody can tell from another model's. What the Hub has already is not sent again,
so that a push that broke off is finished by the same command.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from loftq_cli.card import text_name
from loftq_cli.checkpoint.files import hash_file, read_json
from loftq_cli.checkpoint.hub import is_repo_id
from loftq_cli.errors import ConfigError, LoftqError
from loftq_cli.journal import ADAPTER_CONFIG, CARD_FILE, REPORT_FILE, written_files
from loftq_cli.patience import Note, patiently, sentences, somebody_else
from loftq_cli.report import PLACEHOLDER, load_lines
from loftq_cli.verify import read_report, verify

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")


@dataclass(frozen=True)
class Parcel:
    """What is to be uploaded: the files of `out` by name with their bytes, of which `rewritten` are not as they lie.

    `edited` are the copies of the source's files that somebody has changed since.
    """

    out: Path
    repo_id: str
    revision: str | None
    report: dict[str, Any]
    files: dict[str, int]
    rewritten: dict[str, bytes]
    edited: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


@dataclass(frozen=True)
class Pushed:
    """What became of it: the commit that the branch now stands at, and what an earlier push had left there."""

    repo_id: str
    revision: str | None
    commit: str
    url: str
    files: dict[str, int]
    bytes: int
    deleted: tuple[str, ...]


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be the name of a repo.

    Raises:
        ConfigError: it is none, or lacks its owner.
    """
    if not is_repo_id(repo_id) or "/" not in repo_id:
        raise ConfigError(f"`{repo_id}` is not a Hub id", "give owner and name, such as `you/model-2bit`")


def pack(out: Path, repo_id: str, revision: str | None = None) -> Parcel:
    """Check `out` and decide what travels; nothing is asked of the Hub.

    Raises:
        LoftqError: `out` is unfinished, or not what its report says.
    """
    check_repo_id(repo_id)
    report = read_report(out)
    verdict = verify(out)
    if violations := verdict.violations:
        more = f", and {len(violations) - 1} more" if len(violations) > 1 else ""
        raise LoftqError(
            f"`{out}` is not what loftq wrote: {violations[0]}{more}",
            f"see `loftq verify {out}`; make it again with `--overwrite`",
        )
    names = written_files(report)
    if missing := [name for name in names if not (out / name).is_file()]:
        raise LoftqError(f"`{out / missing[0]}` is gone", "put it back, or make the folder again with `--overwrite`")
    rewritten = _rewritten(out, repo_id, revision, report)
    files = {name: len(rewritten[name]) if name in rewritten else (out / name).stat().st_size for name in names}
    return Parcel(out, repo_id, revision, report, files, rewritten, verdict.edited)


@dataclass(frozen=True)
class Found:
    """What a branch stands at: its commit, and the files of it that the last push of loftq, if any, has put there."""

    commit: str
    ours: frozenset[str]


def open_repo(repo_id: str, private: bool, revision: str | None, note: Note) -> Found:
    """Make the repo and its branch, or find that they may be written to; returns what earlier pushes put there.

    Args:
        repo_id: owner and name.
        private: make it private; one that is there must be so already.
        revision: a branch, made if need be, without what main holds; or a pull request, `refs/pr/N`, that is there.
        note: is told of what takes longer.

    Raises:
        LoftqError: no token, no permission, or a repo that holds another model or is public against `private`.
    """
    from huggingface_hub import HfApi, get_token

    check_repo_id(repo_id)
    owner = repo_id.partition("/")[0]
    if get_token() is None:
        raise LoftqError(
            "there is no token for the Hub", f"log in with one that may write to `{owner}`: `hf auth login`"
        )
    with sentences(repo_id, revision):
        api = HfApi()
        patiently(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True), note)
        if revision is None or not revision.startswith("refs/"):  # anybody may write to a pull request of theirs
            patiently(lambda: api.auth_check(repo_id, write=True), note)  # of what is there, making it tells nothing
        if private and not patiently(lambda: api.model_info(repo_id), note).private:
            raise LoftqError(
                f"`{repo_id}` is there already, and public", "leave out `--private`, or choose another name"
            )
        is_branch = revision is not None and not revision.startswith("refs/")
        if is_branch and not patiently(lambda: api.revision_exists(repo_id, str(revision)), note):
            # not from main, whose model it would inherit, but from the repo's first commit, which mostly is empty
            first = patiently(lambda: api.list_repo_commits(repo_id), note)[-1].commit_id
            patiently(lambda: _find(repo_id, first, new_branch=True), note)
            patiently(lambda: api.create_branch(repo_id, branch=str(revision), revision=first, exist_ok=True), note)
        return patiently(lambda: _find(repo_id, revision), note)


def push(
    parcel: Parcel, *, private: bool = False, message: str | None = None, note: Note = lambda sentence: None
) -> Pushed:
    """Upload; what is on the Hub already is not sent again.

    Raises:
        LoftqError: see `open_repo`; or the connection broke, and typing the same again goes on; or a `.gitignore` in
            the repo has kept files out.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    repo_id, revision, api = parcel.repo_id, parcel.revision, HfApi()
    found = open_repo(repo_id, private, revision, note)
    stale = sorted(found.ours - parcel.files.keys())
    what = f"{parcel.report['config']['bits']}-bit base and adapter, loftq {parcel.report['version']}"

    def upload() -> str:
        head = _find(repo_id, revision).commit
        if head != found.commit:  # somebody else's; or our own, of which only the answer was lost
            if _differing(parcel, head):
                raise somebody_else(repo_id)
            return head
        content = {name: parcel.rewritten.get(name, (parcel.out / name).resolve()) for name in parcel.files}
        adds = [CommitOperationAdd(name, data) for name, data in content.items()]
        deletes = [CommitOperationDelete(name) for name in stale]
        commit = api.create_commit(
            repo_id,
            [*deletes, *adds],
            commit_message=message or what,
            revision=revision,
            parent_commit=found.commit,  # what others commit while this uploads is not overwritten
        )
        return str(commit.oid)

    with sentences(repo_id, revision):
        commit = patiently(upload, note)
        if lost := patiently(lambda: _differing(parcel, commit), note):  # the client does not tell what it leaves out
            if not patiently(lambda: api.file_exists(repo_id, ".gitignore", revision=commit), note):
                raise somebody_else(repo_id)
            names = ", ".join(f"`{name}`" for name in lost[:3]) + (f" and {len(lost) - 3} more" if lost[3:] else "")
            raise LoftqError(
                f"`{repo_id}` did not take {names}: its `.gitignore` keeps out what it names",
                "take those lines out of the repo's `.gitignore`, or delete it; then the same command sends the rest",
            )
    url = f"{api.endpoint}/{repo_id}" + (f"/tree/{quote(revision, safe='')}" if revision else "")
    return Pushed(repo_id, revision, commit, url, parcel.files, parcel.total_bytes, tuple(stale))


def branch_of(revision: str | None) -> str | None:
    """What a loader must be told; nothing of the main branch, and of a pull request, which is to become part of it."""
    return None if revision in (None, "main") or str(revision).startswith("refs/") else revision


def _rewritten(out: Path, repo_id: str, revision: str | None, report: dict[str, Any]) -> dict[str, bytes]:
    """The files that are not sent as they lie: those that name the base by its place, or a folder of this machine."""
    adapter = json.loads((out / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    branch = branch_of(revision)
    card = (out / CARD_FILE).read_text(encoding="utf-8")
    here, there = str(adapter["base_model_name_or_path"]), adapter.get("revision")
    new = "\n".join(load_lines(report, repo_id, branch, on_hub=True))
    for old in (load_lines(report, PLACEHOLDER), load_lines(report, here, there, on_hub=True)):  # made, or from the Hub
        card = card.replace("\n".join(old), new)
    adapter |= {"base_model_name_or_path": repo_id, "revision": branch}
    source, config = dict(report["source"]), dict(report["config"])
    if source["revision"] is None:
        source["model"] = Path(source["model"]).name
    if config["calibration"] is not None:
        config["calibration"] = text_name(config["calibration"])
    return {
        ADAPTER_CONFIG: _json_bytes(adapter),
        CARD_FILE: card.encode(),
        REPORT_FILE: _json_bytes({**report, "source": source, "config": config}),
    }


def _find(repo_id: str, revision: str | None, new_branch: bool = False) -> Found:
    """Look at a branch, or at the commit that a new one is to begin with.

    Raises:
        LoftqError: it holds weights that no push of loftq has put there, which are not for us to replace.
    """
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(repo_id, revision=revision)
    there = {file.rfilename for file in info.siblings or []}
    ours: set[str] = set()
    if REPORT_FILE in there:
        ours = set(written_files(read_json(Path(hf_hub_download(repo_id, REPORT_FILE, revision=info.sha)))))
    weights = {name for name in there if name.rpartition("/")[0] in ("", "loftq_init") and _is_weights(name)}
    if foreign := sorted(weights - ours):
        branch = ["--revision", revision] if revision else []
        delete = shlex.join(["hf", "repos", "delete-files", repo_id, *_patterns(foreign, there), *branch])
        raise LoftqError(
            f"`{repo_id}` holds another model: `{foreign[0]}` is not from loftq",
            "choose another name" + ("" if new_branch else f"; or if that model may go: `{delete}`"),
        )
    return Found(str(info.sha), frozenset(ours & there))


def _differing(parcel: Parcel, commit: str) -> list[str]:
    """The files that a commit lacks, or holds otherwise than they are to be pushed."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(parcel.repo_id, revision=commit, files_metadata=True)
    there = {file.rfilename: file for file in info.siblings or []}
    return [name for name in parcel.files if name not in there or not _is_same(parcel, name, there[name])]


def _is_same(parcel: Parcel, name: str, there: RepoSibling) -> bool:
    """Whether a file of the Hub is the one to be pushed; nothing is downloaded, nor are weights read again."""
    if there.size != parcel.files[name]:
        return False
    content, path = parcel.rewritten.get(name), parcel.out / name
    if there.lfs is None:  # known by git's hash; only what is small is stored like this
        content = path.read_bytes() if content is None else content
        return there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    sha256 = parcel.report["files"].get(name) if content is None else hashlib.sha256(content).hexdigest()
    return there.lfs.sha256 == (sha256 or hash_file(path))


def _is_weights(name: str) -> bool:
    return name.lower().endswith(WEIGHTS) or name == "adapter_config.json"


def _patterns(names: list[str], there: set[str]) -> list[str]:
    """`names` as `hf repos delete-files` takes them: numbered ones as one pattern, if it takes nothing else with it."""
    patterns = set()
    for name in names:
        literal = glob.escape(name)
        pattern = re.sub(r"\d+", "*", literal)
        taken = fnmatch.filter(there, pattern)  # as the Hub's client does: `*` crosses `/`
        patterns.add(pattern if len(taken) > 1 and pattern[0] != "*" and set(taken) <= set(names) else literal)
    return sorted(patterns)


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
