"""What the W&B server of these tests was sent, and its answers to the GraphQL operations that wandb asks of it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

ENTITY = "me"
VIEWER = {"id": "1", "username": ENTITY, "entity": ENTITY, "email": "", "flags": "{}", "teams": {"edges": []}}
MANIFEST = "wandb_manifest.json"
CREATED = "2026-01-01T00:00:00Z"


@dataclass
class SentArtifact:
    """An artifact as it arrived: the contents of its files by their names in it."""

    id: str
    name: str
    type: str
    run: str
    digest: str
    metadata: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False


@dataclass
class SentRun:
    """A run as it arrived."""

    id: str
    bucket: dict[str, Any] = field(default_factory=dict)
    """The last value of everything that an upsert said about it."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None

    def column(self, key: str) -> list[Any]:
        """The values of every row that has the key."""
        return [row[key] for row in self.rows if key in row]


class Received:
    """What the server was sent, run by run; what it hands an agent."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.url = ""
        self.runs: dict[str, SentRun] = {}
        self.artifacts: dict[str, SentArtifact] = {}
        self.reports: list[dict[str, Any]] = []
        self.projects: set[str] = set()
        self.sweep = ""
        self.arguments: list[dict[str, Any]] = []
        """The parameters of the runs that an agent is still to be given, one run at a time."""

    @property
    def run(self) -> SentRun:
        """The only run."""
        (run,) = self.runs.values()
        return run

    def artifacts_of(self, run: SentRun) -> list[SentArtifact]:
        """The finished artifacts that a run logged."""
        return [one for one in self.artifacts.values() if one.run == run.id and one.committed]

    # What arrives beside GraphQL

    def stream(self, run: str, content: dict[str, Any]) -> None:
        """Takes a message of a run's file stream."""
        files, sent = content.get("files", {}), self.runs[run]
        sent.rows += [json.loads(line) for line in files.get("wandb-history.jsonl", {}).get("content", [])]
        for line in files.get("wandb-summary.json", {}).get("content", []):
            sent.summary = json.loads(line)
        if content.get("complete"):
            sent.exit_code = content.get("exitcode")

    def put(self, path: str, body: bytes) -> None:
        """Takes a file: ``run/<id>/<name>`` or ``artifact/<id>/<name>``."""
        kind, owner, name = path.split("/", maxsplit=2)
        (self.runs if kind == "run" else self.artifacts)[owner].files[name] = body

    def get(self, path: str) -> bytes | None:
        """Gives one back."""
        kind, owner, name = path.split("/", maxsplit=2)
        found = (self.runs if kind == "run" else self.artifacts).get(owner)
        return None if found is None else found.files.get(name)

    # GraphQL

    def answer(self, text: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answers the operation whose field stands in the text; one that is not known gets nothing."""
        method = next((answer for known, answer in ANSWERS.items() if known in text), None)
        return method(self, variables) if method else {}

    def _upsert_run(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.setdefault(variables["name"], SentRun(variables["name"]))
        inserted = not run.bucket
        run.bucket |= {key: value for key, value in variables.items() if value is not None}
        run.bucket["project"] = project = run.bucket.get("project") or "uncategorized"
        self.projects.add(project)
        config = json.loads(variables.get("config") or "{}")
        run.config |= {key: one["value"] for key, one in config.items()}
        bucket = {
            "id": run.id,
            "name": run.id,
            "displayName": run.bucket.get("displayName") or run.id,
            "config": "{}",
            "historyLineCount": 0,
            "sweepName": None,
            "project": {"id": "1", "name": project, "entity": {"id": "1", "name": ENTITY}},
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _run_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = variables["run"]
        files = [{"name": name, "uploadUrl": self._upload("run", run, name)} for name in variables["files"]]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}

    def _upload(self, kind: str, owner: str, name: str) -> str:
        return f"{self.url}/upload/{kind}/{owner}/{quote(name)}"

    def _alert(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.runs[variables["runName"]].alerts.append(variables)
        return {"notifyScriptableRunAlert": {"success": True}}

    # Artifacts: made, then their manifest, then their files, then committed

    def _artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        given = variables["input"]
        sent = SentArtifact(
            f"artifact{len(self.artifacts)}",
            given["artifactCollectionName"],
            given["artifactTypeName"],
            given["runName"],
            given["digest"],
            json.loads(given.get("metadata") or "{}"),
        )
        self.artifacts[sent.id] = sent
        made = {"id": sent.id, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": made}}

    def _manifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        owner = variables.get("artifactID") or variables["artifactManifestID"]
        file = {"id": "1", "uploadUrl": self._upload("artifact", owner, MANIFEST), "uploadHeaders": []}
        made = {"artifactManifest": {"id": owner, "file": file}}
        return {"createArtifactManifest": made, "updateArtifactManifest": made}

    def _artifact_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [
            {
                "storagePath": None,
                "uploadUrl": self._upload("artifact", one["artifactID"], one["name"]),
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": one["artifactID"]},
            }
            for one in variables["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": connection(files)}}

    def _commit(self, variables: dict[str, Any]) -> dict[str, Any]:
        sent = self.artifacts[variables["artifactID"]]
        sent.committed = True
        return {"commitArtifact": {"artifact": {"id": sent.id, "digest": sent.digest}}}

    def _artifacts_of_run(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[variables["run"]]
        project = {
            "id": "1",
            "internalId": "1",
            "name": variables["project"],
            "entity": {"name": variables["entity"]},
        }
        found = self.artifacts_of(run)
        nodes = [
            {
                "__typename": "Artifact",
                "id": one.id,
                "artifactSequence": {"__typename": "ArtifactSequence", "name": one.name, "project": project},
                "versionIndex": place,
                "artifactType": {"name": one.type},
                "description": None,
                "metadata": json.dumps(one.metadata),
                "ttlDurationSeconds": -1,
                "ttlIsInherited": False,
                "tags": [],
                "historyStep": None,
                "state": "COMMITTED",
                "size": 1,
                "digest": one.digest,
                "digestAlgorithm": None,
                "commitHash": None,
                "fileCount": len(one.files) - 1,
                "createdAt": CREATED,
                "updatedAt": None,
                "aliases": [],
            }
            for place, one in enumerate(found)
        ]
        return {"project": {"run": {"artifacts": {"totalCount": len(nodes), **connection(nodes)}}}}

    def _manifest_of(self, variables: dict[str, Any]) -> dict[str, Any]:
        where = self._upload("artifact", variables.get("id") or variables["artifact_id"], MANIFEST)
        return {"artifact": {"currentManifest": {"file": {"directUrl": where}}}}

    def _artifact_urls(self, variables: dict[str, Any]) -> dict[str, Any]:
        (sent,) = (one for one in self.artifacts.values() if one.name == variables["collection"])
        files = [
            {"__typename": "File", "name": name, "directUrl": self._upload("artifact", sent.id, name)}
            for name in sent.files
            if name != MANIFEST
        ]
        found = {"files": connection(files)}
        return {
            "project": {"artifactCollection": {"__typename": "ArtifactSequence", "artifactMembership": found}},
        }

    # W&B's public API and Reports

    def _runs(self, variables: dict[str, Any]) -> dict[str, Any]:
        if variables["project"] not in self.projects:
            return {"project": None}
        wanted = json.loads(variables.get("filters") or "{}")
        assert wanted.keys() <= {"group"}, wanted  # a filter that is not understood must not select everything
        group = wanted.get("group")
        nodes = [
            {
                "id": run.id,
                "name": run.id,
                "projectId": "1",
                "displayName": run.bucket.get("displayName"),
                "state": "finished",
                "group": run.bucket.get("groupName"),
                "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
                "summaryMetrics": json.dumps(run.summary),
                "tags": [],
                "sweepName": None,
                "createdAt": CREATED,
                "user": {"name": ENTITY, "username": ENTITY},
            }
            for run in self.runs.values()
            if run.bucket["project"] == variables["project"] and (group is None or run.bucket.get("groupName") == group)
        ]
        found = {"internalId": "1", "runCount": len(nodes), "readOnly": False, "runs": connection(nodes)}
        return {"project": found}

    def _projects(self, variables: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {
                "__typename": "Project",
                "id": name,
                "name": name,
                "entityName": variables["entity"],
                "createdAt": CREATED,
                "isBenchmark": False,
                "internalId": name,
                "user": None,
            }
            for name in sorted(self.projects)
        ]
        return {"models": connection(nodes)}

    def _new_project(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.projects.add(variables["name"])
        return {"upsertModel": {"model": {"id": "1", "name": variables["name"]}, "inserted": True}}

    def _project_id(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["projectName"]
        return {"project": {"id": name, "internalId": name} if name in self.projects else None}

    def _report(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.reports.append({**variables, "spec": json.loads(variables["spec"])})
        project = {"id": "1", "name": variables["projectName"], "entityName": variables["entityName"]}
        view = {
            "id": f"report{len(self.reports)}",
            "type": variables["type"],
            "name": variables["name"],
            "displayName": variables["displayName"],
            "description": variables.get("description"),
            "project": project,
            "spec": variables["spec"],
            "updatedAt": CREATED,
        }
        return {"upsertView": {"view": view, "inserted": True}}

    # A sweep and its agent

    def _agent_heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:
        commands = json.dumps(self._commands(json.loads(variables["runState"])))
        return {"agentHeartbeat": {"agent": {"id": "agent1"}, "commands": commands}}

    def _commands(self, running: dict[str, bool]) -> list[dict[str, Any]]:
        """What an agent is to do next: nothing while a run is under way, then another run, in the end nothing more."""
        if running:
            return []
        if not self.arguments:
            return [{"type": "exit"}]
        values = self.arguments.pop(0)
        program = re.search(r"(?m)^program: (.*)$", self.sweep)
        assert program is not None
        arguments = {key: {"value": value} for key, value in values.items()}
        return [{"type": "run", "run_id": f"run{len(self.arguments)}", "program": program[1], "args": arguments}]

    def _new_sweep(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.sweep = variables["config"]
        project = {"id": "1", "name": "project", "entity": {"id": "1", "name": ENTITY}}
        return {"upsertSweep": {"sweep": {"name": "sweep1", "project": project}}}

    def _get_sweep(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"sweep": {"name": "sweep1", "config": self.sweep, "runs": {"edges": []}}}}


def connection(nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """One page that holds everything, as GraphQL writes it."""
    edges = [{"node": node, "cursor": str(place)} for place, node in enumerate(nodes)]
    return {"edges": edges, "pageInfo": {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}}


ANSWERS: dict[str, Callable[[Received, dict[str, Any]], dict[str, Any]]] = {
    "upsertBucket(": Received._upsert_run,
    "createRunFiles(": Received._run_files,
    "notifyScriptableRunAlert(": Received._alert,
    "createArtifact(": Received._artifact,
    "createArtifactManifest(": Received._manifest,
    "updateArtifactManifest(": Received._manifest,
    "createArtifactFiles(": Received._artifact_files,
    "commitArtifact(": Received._commit,
    "outputArtifacts(": Received._artifacts_of_run,
    "currentManifest": Received._manifest_of,
    "artifactMembership(": Received._artifact_urls,
    "artifactType {": lambda *_: {"project": {"artifact": None}},
    "runs(filters:": Received._runs,
    "upsertModel(": Received._new_project,
    "upsertView(": Received._report,
    "models(": Received._projects,
    "query ProjectInternalId": Received._project_id,
    "upsertSweep(": Received._new_sweep,
    "sweep(sweepName": Received._get_sweep,
    "createAgent(": lambda *_: {"createAgent": {"agent": {"id": "agent1"}}},
    "agentHeartbeat(": Received._agent_heartbeat,
    "viewer": lambda *_: {"viewer": VIEWER},
}
"""What an operation is recognised by, and who answers it."""
