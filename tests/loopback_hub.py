"""A Hugging Face Hub within a test: what push_to_hub, from_pretrained, snapshot_download and datasets ask of one.

with LoopbackHub() as hub:
    run_on_hub("model.push_to_hub('user/model')", hub, tmp_path)
    assert hub.files("user/model") == {"config.json": b"..."}
"""

import base64
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from forks import Fork

LICENSES = {"apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "llama3.2", "gemma", "other", "unknown"}
PIPELINE_TAGS = {"text-generation", "feature-extraction", "image-text-to-text", "question-answering"}
LFS_SUFFIXES = (".safetensors", ".parquet", ".arrow", ".bin", ".npz")


class LoopbackHub(ThreadingHTTPServer):
    """Repositories in memory. Reading is free, writing needs any token but "wrong"; a repository keeps each of its commits.

    Args:
        user: owner of a repository that is created without one.

    Attributes:
        private, read_only: names of repositories as in `repos`, which need a token to be read, or admit pull requests alone.
        broken_commits: how many commits from now on fail when their large files are there.
        cards: texts of the cards that were validated.
        on_upload: called when a large file arrives, before it is kept.
    """

    def __init__(self, user: str = "user"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.user = user
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.objects: dict[str, bytes] = {}  # sha256 -> content of large files
        # "models/user/name" or "datasets/user/name" -> branch or commit -> path -> content
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.read_only: set[str] = set()
        self.broken_commits = 0
        self.cards: list[str] = []
        self.on_upload: Callable[[], object] = lambda: None

    def __enter__(self) -> "LoopbackHub":
        Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        return self.repos[f"{repo_type}s/{repo_id}"][revision]

    def commit(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        """Makes `files` the content of the branch; returns the commit's hash."""
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.repos[repo][branch] = self.repos[repo][digest] = files
        return digest


class _Handler(BaseHTTPRequestHandler):
    server: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer(self) -> None:
        body = self.read_body()  # all of it, or the next request of the connection starts in its midst
        path = urlsplit(self.path).path
        token = self.headers.get("Authorization")
        free = "/lfs/" in path or path == "/api/validate-yaml"
        if token == "Bearer wrong" or (self.command in ("POST", "PUT", "DELETE") and token is None and not free):
            return self.send(401, {"error": "Invalid username or password."})
        for pattern, handle in _ROUTES:
            match = re.fullmatch(pattern, f"{self.command.replace('HEAD', 'GET')} {path}")
            if match:
                return handle(self, body, **{name: unquote(value or "") for name, value in match.groupdict().items()})
        self.send(501, {"error": f"the loopback Hub does not know {self.command} {self.path}"})

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, status: int, content: object = None, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a revision; answers 404 where there is none."""
        hidden = repo in self.server.private and "Authorization" not in self.headers
        if repo not in self.server.repos or hidden:
            # the Hub does not tell strangers what there is
            status = 401 if "Authorization" not in self.headers else 404
            self.send(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        commits = self.server.repos[repo]
        if revision not in commits:
            self.send(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
            return None
        files = commits[revision]
        return next(name for name in commits if re.fullmatch("[0-9a-f]{40}", name) and commits[name] == files), files

    # writing

    def create(self, body: bytes) -> None:
        content = json.loads(body)
        repo_id = f"{content['organization'] or self.server.user}/{content['name']}"
        kind = content.get("type") or "model"
        url = f"{self.server.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        repo = f"{kind}s/{repo_id}"
        if repo in self.server.repos:
            return self.send(409, {"error": "You already created this repo", "url": url})
        self.server.repos[repo] = {}
        if content.get("private") or content.get("visibility") == "private":
            self.server.private.add(repo)
        self.server.commit(repo, "main", {})
        self.send(200, {"url": url, "name": repo_id})

    def delete(self, body: bytes) -> None:
        content = json.loads(body)
        repo = f"{content.get('type') or 'model'}s/{content['organization'] or self.server.user}/{content['name']}"
        if self.find(repo, "main") is not None:
            del self.server.repos[repo]
            self.server.private.discard(repo)
            self.send(200, {})

    def delete_branch(self, body: bytes, repo: str, revision: str) -> None:
        if not self.may_not_write(repo) and self.find(repo, revision) is not None:
            del self.server.repos[repo][revision]
            self.send(200, {})

    def may_not_write(self, repo: str) -> bool:
        if repo in self.server.read_only:
            self.send(403, {"error": "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"})
        return repo in self.server.read_only

    def tag(self, body: bytes, repo: str, revision: str) -> None:
        if self.may_not_write(repo) or (found := self.find(repo, revision)) is None:
            return
        name = json.loads(body)["tag"]
        if name in self.server.repos[repo]:
            return self.send(409, {"error": f"Tag reference {name} already exists"})
        self.server.repos[repo][name] = found[1]
        self.send(200, {})

    def branch(self, body: bytes, repo: str, revision: str) -> None:
        if self.may_not_write(repo):
            return
        if revision in self.server.repos[repo]:
            return self.send(409, {"error": "Reference already exists"})
        self.server.repos[repo][revision] = self.server.repos[repo][json.loads(body).get("startingPoint", "main")]
        self.send(200, {})

    def validate_card(self, body: bytes) -> None:
        content = json.loads(body)
        self.server.cards.append(content["content"])
        errors = card_errors(content["content"], content["repoType"])
        self.send(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self.find(repo, revision)) is None:
            return
        entries = []
        for path in (file["path"] for file in json.loads(body)["files"]):
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            entries.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            if path in found[1]:  # the client sends no file that is as it was
                data = found[1][path]
                blob = f"blob {len(data)}\0".encode() + data
                entries[-1]["oid"] = (hashlib.sha256(data) if mode == "lfs" else hashlib.sha1(blob)).hexdigest()
        self.send(200, {"files": entries})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        objects = json.loads(body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.server.objects:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}"}}
        self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.send(400, {"error": "the content is not what its sha256 says"})
        self.server.on_upload()
        self.server.objects[oid] = body
        self.send(200, {})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self.find(repo, revision)) is None:
            return
        create_pr = parse_qs(urlsplit(self.path).query).get("create_pr") == ["1"]
        if not create_pr and self.may_not_write(repo):
            return
        if self.server.broken_commits:
            self.server.broken_commits -= 1
            return self.send(500, {"error": "the commit failed"})
        files = dict(found[1])
        parent = json.loads(body.splitlines()[0])["value"].get("parentCommit")
        if parent not in (None, found[0]):
            return self.send(412, {"error": "A commit has happened since. Please refresh and try again."})
        for line in body.splitlines():
            operation, value = json.loads(line).values()
            if operation == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif operation == "deletedFile":
                del files[value["path"]]
            elif operation == "deletedFolder":
                files = {path: data for path, data in files.items() if not path.startswith(f"{value['path']}/")}
        number = 1 + sum(name.startswith("refs/pr/") for name in self.server.repos[repo])
        digest = self.server.commit(repo, f"refs/pr/{number}" if create_pr else revision, files)
        said = {"commitUrl": f"{self.server.url}/{repo}/commit/{digest}", "commitOid": digest}
        if create_pr:
            said["pullRequestUrl"] = f"{self.server.url}/{repo.split('/', 1)[1]}/discussions/{number}"
        self.send(200, said)

    # reading

    def info(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self.find(repo, revision or "main")) is None:
            return
        repo_id = repo.split("/", 1)[1]
        siblings = [{"rfilename": path} for path in sorted(found[1])]
        said = {
            "id": repo_id,
            "sha": found[0],
            "private": repo in self.server.private,
            "tags": [],
            "siblings": siblings,
        }
        card = found[1].get("README.md", b"").decode()
        said["cardData"] = front_matter(card) if card.startswith("---") else {}
        self.send(200, said)

    def tree(self, body: bytes, repo: str, revision: str, folder: str) -> None:
        if (found := self.find(repo, revision)) is None:
            return
        prefix = f"{folder}/" if folder else ""
        inside = {path: data for path, data in found[1].items() if path.startswith(prefix)}
        if folder and not inside:
            return self.send(404, {"error": f"{folder} does not exist"}, X_Error_Code="EntryNotFound")
        recursive = parse_qs(urlsplit(self.path).query).get("recursive") == ["true"]
        folders = {
            "/".join(parts[:depth])
            for parts in (path.split("/") for path in inside)
            for depth in range(prefix.count("/") + 1, len(parts))
        }
        entries = [_file_entry(path, data) for path, data in inside.items()]
        entries += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
        if not recursive:
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
        self.send(200, sorted(entries, key=lambda entry: entry["path"]))

    def paths_info(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self.find(repo, revision)) is not None:
            paths = parse_qs(body.decode())["paths"]
            self.send(200, [_file_entry(path, found[1][path]) for path in paths if path in found[1]])

    def resolve(self, body: bytes, repo: str, revision: str, file: str) -> None:
        if (
            found := self.find(repo if repo.startswith(("datasets/", "spaces/")) else f"models/{repo}", revision)
        ) is None:
            return
        digest, files = found
        if file not in files:
            return self.send(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=digest)
        etag = hashlib.sha256(files[file]).hexdigest()
        self.send(200, files[file], ETag=f'"{etag}"', X_Repo_Commit=digest)


def _file_entry(path: str, data: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1]) or {}


def card_errors(card: str, repo_type: str = "model") -> list[str]:
    """What the Hub would say of a card's metadata, as far as that is known without it."""
    if not card.startswith("---\n"):
        return ["empty or missing yaml metadata"]
    try:
        data = front_matter(card)
    except yaml.YAMLError as error:
        return [f"bad yaml: {error}"]
    errors = [
        f'"{key}" must be a string' for key in ("library_name", "license") if not isinstance(data.get(key, ""), str)
    ]
    for key in ("tags", "datasets", "metrics", "models"):
        value = data.get(key, [])
        if not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            errors.append(f'"{key}" must be an array of strings')
    ids = [*(data.get("datasets") or []), *([data["base_model"]] if isinstance(data.get("base_model"), str) else [])]
    errors += [f'"{name}" is no repo id' for name in ids if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name))]
    if str(data.get("license", "mit")) not in LICENSES:
        errors.append(f'"license" must be one of [...], not {data["license"]}')
    if data.get("license") == "other" and repo_type == "model" and not {"license_name", "license_link"} & data.keys():
        errors.append('"license_name" or "license_link" is required')
    if data.get("pipeline_tag", "text-generation") not in PIPELINE_TAGS:
        errors.append(f'"pipeline_tag" must be one of [...], not {data["pipeline_tag"]}')
    for model in data.get("model-index", []):
        for result in model["results"] if "name" in model else [{}]:
            task, dataset = result.get("task", {}), result.get("dataset", {})
            if not (task.get("type") and dataset.get("type") and dataset.get("name") and result.get("metrics")):
                errors.append('"model-index" results need task.type, dataset.type, dataset.name and metrics')
            elif task["type"] not in PIPELINE_TAGS:
                errors.append(f'"model-index" has the unknown task {task["type"]}')
            elif not all(metric.get("type") and "value" in metric for metric in result["metrics"]):
                errors.append('"model-index" metrics need type and value')
    return errors


_REPO = r"(?P<repo>(?:models|datasets|spaces)/[^/]+(?:/[^/]+)?)"
_REVISION = "(?P<revision>[^/]+)"
_ROUTES = [
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate_card),
    (r"DELETE /api/repos/delete", _Handler.delete),
    (rf"POST /api/{_REPO}/branch/{_REVISION}", _Handler.branch),
    (rf"DELETE /api/{_REPO}/branch/{_REVISION}", _Handler.delete_branch),
    (rf"POST /api/{_REPO}/tag/{_REVISION}", _Handler.tag),
    (rf"POST /api/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    (rf"POST /api/{_REPO}/commit/{_REVISION}", _Handler.commit),
    (rf"POST /api/{_REPO}/paths-info/{_REVISION}", _Handler.paths_info),
    (r"POST /(?P<repo>.+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"PUT /lfs/(?P<oid>.+)", _Handler.lfs_upload),
    (rf"GET /api/{_REPO}(?:/revision/{_REVISION})?", _Handler.info),
    (rf"GET /api/{_REPO}/tree/{_REVISION}(?:/(?P<folder>.+))?", _Handler.tree),
    (rf"GET /(?P<repo>(?:datasets/|spaces/)?[^/]+(?:/[^/]+)?)/resolve/{_REVISION}/(?P<file>.+)", _Handler.resolve),
]


def run_on_hub(code: str, hub: LoopbackHub, cwd: str | Path, python: Path | None = None, project: bool = True) -> str:
    """Runs `code` in a fresh process whose Hub is `hub`, and returns what it prints.

    The process is of another `python` where one is given; then, and without `project`, it cannot import the project.

    `cwd` holds the process' Hugging Face caches too; a process that fails raises with its stderr.
    """
    unset = ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "TRANSFORMERS_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "any",
        "HF_HOME": str(Path(cwd) / "hf_home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }
    if python is None:
        process = Fork(code, cwd=cwd, environment=environment, project=project).finish()
    else:
        environment.pop("PYTHONPATH", None)
        process = subprocess.run([python, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"the process ended with {process.returncode}:\n{process.stderr}")
    return process.stdout
