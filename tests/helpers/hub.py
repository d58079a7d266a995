"""A Hugging Face Hub on the loopback address: as much of its HTTP interface as `huggingface_hub` needs to read a model
repository at a revision, to make one, and to commit to it, by git LFS too.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

OWNER, STRANGER = "hf_owner", "hf_stranger"  # tokens


@dataclass
class Repository:
    """Commits, oldest first: a hash and the files by name."""

    private: bool = False
    gated: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files, remove=()):
        """Add or replace files; returns the hash."""
        now = {**(self.commits[-1][1] if self.commits else {}), **files}
        now = {name: data for name, data in now.items() if name not in remove}
        text = repr((len(self.commits), sorted((name, hashlib.sha256(data).hexdigest()) for name, data in now.items())))
        self.commits.append((hashlib.sha1(text.encode()).hexdigest(), now))
        return self.commits[-1][0]

    def at(self, revision):
        """Hash and files of a branch, tag or commit; None: there is no such revision."""
        wanted = self.commits[-1][0] if revision == "main" else self.tags.get(revision, revision)
        return next((found for found in self.commits if found[0] == wanted), None)

    @property
    def files(self):
        return self.commits[-1][1]


class Hub:
    """What the server knows. `status` answers every request with an error instead; `bodies` are sent in place of a
    file's contents, under the headers of the true ones; `before_commit` is called with the repository."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.status = 0
        self.bodies: dict[str, bytes] = {}
        self.before_commit = None
        self.url = ""

    def add(self, name, files, **settings):
        self.repositories[name] = Repository(**settings)
        self.repositories[name].commit(files)
        return self.repositories[name]


class Handler(BaseHTTPRequestHandler):
    """One request. Paths are those of huggingface.co."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self):
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_):
        pass

    def _serve(self):
        path, hub = unquote(urlsplit(self.path).path), self.hub
        hub.asked.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        if hub.status:
            return self._say(hub.status, {"error": "as the test wants it"})
        for pattern, answer in ROUTES.items():
            if found := re.fullmatch(pattern, path):
                return answer(self, **found.groupdict())
        return self._say(404, {"error": "no such page"})

    def _chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _say(self, status, value, headers=()):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status, code):
        self._say(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def _token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _repository(self, name):
        """The repository, where who asks may see it; else the refusal is sent."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self._token() != OWNER):
            return self._refuse(404 if self._token() else 401, "RepoNotFound")
        if found.gated and self._token() != OWNER:
            return self._refuse(403, "GatedRepo")
        return found

    def _may_write(self):
        if self._token() == OWNER:
            return True
        self._say(403 if self._token() else 401, {"error": "you may not write here"})
        return False

    def info(self, name, revision="main"):
        if (repository := self._repository(name)) is not None:
            if (found := repository.at(revision or "main")) is None:
                return self._refuse(404, "RevisionNotFound")
            listed = [{"rfilename": file} for file in found[1]]
            private = repository.private
            self._say(200, {"id": name, "sha": found[0], "private": private, "siblings": listed, "tags": []})

    def file(self, name, revision, file):
        if (repository := self._repository(name)) is not None:
            if (found := repository.at(revision)) is None:
                return self._refuse(404, "RevisionNotFound")
            if file not in found[1]:
                return self._refuse(404, "EntryNotFound")
            true = found[1][file]
            headers = {"ETag": f'"{hashlib.sha256(true).hexdigest()}"', "X-Repo-Commit": found[0]}
            self._say(200, self.hub.bodies.get(file, true), headers)

    def make(self):
        if self._may_write():
            asked = json.loads(self.body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.hub.repositories:
                return self._say(409, {"error": "You already created this model repo"})
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
            self._say(200, {"url": f"{self.hub.url}/{name}"})

    def modes(self, name):
        if self._may_write():
            there = self.hub.repositories[name].files
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(file["path"], there[file["path"]]) if file["path"] in there else None,
                }
                for file in json.loads(self.body)["files"]
            ]
            self._say(200, {"files": files})

    def lfs(self, name):
        asked = json.loads(self.body)["objects"]
        url = f"{self.hub.url}/lfs/{name}/"
        objects = [{**one, "actions": {"upload": {"href": url + one["oid"]}}} for one in asked]
        self._say(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._say(422, {"error": "another content"})
        self.hub.uploads[oid] = self.body
        self._say(200, {})

    def commit(self, name):
        if self._may_write():
            repository, files = self.hub.repositories[name], {}
            if self.hub.before_commit:
                self.hub.before_commit(repository)
            header, *lines = [json.loads(line) for line in self.body.splitlines()]
            if header["value"].get("parentCommit") not in (None, repository.commits[-1][0]):
                return self._say(412, {"error": "A commit has happened since. Please refresh and try again."})
            for line in lines:
                value = line["value"]
                large = line["key"] == "lfsFile"
                files[value["path"]] = self.hub.uploads[value["oid"]] if large else base64.b64decode(value["content"])
            commit = repository.commit(files)
            url = f"{self.hub.url}/{name}/commit/{commit}"
            self._say(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def yaml(self):
        errors = [{"message": '"license" must be one of a list'}] if b"license: no-such" in self.body else []
        self._say(400 if errors else 200, {"errors": errors, "warnings": []})


def _oid(path, data):
    if path.endswith(".safetensors"):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


NAME = r"(?P<name>[^/]+/[^/]+)"
ROUTES = {
    rf"/api/models/{NAME}": Handler.info,
    rf"/api/models/{NAME}/revision/(?P<revision>.+)": Handler.info,
    rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)": Handler.file,
    "/api/repos/create": Handler.make,
    rf"/api/models/{NAME}/preupload/main": Handler.modes,
    rf"/{NAME}\.git/info/lfs/objects/batch": Handler.lfs,
    r"/lfs/[^/]+/[^/]+/(?P<oid>\w+)": Handler.upload,
    rf"/api/models/{NAME}/commit/main": Handler.commit,
    "/api/validate-yaml": Handler.yaml,
}


@contextmanager
def running():
    """A hub and its server."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(hub, monkeypatch, cache, token=OWNER):
    """Let the client of this process talk to a hub, keep its cache in a folder, and be somebody. What it read from the
    environment when it was imported is changed where it keeps it.
    """
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)
