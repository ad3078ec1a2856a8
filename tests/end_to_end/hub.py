"""A stand-in for the Hugging Face hub's HTTP interface, as far as a model is uploaded to it; it keeps what it was given."""

import base64
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

GOOD, POOR = "hf_standinthatmaywrite0", "hf_standinthatmayread00"


@dataclass
class Hub:
    """What the stand-in knows: repositories with their files, of which large ones have a hash in place, and large objects."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    num_faults: int = 0  # answers of 503 still to give, to commits
    requests: list[str] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, value: object, status: int = 200, **headers: str) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, held in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), held)
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status: int, message: str, code: str = "") -> None:
        self.answer({"error": message}, status, X_Error_Message=message, **({"X_Error_Code": code} if code else {}))

    def find_token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        self.hub.requests.append(f"GET {path}")
        if self.find_token() not in (GOOD, POOR):
            self.refuse(401, "Invalid username or password.")
        elif path == "/api/whoami-v2":
            self.answer({"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}})
        elif path.startswith("/api/models/"):
            name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
            if name not in self.hub.repositories:
                self.refuse(404, "Repository not found", "RepoNotFound")
                return
            files = [{"type": "file", "path": file, "oid": "0", "size": 1} for file in self.hub.repositories[name]]
            siblings = [{"rfilename": file["path"]} for file in files]
            self.answer(files if "/tree/" in path else {
                "id": name, "modelId": name, "sha": "0", "siblings": siblings, "private": name in self.hub.private,
            })  # fmt: skip
        else:
            self.refuse(404, f"no such place: {path}")

    def do_PUT(self) -> None:
        self.hub.objects[self.path.rpartition("/")[2]] = self.read()
        self.answer({})

    def do_POST(self) -> None:
        path, body = urlparse(self.path).path, self.read()
        self.hub.requests.append(f"POST {path}")
        if self.find_token() != GOOD:
            self.refuse(403, "you may not write here")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name not in self.hub.repositories:  # one that is there stays as public as it is
                self.hub.private |= {name} if asked.get("private") or asked.get("visibility") == "private" else set()
            self.hub.repositories.setdefault(name, {".gitattributes": b""})
            self.answer({"url": f"{self.hub.url}/{name}"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [{"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                      "shouldIgnore": False} for file in json.loads(body)["files"]]  # fmt: skip
            self.answer({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [{"oid": held["oid"], "size": held["size"],
                        "actions": {"upload": {"href": f"{self.hub.url}/objects/{held['oid']}"}}}
                       for held in json.loads(body)["objects"]]  # fmt: skip
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self.commit("/".join(path.split("/")[3:5]), body)
        else:
            self.refuse(404, f"no such place: {path}")

    def commit(self, name: str, body: bytes) -> None:
        if self.hub.num_faults:
            self.hub.num_faults -= 1
            self.refuse(503, "overloaded")
            return
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.hub.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "lfsFile":
                self.hub.repositories[name][line["value"]["path"]] = line["value"]["oid"].encode()
            if line["key"] == "deletedFile":
                del self.hub.repositories[name][line["value"]["path"]]
        self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/0", "commitOid": "0", "success": True})


def start_hub() -> tuple[Hub, ThreadingHTTPServer]:
    """Start it on a free port of this machine; the caller shuts it down."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return hub, server
