"""A stand-in of the hub's HTTP API on the loopback: private repositories with branches, whole files in commits."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Repository -> branch -> path -> bytes, and every request that came."""

    def __init__(self, token):
        self.token, self.repositories, self.requests = token, {}, []

    def sha(self, repository, revision):
        """The commit that a branch stands for, made of its content."""
        branches = self.repositories[repository]
        shas = {name: self._sha_of(files) for name, files in branches.items()}
        return shas.get(revision, revision if revision in shas.values() else None)

    def files(self, repository, revision):
        sha = self.sha(repository, revision)
        branches = self.repositories[repository].values()
        return next(files for files in branches if self._sha_of(files) == sha)

    @staticmethod
    def _sha_of(files):
        content = {path: hashlib.sha1(data).hexdigest() for path, data in files.items()}
        return hashlib.sha1(json.dumps(content, sort_keys=True).encode()).hexdigest()


def handler_of(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words):
            pass

        def answer(self, content=b"", status=200, **headers):
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": len(data), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def refused(self):
            length = int(self.headers.get("Content-Length", 0))
            self.body = self.rfile.read(length)
            hub.requests.append((self.command, self.path))
            if self.headers.get("Authorization") == f"Bearer {hub.token}":
                return False
            self.answer({"error": "Repository not found"}, 401, X_Error_Code="RepoNotFound")
            return True

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            if self.refused():
                return
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            if parts[:2] == ["api", "models"]:
                repository, what, revision = "/".join(parts[2:4]), *parts[4:6]
            else:
                repository, what, revision = "/".join(parts[:2]), *parts[2:4]
            if repository not in hub.repositories or not hub.sha(repository, revision):
                self.answer({"error": "no revision"}, 404, X_Error_Code="RevisionNotFound")
                return
            sha, files = hub.sha(repository, revision), hub.files(repository, revision)
            if what == "revision":
                self.answer({"id": repository, "modelId": repository, "sha": sha, "siblings": []})
            elif what == "tree":
                self.answer(
                    [
                        {"type": "file", "path": path, "size": len(data), "oid": etag(data)}
                        for path, data in files.items()
                    ]
                )
            else:
                data = files["/".join(parts[4:])]
                self.answer(data, ETag=f'"{etag(data)}"', X_Repo_Commit=sha)

        def do_POST(self):
            if self.refused():
                return
            if self.path == "/api/repos/create":
                asked = json.loads(self.body)
                name = (
                    f"{asked['organization']}/{asked['name']}"
                    if asked.get("organization")
                    else asked["name"]
                )
                status = 409 if name in hub.repositories else 200
                hub.repositories.setdefault(name, {"main": {}})
                self.answer(
                    {"url": f"http://{self.headers['Host']}/{name}", "name": name, "id": name},
                    status,
                )
            elif self.path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif "/branch/" in self.path:
                repository, branch = self.path.split("/api/models/")[1].split("/branch/")
                hub.repositories[repository].setdefault(branch, {})
                self.answer({})
            elif "/preupload/" in self.path:
                files = json.loads(self.body)["files"]
                told = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in files
                ]
                self.answer({"files": told})
            else:
                self.commit()

        def commit(self):
            repository, branch = self.path.split("/api/models/")[1].split("/commit/")
            files = dict(hub.repositories[repository][branch])
            for line in self.body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            hub.repositories[repository][branch] = files
            sha = hub.sha(repository, branch)
            self.answer(
                {
                    "commitUrl": f"http://{self.headers['Host']}/{repository}/commit/{sha}",
                    "commitOid": sha,
                    "success": True,
                }
            )

    return Handler


def etag(data):
    return hashlib.sha1(data).hexdigest()


@contextmanager
def served(token):
    """A hub on a free port of the loopback, and its address."""
    hub = Hub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
