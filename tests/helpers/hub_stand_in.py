"""A stand-in of the Hub's API on this machine: as much of it as an upload needs."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_" + "x" * 34


class Hub(ThreadingHTTPServer):
    """Keeps repositories by name: {file: bytes}, and every request that came."""

    def __init__(self, may_write=True, accepts_card=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.private, self.objects, self.requests = {}, {}, {}, []
        self.may_write, self.accepts_card = may_write, accepts_card
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, value, status=200, headers=()):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, text in headers:
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _known(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_GET(self):
        self.server.requests.append(("GET", self.path))
        if self.path.startswith("/api/whoami-v2"):
            if self._known():
                return self._answer({"name": "me", "type": "user", "orgs": []})
            return self._answer({"error": "Invalid username or password."}, 401)
        return self._answer({"error": "not here"}, 404)

    do_HEAD = do_GET

    def do_PUT(self):
        self.server.requests.append(("PUT", self.path))
        self.server.objects[self.path.rsplit("/", 1)[1]] = self._body()
        self._answer({})

    def do_POST(self):
        hub, body = self.server, self._body()
        hub.requests.append(("POST", self.path))
        if self.path == "/api/validate-yaml":
            assert json.loads(body)["repoType"] == "model"
            if hub.accepts_card:
                return self._answer({"errors": [], "warnings": []})
            return self._answer(b'"license" must be one of [...]', 400)
        if not (self._known() and hub.may_write):
            return self._answer({"error": "You don't have the rights"}, 403)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            hub.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
            if name in hub.repositories:
                return self._answer({"error": "exists", "url": f"{hub.url}/{name}"}, 409)
            hub.repositories[name] = {}
            return self._answer({"url": f"{hub.url}/{name}"})
        if "/preupload/" in self.path:
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs"
                    if f["path"].endswith((".safetensors", ".gguf"))
                    else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for f in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = []
            for one in json.loads(body)["objects"]:
                actions = {"upload": {"href": f"{hub.url}/upload/{one['oid']}"}}
                there = {"actions": actions} if one["oid"] not in hub.objects else {}
                objects.append({"oid": one["oid"], "size": one["size"], **there})
            return self._answer({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            return self._commit(body)
        return self._answer({"error": self.path}, 404)

    def _commit(self, body):
        hub = self.server
        name = "/".join(self.path.split("/")[3:5])
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                data = hub.objects[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                hub.repositories[name][value["path"]] = data
        url = f"{hub.url}/{name}/commit/abc"
        self._answer({"commitUrl": url, "commitOid": "abc", "pullRequestUrl": None})
