"""A small stand-in for W&B's server on this machine, for tests: enough for `wandb sweep`, `wandb agent` and runs.

It answers the requests that the client was seen to make and forgets everything when it stops. Sweeps are grids; their
cells are handed out once each, and a run that reports itself as pre-empted is handed out again under its own id. The
files of artifacts are kept and handed back.
"""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import yaml

from sweeps.runner.expansion import grid

ENTITY, PROJECT = "local", "unirecon"
SILENCE = 30.0
"""Seconds after which a run that neither speaks nor has an agent that does counts as crashed (W&B's server: minutes)."""
KEY = "0123456789" * 4


@dataclass
class Run:
    """A run as the server sees it."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    agent: str | None = None
    state: str = "pending"
    starts: int = 0
    heard: float = field(default_factory=time.monotonic)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)
    group: str | None = None
    exit_code: int | None = None


@dataclass
class Artifact:
    """An artifact as the server sees it; `files` by name, the manifest among them."""

    name: str
    kind: str
    run: str
    committed: bool = False
    files: dict[str, bytes] = field(default_factory=dict)


class Server:
    """W&B on a free port of 127.0.0.1, in threads of this process. `environment` points a client at it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.sweeps: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, Run] = {}
        self.queue: dict[str, list[str]] = {}
        self.agents: dict[str, str] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        handler = type("Handler", (_Handler,), {"server_state": self})
        self._http = _Listener(("127.0.0.1", 0), handler)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make W&B's client talk to this server."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
            "WANDB_ENTITY": ENTITY,
            "WANDB_PROJECT": PROJECT,
            "WANDB_ERROR_REPORTING": "false",
        }

    def delete_crashed(self) -> int:
        """What a user does on the sweep's page: delete crashed runs, whereupon a grid's cells are handed out again."""
        with self.lock:
            crashed = [run for run in self.runs.values() if run.state == "crashed"]
            for run in crashed:
                del self.runs[run.name]
                again = Run(f"{run.name}x", run.args)
                self.runs[again.name] = again
                self.queue[run.name[: len("sweep000")]].append(again.name)
            return len(crashed)

    def describe(self) -> str:
        """What the server knows, for a test that failed."""
        runs = [f"{run.name}: {run.state}, {run.starts} starts, last with {run.agent}" for run in self.runs.values()]
        return "\n".join(["W&B's stand-in:", *runs, f"waiting: {self.queue}", f"last requests: {self.requests[-12:]}"])

    def stop(self) -> None:
        """Stop answering."""
        self._http.shutdown()
        self._http.server_close()

    # ---- GraphQL -----------------------------------------------------------------------------------------------------

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The `data` of a GraphQL request."""
        match = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = match[1] if match else "anonymous"
        self.requests.append(name)
        method = getattr(self, f"_on_{name}", None)
        if method is None:
            self.unknown.append(f"{name}: {query}")
            return {}
        with self.lock:
            return method(variables)

    def _on_Viewer(self, variables: dict[str, Any]) -> dict[str, Any]:
        teams = {"edges": [{"node": {"id": "T", "name": ENTITY}}]}
        return {
            "viewer": {
                "id": "V", "flags": "{}", "entity": ENTITY, "username": ENTITY, "email": "", "admin": False,
                "teams": teams,
            }
        }  # fmt: skip

    def _on_UpsertSweep(self, variables: dict[str, Any]) -> dict[str, Any]:
        sweep = f"sweep{len(self.sweeps):03d}"
        config = yaml.safe_load(variables["config"])
        self.sweeps[sweep] = config
        self.queue[sweep] = []
        for number, cell in enumerate(grid(config["parameters"], Path("loopback"))):
            run = f"{sweep}r{number:03d}"
            self.runs[run] = Run(run, {key: {"value": value} for key, value in cell.parameters.items()})
            self.queue[sweep].append(run)
        return {"upsertSweep": {"sweep": {"name": sweep, "project": _project()}, "configValidationWarnings": []}}

    def _on_SweepWithRuns(self, variables: dict[str, Any]) -> dict[str, Any]:
        sweep = variables["sweep"]
        if sweep not in self.sweeps:
            return {"project": {"sweep": None}}
        node = {
            "id": sweep, "name": sweep, "method": "grid", "state": "RUNNING", "description": "",
            "config": yaml.safe_dump(self.sweeps[sweep]), "createdAt": "2026-01-01T00:00:00", "heartbeatAt": None,
            "updatedAt": None, "earlyStopJobRunning": False, "bestLoss": None, "controller": None, "scheduler": None,
            "runs": {"edges": []},
        }  # fmt: skip
        return {"project": {"sweep": node}}

    def _on_CreateAgent(self, variables: dict[str, Any]) -> dict[str, Any]:
        agent = f"agent{len(self.agents)}"
        self.agents[agent] = variables["sweep"]
        return {"createAgent": {"agent": {"id": agent}}}

    def _on_Heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:
        agent = variables["id"]
        sweep = self.agents[agent]
        busy = json.loads(variables["runState"])
        commands: list[dict[str, Any]] = []
        for run in self._of(sweep):
            silent = time.monotonic() - run.heard > SILENCE
            if run.name in busy:
                run.heard = time.monotonic()
            elif run.state == "running" and (run.agent == agent or silent):
                run.state = "crashed"
            elif run.state == "preempting" and silent:
                self._requeue(run)
        if not busy:
            if self.queue[sweep]:
                name = self.queue[sweep].pop(0)
                run = self.runs[name]
                kind = "resume" if run.starts else "run"
                run.agent, run.state, run.starts = agent, "running", run.starts + 1
                run.heard = time.monotonic()
                commands = [{"type": kind, "run_id": name, "args": run.args, "program": None, "run_storage_id": name}]
            elif all(run.state not in ("running", "preempting") for run in self._of(sweep)):
                commands = [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": agent}, "commands": json.dumps(commands)}}

    def _requeue(self, run: Run) -> None:
        run.state = "preempted"
        self.queue[run.name[: len("sweep000")]].insert(0, run.name)

    def _of(self, sweep: str) -> list[Run]:
        return [run for run in self.runs.values() if run.name.startswith(sweep)]

    def _on_UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = str(variables.get("name") or variables.get("id"))
        new = name not in self.runs
        run = self.runs.setdefault(name, Run(name))
        if variables.get("config"):
            run.config.update(json.loads(variables["config"]))
        if variables.get("summaryMetrics"):
            run.summary.update(json.loads(variables["summaryMetrics"]))
        if variables.get("state") == "preempting":
            run.state = "preempting"
        run.group = variables.get("groupName") or run.group
        bucket = {
            "id": name, "name": name, "displayName": variables.get("displayName") or name, "description": "",
            "config": json.dumps(run.config), "sweepName": variables.get("sweep"), "project": _project(),
            "historyLineCount": len(run.history),
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def _on_RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        if run is None or not run.config:
            return {"model": {"id": PROJECT, "name": PROJECT, "bucket": None}}
        bucket = {
            "id": run.name, "name": run.name, "summaryMetrics": json.dumps(run.summary), "displayName": run.name,
            "logLineCount": 0, "historyLineCount": len(run.history), "eventsLineCount": 0,
            "historyTail": json.dumps(run.history[-1:]), "eventsTail": "[]", "config": json.dumps(run.config),
            "tags": [], "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip
        return {"model": {"id": PROJECT, "name": PROJECT, "bucket": bucket}}

    def _on_ServerFeaturesQuery(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _on_OrganizationCoreWeaveOrganizationID(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def _on_CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    # ---- what a reader asks for --------------------------------------------------------------------------------------

    def _on_GetSweep(self, variables: dict[str, Any]) -> dict[str, Any]:
        known = variables["name"] in self.sweeps
        node = {"id": variables["name"], "name": variables["name"], "config": "", "state": "RUNNING"}
        return {"project": {"sweep": node if known else None}}

    _on_GetSweepLegacy = _on_GetSweep

    def _on_Runs(self, variables: dict[str, Any]) -> dict[str, Any]:
        (sweep,) = [part["sweep"] for part in json.loads(variables["filters"])["$and"]]
        edges = [
            {"node": {"id": run.name, "name": run.name, "state": run.state, "projectId": "1"}, "cursor": run.name}
            for run in self._of(sweep)
        ]
        page = {"endCursor": None, "hasNextPage": False}
        return {"project": {"internalId": "1", "runCount": len(edges), "runs": {"edges": edges, "pageInfo": page}}}

    # ---- artifacts ---------------------------------------------------------------------------------------------------

    def _on_ArtifactType(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _on_FetchArtifactDigestAlgorithm(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifactType": None}}

    def _on_CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        given = variables["input"]
        artifact = f"artifact{len(self.artifacts)}"
        name = given.get("artifactCollectionName") or given["artifactCollectionNames"][0]
        self.artifacts[artifact] = Artifact(name, given["artifactTypeName"], given["runName"])
        node = {"id": artifact, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": node}}

    def _on_CreateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        artifact = variables["artifactID"]
        file = {"id": "M", "uploadUrl": self._at(artifact, variables["name"]), "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": artifact, "file": file}}}

    def _on_UpdateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        artifact = variables["artifactManifestID"]
        file = {"id": "M", "uploadUrl": self._at(artifact, "wandb_manifest.json"), "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": artifact, "file": file}}}

    def _on_CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        edges: list[dict[str, Any]] = [
            {
                "node": {
                    "storagePath": f"{file['artifactID']}/{file['name']}",
                    "uploadUrl": self._at(file["artifactID"], file["name"]),
                    "uploadHeaders": [],
                    "uploadMultipartUrls": None,
                    "artifact": {"id": file["artifactID"]},
                }
            }
            for file in variables["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _on_CommitArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        artifact = variables["artifactID"]
        self.artifacts[artifact].committed = True
        return {"commitArtifact": {"artifact": {"id": artifact, "digest": "D"}}}

    def _on_RunOutputArtifacts(self, variables: dict[str, Any]) -> dict[str, Any]:
        edges = [
            {"node": self._artifact(identity)}
            for identity, artifact in self.artifacts.items()
            if artifact.run == variables["run"] and artifact.committed
        ]
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        artifacts = {"totalCount": len(edges), "pageInfo": page, "edges": edges}
        return {"project": {"run": {"artifacts": artifacts}}}

    def _artifact(self, identity: str) -> dict[str, Any]:
        artifact = self.artifacts[identity]
        collection = {"__typename": "ArtifactSequence", "name": artifact.name, "project": _project()}
        return {
            "__typename": "Artifact", "id": identity, "artifactSequence": collection, "versionIndex": 0,
            "artifactType": {"name": artifact.kind}, "description": None, "metadata": None, "ttlDurationSeconds": -1,
            "ttlIsInherited": True, "tags": [], "historyStep": None, "state": "COMMITTED", "digest": "D",
            "size": sum(map(len, artifact.files.values())), "commitHash": None, "fileCount": len(artifact.files),
            "createdAt": "2026-01-01T00:00:00", "updatedAt": None, "aliases": [],
        }  # fmt: skip

    def _on_FetchArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        url = self._at(variables["id"], "wandb_manifest.json")
        return {"artifact": {"currentManifest": {"file": {"directUrl": url}}}}

    _on_ArtifactManifest = _on_FetchArtifactManifest

    def _on_GetArtifactMembershipFileUrls(self, variables: dict[str, Any]) -> dict[str, Any]:
        (identity,) = [key for key, artifact in self.artifacts.items() if artifact.name == variables["collection"]]
        edges = [
            {"node": {"__typename": "File", "name": name, "directUrl": self._at(identity, name)}}
            for name in self.artifacts[identity].files
            if name != "wandb_manifest.json"
        ]
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        files = {"pageInfo": page, "edges": edges}
        collection = {"__typename": "ArtifactSequence", "artifactMembership": {"files": files}}
        return {"project": {"artifactCollection": collection}}

    def _at(self, artifact: str, name: str) -> str:
        return f"{self.url}/artifacts/{artifact}/{quote(name)}"

    # ---- files -------------------------------------------------------------------------------------------------------

    def upload(self, path: str, body: bytes) -> None:
        """Keep a file of an artifact; others are dropped."""
        parts = unquote(path).split("/", 3)
        if len(parts) == 4 and parts[1] == "artifacts":
            self.artifacts[parts[2]].files[parts[3]] = body

    def download(self, path: str) -> bytes | None:
        """A file of an artifact, or None."""
        parts = unquote(path.partition("?")[0]).split("/", 3)
        if len(parts) == 4 and parts[1] == "artifacts":
            return self.artifacts[parts[2]].files.get(parts[3])
        return None

    def stream(self, run_name: str, content: dict[str, Any]) -> dict[str, Any]:
        """A part of a run's history, summary and end."""
        with self.lock:
            run = self.runs.setdefault(run_name, Run(run_name))
            run.heard = time.monotonic()
            for name, part in (content.get("files") or {}).items():
                if name == "wandb-history.jsonl":
                    offset = part.get("offset", len(run.history))
                    run.history[offset:] = part["content"]
                elif name == "wandb-summary.json" and part["content"]:
                    run.summary.update(json.loads(part["content"][-1]))
            if content.get("preempting"):
                run.state = "preempting"
            if content.get("complete") is not None and content.get("exitcode") is not None:
                run.exit_code = content["exitcode"]
                if run.state == "preempting" and run.exit_code != 0:
                    self._requeue(run)
                else:
                    run.state = "finished" if run.exit_code == 0 else "failed"
        return {}


def _project() -> dict[str, Any]:
    entity = {"id": "E", "name": ENTITY}
    return {"id": "P", "internalId": base64.b64encode(b"Project:v1:1").decode(), "name": PROJECT, "entity": entity}


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client may hang up; nothing is printed."""


class _Handler(BaseHTTPRequestHandler):
    server_state: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            import gzip

            body = gzip.decompress(body)
        return body

    def _reply(self, content: Any, status: int = 200) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body, state = self._body(), self.server_state
        if self.path.startswith("/graphql"):
            request = json.loads(body)
            self._reply({"data": state.answer(request["query"], request.get("variables") or {})})
        elif match := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            state.requests.append("file_stream")
            self._reply(state.stream(match[1], json.loads(body)))
        else:
            state.requests.append(self.path)
            self._reply({})

    def do_PUT(self) -> None:
        self.server_state.upload(self.path, self._body())
        self.server_state.requests.append("PUT")
        self._reply({})

    def do_GET(self) -> None:
        self.server_state.requests.append(f"GET {self.path}")
        content = self.server_state.download(self.path)
        self._reply({} if content is None else content)
