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
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".parquet", ".arrow", ".bin")


class LoopbackHub(ThreadingHTTPServer):
    """Repositories in memory. Reading is free, writing needs any token; a repository keeps each of its commits.

    Args:
        user: owner of a repository that is created without one.
    """

    def __init__(self, user: str = "user"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.user = user
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.objects: dict[str, bytes] = {}  # sha256 -> content of large files
        # "models/user/name" or "datasets/user/name" -> branch or commit -> path -> content
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}

    def __enter__(self) -> "LoopbackHub":
        Thread(target=self.serve_forever, daemon=True).start()
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

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        body = self.read_body()  # all of it, or the next request of the connection starts in its midst
        path = urlsplit(self.path).path
        if self.command in ("POST", "PUT") and "Authorization" not in self.headers and "/lfs/" not in path:
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
        if repo not in self.server.repos:
            self.send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
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
        self.server.commit(repo, "main", {})
        self.send(200, {"url": url, "name": repo_id})

    def branch(self, body: bytes, repo: str, revision: str) -> None:
        if revision in self.server.repos[repo]:
            return self.send(409, {"error": "Reference already exists"})
        self.server.repos[repo][revision] = self.server.repos[repo][json.loads(body).get("startingPoint", "main")]
        self.send(200, {})

    def validate_card(self, body: bytes) -> None:
        self.send(200, {"errors": [], "warnings": []})

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
        self.server.objects[oid] = body
        self.send(200, {})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self.find(repo, revision)) is None:
            return
        files = dict(found[1])
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
        digest = self.server.commit(repo, revision, files)
        self.send(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{digest}", "commitOid": digest})

    # reading

    def info(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self.find(repo, revision or "main")) is None:
            return
        repo_id = repo.split("/", 1)[1]
        siblings = [{"rfilename": path} for path in sorted(found[1])]
        self.send(200, {"id": repo_id, "sha": found[0], "private": False, "tags": [], "siblings": siblings})

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
        if (found := self.find(repo if repo.startswith("datasets/") else f"models/{repo}", revision)) is None:
            return
        digest, files = found
        if file not in files:
            return self.send(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=digest)
        etag = hashlib.sha256(files[file]).hexdigest()
        self.send(200, files[file], ETag=f'"{etag}"', X_Repo_Commit=digest)


def _file_entry(path: str, data: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


_REPO = r"(?P<repo>(?:models|datasets)/[^/]+(?:/[^/]+)?)"
_REVISION = "(?P<revision>[^/]+)"
_ROUTES = [
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate_card),
    (rf"POST /api/{_REPO}/branch/{_REVISION}", _Handler.branch),
    (rf"POST /api/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    (rf"POST /api/{_REPO}/commit/{_REVISION}", _Handler.commit),
    (rf"POST /api/{_REPO}/paths-info/{_REVISION}", _Handler.paths_info),
    (r"POST /(?P<repo>.+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"PUT /lfs/(?P<oid>.+)", _Handler.lfs_upload),
    (rf"GET /api/{_REPO}(?:/revision/{_REVISION})?", _Handler.info),
    (rf"GET /api/{_REPO}/tree/{_REVISION}(?:/(?P<folder>.+))?", _Handler.tree),
    (rf"GET /(?P<repo>(?:datasets/)?[^/]+(?:/[^/]+)?)/resolve/{_REVISION}/(?P<file>.+)", _Handler.resolve),
]


def run_on_hub(code: str, hub: LoopbackHub, cwd: str | Path) -> str:
    """Runs `code` in a fresh process whose Hub is `hub`, and returns what it prints.

    `cwd` holds the process' Hugging Face caches too; a process that fails raises with its stderr. huggingface_hub reads
    these variables when it is imported, hence the process.
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
    process = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"the process ended with {process.returncode}:\n{process.stderr}")
    return process.stdout
