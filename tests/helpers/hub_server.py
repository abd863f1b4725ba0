"""A small Hub on loopback for the real huggingface_hub client, with the requests of publishing and loading a model.

    with HubServer({"hf_alice": "alice"}) as hub:
        ...  # a process with HF_ENDPOINT=hub.url and HF_TOKEN=hf_alice
    assert hub.unknown == []

It has public and private repositories of models and Spaces with branches, tokens with write or read permission, and
regular and large files. Large files are transferred by Git LFS or, with `xet_folder`, by Xet: the server issues Xet
tokens, and the client's own Xet library stores the content in that folder. Unknown requests are answered with 404 and
listed in `unknown`; `refuse` makes chosen requests fail.
"""

import base64
import hashlib
import json
import re
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

ROUTES: list[tuple[str, re.Pattern, str]] = []
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
KIND = "(?:models|spaces)"
REVISION = r"(?P<revision>[^/]+)"  # refs/pr/1 comes quoted


def route(method: str, path: str):
    """Registers a method of the handler for a path, a regular expression whose groups become the arguments."""

    def register(function):
        ROUTES.append((method, re.compile(path), function.__name__))
        return function

    return register


@dataclass
class Blob:
    """A file of a commit: its content or, for a large file, the hash that its content is stored under."""

    content: bytes | None = None
    sha256: str | None = None  # large files only
    size: int = 0

    @property
    def oid(self) -> str:
        """Git's object id of the file or, for a large file, of its LFS pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        data = pointer.encode() if self.content is None else self.content
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    private: bool
    sdk: str | None = None  # of a Space
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        parent = self.branches.get(branch, "")
        self.messages.append(message)
        sha = hashlib.sha1(f"{parent} {len(self.messages)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


class Refused(Exception):
    """An error response: HTTP status, the Hub's error code and a message."""

    def __init__(self, status: int, code: str, message: str):
        self.status, self.code, self.message = status, code, message


class HubServer:
    """The state of the Hub and its thread. Port 0 means any free port; a closed server reopens at the same port."""

    def __init__(self, writers: dict[str, str], readers: dict[str, str] | None = None, port: int = 0):
        self.users = {**writers, **(readers or {})}  # token -> name
        self.readers = set(readers or {})
        self.port = port
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # sha256 -> content
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.refuse = None  # function of "METHOD path": None, the Refused to answer with, or "die"
        self.xet_folder: Path | None = None
        self._lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._http.daemon_threads = True
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage(self) -> str:
        """The address of large files, on another host, which must not receive a token."""
        return f"http://localhost:{self.port}/large"

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """The contents of a branch by path, as a clone would have them."""
        repository = self.repositories[repo]
        blobs = repository.commits[repository.branches[branch]]
        return {path: self.large[x.sha256] if x.content is None else x.content for path, x in blobs.items()}


def xet_hashes(folder: Path) -> dict[str, str]:
    """sha256 -> Xet hash of the files in a Xet store; its shards contain both."""
    hashes = {}
    for file in folder.rglob("shards/*.mdb"):
        shard, at = file.read_bytes(), 48
        while (name := shard[at : at + 32]) != b"\xff" * 32:
            flags, entries = struct.unpack_from("<II", shard, at + 32)
            at += 48 * (1 + entries * (1 + (flags >> 31)))
            hashes[xet_hex(shard[at : at + 32])] = xet_hex(name)
            at += 48 * (flags >> 30 & 1)
    return hashes


def xet_hex(name: bytes) -> str:
    return "".join(f"{part:016x}" for part in struct.unpack("<4Q", name))


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_any(self):
        url = urlsplit(self.path)
        request = f"{self.command} {url.path}"
        self.query = parse_qs(url.query)
        self.hub.requests.append(request)
        refusal = self.hub.refuse and self.hub.refuse(request)
        if refusal == "die":  # as when a server is switched off: half of the body is read, no response
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            self.connection.close()
            threading.Thread(target=self.hub.__exit__).start()
            return
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            if refusal:
                raise refusal
            for method, pattern, name in ROUTES:
                match = pattern.fullmatch(url.path)
                if match and method == ("GET" if self.command == "HEAD" else self.command):
                    arguments = {key: unquote(value) for key, value in match.groupdict().items() if value}
                    with self.hub._lock:
                        getattr(self, name)(**arguments)
                    return
            self.hub.unknown.append(request)
            raise Refused(404, "", f"Unknown request: {request}.")
        except Refused as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self.answer({"error": error.message}, error.status, {name: x for name, x in headers.items() if x})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def answer(self, content, status: int = 200, headers: dict | None = None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def user(self, write: bool = False) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        if write and not token:
            raise Refused(401, "", "Invalid username or password.")
        if write and token in self.hub.readers:
            raise Refused(403, "", "You have read access but not the required permissions for this operation")
        return self.hub.users.get(token)

    def repository(self, repo: str, write: bool = False) -> Repository:
        user, repository = self.user(write), self.hub.repositories.get(repo)
        if repository is None or (repository.private and user != repo.split("/")[0]):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user != repo.split("/")[0]:
            raise Refused(403, "", "You don't have the rights to write to this repository")
        return repository

    def commit_of(self, repo: str, revision: str) -> tuple[str, dict[str, Blob]]:
        repository = self.repository(repo)
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]

    def check_storage(self):
        if "Authorization" in self.headers or self.headers["Host"] != f"localhost:{self.hub.port}":
            raise Refused(400, "", "The storage is another host and must not receive a token")

    # Users and repositories ------------------------------------------------------------------------------------------

    @route("GET", "/api/agent-harnesses")
    def agents(self):  # requested by huggingface_hub once per cache
        self.answer({"standardEnvVars": [], "harnesses": {}})

    @route("GET", "/api/whoami-v2")
    def who_am_i(self):
        name = self.user()
        if name is None:
            raise Refused(401, "", "Invalid username or password.")
        token = self.headers["Authorization"].removeprefix("Bearer ")
        role = "read" if token in self.hub.readers else "write"
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        self.answer({"type": "user", "name": name, "orgs": [], "auth": access})

    @route("POST", "/api/repos/create")
    def create(self):
        user, body = self.user(write=True), json.loads(self.body)
        owner = body.get("organization") or user
        if owner != user:
            raise Refused(403, "", f"You don't have the rights to create a model under the namespace {owner}")
        repo = f"{owner}/{body['name']}"
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo}
        if repo in self.hub.repositories:
            answer["error"] = "You already created this model repo"
            return self.answer(answer, 409)
        private = body.get("visibility") == "private" or bool(body.get("private"))
        repository = Repository(private, body.get("sdk"))
        repository.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")}, "initial commit")
        self.hub.repositories[repo] = repository
        return self.answer(answer)

    @route("POST", f"/api/{KIND}/{REPO}/branch/{REVISION}")
    def create_branch(self, repo: str, revision: str):
        repository = self.repository(repo, write=True)
        if revision in repository.branches:
            raise Refused(409, "", "Reference already exists")
        repository.branches[revision] = repository.branches["main"]
        self.answer({})

    @route("GET", f"/api/{KIND}/{REPO}(/revision/{REVISION})?")
    def info(self, repo: str, revision: str | None = None):
        sha, files = self.commit_of(repo, revision or "main")
        repository = self.hub.repositories[repo]
        siblings = [{"rfilename": path} for path in files]
        self.answer({"id": repo, "sha": sha, "private": repository.private, "tags": [], "siblings": siblings})

    @route("GET", f"/api/{KIND}/{REPO}/tree/{REVISION}(/(?P<folder>.+))?")
    def tree(self, repo: str, revision: str, folder: str | None = None):
        _, files = self.commit_of(repo, revision)
        if folder:  # repositories here have no folders
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        rows = [{"type": "file", "path": path, "size": x.size, "oid": x.oid} for path, x in files.items()]
        self.answer(rows)

    # Uploads ---------------------------------------------------------------------------------------------------------

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        self.answer({"errors": [] if content.startswith("---\n") else [{"message": "no metadata"}], "warnings": []})

    @route("POST", f"/api/{KIND}/{REPO}/preupload/{REVISION}")
    def pre_upload(self, repo: str, revision: str):
        self.repository(repo, write=True)
        _, there = self.commit_of(repo, revision)
        files = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            oid = {"oid": there[path].sha256 or there[path].oid} if path in there else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        self.answer({"files": files})

    @route("POST", rf"/(?:spaces/)?{REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo: str):
        self.repository(repo, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            verify = {"href": f"{self.hub.url}/verify/{wanted['oid']}"}
            actions = {"upload": {"href": f"{self.hub.storage}/{wanted['oid']}"}, "verify": verify}
            objects.append(wanted if wanted["oid"] in self.hub.large else {**wanted, "actions": actions})
        self.answer({"transfer": "basic", "objects": objects})

    @route("PUT", "/large/(?P<sha256>[0-9a-f]{64})")
    def put_large(self, sha256: str):
        self.check_storage()
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise Refused(400, "", "The content does not match its hash")
        self.hub.large[sha256] = self.body
        self.answer(b"")

    @route("POST", "/verify/(?P<sha256>[0-9a-f]{64})")
    def verify_large(self, sha256: str):
        self.user(write=True)
        if json.loads(self.body) != {"oid": sha256, "size": len(self.hub.large.get(sha256, b""))}:
            raise Refused(400, "", "The file is not here")
        self.answer({})

    @route("GET", f"/api/{KIND}/{REPO}/xet-(?P<kind>read|write)-token/{REVISION}")
    def xet_token(self, repo: str, kind: str, revision: str):
        self.repository(repo, write=kind == "write")
        connection = {"casUrl": f"local://{self.hub.xet_folder}", "accessToken": "xet", "exp": int(time.time()) + 3600}
        headers = {"X-Xet-Cas-Url": connection["casUrl"], "X-Xet-Access-Token": "xet"}
        self.answer(connection, headers={**headers, "X-Xet-Token-Expiration": connection["exp"]})

    @route("POST", f"/api/{KIND}/{REPO}/commit/{REVISION}")
    def commit(self, repo: str, revision: str):
        repository = self.repository(repo, write=True)
        if revision not in repository.branches:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = dict(repository.commits[repository.branches[revision]])
        message = ""
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = Blob(content, size=len(content))
            elif key == "lfsFile":
                if value["oid"] not in (xet_hashes(self.hub.xet_folder) if self.hub.xet_folder else self.hub.large):
                    raise Refused(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = Blob(sha256=value["oid"], size=value["size"])
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, "", f"Unknown key in a commit: {key}")
        sha = repository.commit(revision, files, message)
        kind = "spaces/" if repository.sdk else ""
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{kind}{repo}/commit/{sha}"})

    # Downloads -------------------------------------------------------------------------------------------------------

    @route("GET", f"/(?:spaces/)?{REPO}/resolve/{REVISION}/(?P<path>.+)")
    def resolve(self, repo: str, revision: str, path: str):
        sha, files = self.commit_of(repo, revision)
        headers: dict = {"X-Repo-Commit": sha}
        if path not in files:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.answer({"error": "Entry not found"}, 404, headers)
        blob = files[path]
        if blob.content is not None:
            return self.answer(blob.content, headers={**headers, "ETag": f'"{blob.oid}"'})
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": blob.size}
        if self.hub.xet_folder:
            headers["X-Xet-Hash"] = xet_hashes(self.hub.xet_folder)[blob.sha256]
            headers["X-Xet-Refresh-Route"] = f"{self.hub.url}/api/models/{repo}/xet-read-token/{sha}"
        return self.answer(b"", 302, {**headers, "Location": f"{self.hub.storage}/{blob.sha256}"})

    @route("GET", "/large/(?P<sha256>[0-9a-f]{64})")
    def get_large(self, sha256: str):
        self.check_storage()
        if sha256 not in self.hub.large:
            raise Refused(404, "EntryNotFound", "Entry not found")
        self.answer(self.hub.large[sha256], headers={"ETag": f'"{sha256}"'})
