"""The files that operators start from: each passes its own tool, names what there is, and agrees with its kin."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose
from pydantic import BaseModel, ConfigDict, ValidationError

from splitserve.cluster.topology import Topology
from splitserve.cluster.topology_file import load_topology_file
from splitserve.deploy.cli import make_parser
from splitserve.deploy.plan import make_plan
from splitserve.deploy.preflight import check_runnable
from splitserve.models.resolve import load_model_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RAY_FILES = [DEPLOY / "ray/aws.yaml", DEPLOY / "ray/on-premise.yaml"]
DOCKERFILE = DEPLOY / "container/Dockerfile"
COMPOSE = DEPLOY / "container/compose.yaml"
CONTAINER_TOPOLOGY = DEPLOY / "container/topology.yaml"
KUBERNETES = DEPLOY / "kubernetes/raycluster.yaml"
UNIT = DEPLOY / "systemd/splitserve.service"
ENVIRONMENT = DEPLOY / "systemd/splitserve.env"

SHELL_WORDS = {"until", "do", "done", "if", "then", "fi", "!"}
DIRECTIVES = {
    "Unit": "Description Wants After",
    "Service": """
        User EnvironmentFile Environment StateDirectory CacheDirectory Type GuessMainPID ExecStart ExecStop
        TimeoutStartSec TimeoutStopSec Restart RestartSec LimitNOFILE LimitMEMLOCK CapabilityBoundingSet LockPersonality
        NoNewPrivileges ProtectControlGroups ProtectHome ProtectKernelLogs ProtectKernelModules ProtectKernelTunables
        ProtectSystem ReadWritePaths RestrictAddressFamilies RestrictRealtime RestrictSUIDSGID UMask
    """,
    "Install": "WantedBy",
}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: str


class HeadGroup(Strict):
    rayStartParams: dict[str, str]
    template: dict[str, Any]


class WorkerGroup(HeadGroup):
    groupName: str
    replicas: int
    minReplicas: int
    maxReplicas: int


class ClusterSpec(Strict):
    rayVersion: str
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]

    @property
    def groups(self) -> list[HeadGroup]:
        return [self.headGroupSpec, *self.workerGroupSpecs]


class RayCluster(Strict):
    """What these files use of KubeRay's resource; its pods are Kubernetes' own."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


def read(path: Path) -> dict[str, Any]:
    raw: dict[str, Any] = yaml.safe_load(path.read_text())
    return raw


def kubernetes_documents() -> tuple[dict[str, Any], RayCluster]:
    """The topology's ConfigMap, and the cluster."""
    config_map, cluster = yaml.safe_load_all(KUBERNETES.read_text())
    return config_map, RayCluster.model_validate(cluster)


def pod_of(group: HeadGroup) -> dict[str, Any]:
    pod: dict[str, Any] = group.template["spec"]
    return pod


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, delimiters="=")
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNIT)
    return parser


def simple_commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell line, without the assignments before it."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for token in [*lexer, ";"]:
        if set(token) <= set(";&|()<>"):
            if words:
                yield words
            words = []
        elif words or not (token in SHELL_WORDS or re.match(r"\w+=", token)):
            words.append(token)


def ray_lines(path: Path) -> list[str]:
    return [line for key, value in read(path).items() if key.endswith("_commands") for line in value]


def shell_lines() -> dict[str, list[str]]:
    """Everything in the operator's files that is run, by file."""
    lines = {f"ray/{path.stem}": ray_lines(path) for path in RAY_FILES}
    lines["compose"] = [shlex.join(["splitserve", *read(COMPOSE)["services"]["splitserve"]["command"]])]
    health = re.search(r"HEALTHCHECK .*CMD (\[.*\])", DOCKERFILE.read_text())
    assert health is not None
    lines["dockerfile"] = [shlex.join(json.loads(health[1]))]
    lines["kubernetes"] = [
        line
        for group in kubernetes_documents()[1].spec.groups
        for container in pod_of(group)["containers"]
        for line in container.get("command", [])
    ]
    lines["systemd"] = [value for key, value in unit()["Service"].items() if key.startswith("Exec")]
    guide = (ROOT / "docs/operating.md").read_text()
    lines["guide"] = [line for block in re.findall(r"```\n(.*?)```", guide, re.DOTALL) for line in block.splitlines()]
    return lines


def topology_texts() -> dict[str, str]:
    """The topologies that the operator's files start, by file."""
    texts = {f"ray/{path.stem}": (ROOT / mounted_topology(path)).read_text() for path in RAY_FILES}
    texts["compose"] = CONTAINER_TOPOLOGY.read_text()
    texts["kubernetes"] = kubernetes_documents()[0]["data"]["topology.yaml"]
    return texts


def mounted_topology(path: Path) -> str:
    return str(read(path)["file_mounts"]["~/splitserve/topology.yaml"])


def load(source: str, folder: Path) -> Topology:
    (folder / "topology.yaml").write_text(topology_texts()[source])
    return load_topology_file(folder / "topology.yaml").topology


def node_resources(topology: Topology) -> set[str]:
    asked = {topology.pool(role).node_resource for role in topology.roles} | {topology.router.node_resource}
    return {resource for resource in asked if resource is not None}


@pytest.mark.parametrize("path", RAY_FILES, ids=lambda path: path.stem)
def test_ray_accepts_its_files_and_refuses_an_unknown_key(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(read(path)))
    broken = read(path)
    broken["setup_comands"] = broken.pop("setup_commands")
    with pytest.raises(jsonschema.ValidationError, match="setup_comands"):
        validate_config(prepare_config(broken))


@pytest.mark.parametrize("path", RAY_FILES, ids=lambda path: path.stem)
def test_nodes_share_a_token_and_carry_what_the_topology_asks_for(path: Path, tmp_path: Path) -> None:
    raw, topology = read(path), load(f"ray/{path.stem}", tmp_path)
    mounts = raw["file_mounts"]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    for local in set(mounts.values()) - {"~/.ray/auth_token", "dist"}:
        assert (ROOT / local).is_file(), local
    starts = [line for line in ray_lines(path) if "ray start" in line]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    down, stop, start, up = raw["head_start_ray_commands"]
    assert shlex.split(down)[:3] == [
        "splitserve",
        "down",
        topology.name,
    ]  # before its Ray stops, as a second `ray up` does
    assert stop == "ray stop"
    _, ray = simple_commands(start)
    options = vars(make_parser().parse_args(shlex.split(up)[1:]))
    started = dict(word.removeprefix("--").split("=", 1) for word in ray if "=" in word)
    assert options["file"] in mounts
    assert options["address"] == f"127.0.0.1:{started['port']}"
    assert set(json.loads(started["resources"])) == node_resources(topology) == {"router"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")
@pytest.mark.parametrize("source", shell_lines())
def test_commands_and_their_options_exist(source: str) -> None:
    from ray.scripts.scripts import cli as ray_cli

    found = 0
    for line in shell_lines()[source]:
        for program, *arguments in simple_commands(line):
            name = Path(program).name
            if name == "splitserve":
                make_parser().parse_args(arguments)
            elif name == "ray":
                ray_cli.commands[arguments[0]].make_context(arguments[0], arguments[1:])
            found += name in ("splitserve", "ray")
    assert found > 0


@pytest.mark.parametrize("source", topology_texts())
def test_topologies_plan_and_can_run(source: str, tmp_path: Path, tiny_model: Path) -> None:
    text = topology_texts()[source]
    model = "deepseek-v2-lite" if "cuda" in text else str(tiny_model)  # theirs is not here
    file = tmp_path / "topology.yaml"
    file.write_text(re.sub("path: [^ \n]+", f"path: {model}", text, count=1))
    loaded = load_topology_file(file)
    plan = make_plan(loaded, load_model_config(loaded.topology.model.path))
    check_runnable(plan)
    assert [len(pool.ranks) for pool in plan.pools] == [1, 1]


def test_the_container_file_passes_hadolint() -> None:
    command = [str(Path(sys.executable).with_name("hadolint")), "--failure-threshold", "style", "-"]
    text = DOCKERFILE.read_text()
    assert subprocess.run(command, input=text, text=True, check=False, capture_output=True).stdout == ""
    broken = subprocess.run(command, input=text.replace("WORKDIR /", "WORKDIR "), text=True, check=False)
    assert broken.returncode != 0


def test_the_image_is_made_of_what_is_not_ignored() -> None:
    patterns = (ROOT / ".dockerignore").read_text().split()
    (copied,) = re.findall("^COPY (.*) ", DOCKERFILE.read_text(), re.MULTILINE)
    assert patterns == ["*", *(f"!{source}" for source in copied.split())]


def test_compose_accepts_its_file_and_refuses_an_unknown_key() -> None:
    text = COMPOSE.read_text()
    PyCompose.from_yaml(text).validate()
    with pytest.raises(ValueError, match="shm_sise"):
        PyCompose.from_yaml(text.replace("shm_size", "shm_sise"))


def test_the_composed_router_is_reached_from_this_host_only(tmp_path: Path) -> None:
    service, topology = read(COMPOSE)["services"]["splitserve"], load("compose", tmp_path)
    host, _, port = topology.router.grpc.rpartition(":")
    assert service["hostname"] == host
    assert service["ports"] == [f"127.0.0.1:{port}:{port}"]
    targets = dict(volume.split(":")[1::-1] for volume in service["volumes"])
    assert targets[service["command"][1]] == "./topology.yaml"
    assert topology.model.path in targets
    assert (COMPOSE.parent / service["build"]["context"] / service["build"]["dockerfile"]).samefile(DOCKERFILE)


def test_kubernetes_accepts_its_objects_and_refuses_unknown_keys() -> None:
    config_map, cluster = kubernetes_documents()
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(config_map, version, strict=True)
    for group in cluster.spec.groups:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod_of(group)}
        kubernetes_validate.validate(pod, version, strict=True)
        broken = pod | {"spec": pod_of(group) | {"volume": []}}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, version, strict=True)
    raw = cluster.model_dump()
    raw["spec"]["workerGroupSpecs"][0]["minReplica"] = 1
    with pytest.raises(ValidationError, match="minReplica"):
        RayCluster.model_validate(raw)


def test_the_pods_carry_what_the_topology_asks_for(tmp_path: Path) -> None:
    config_map, cluster = kubernetes_documents()
    topology, spec = load("kubernetes", tmp_path), cluster.spec
    assert f"ray=={spec.rayVersion}\n" in (ROOT / "constraints.txt").read_text()
    carried = [json.loads(shlex.split(group.rayStartParams["resources"])[0]) for group in spec.groups]
    assert {resource for resources in carried for resource in resources} == node_resources(topology)
    host, _, port = topology.router.grpc.rpartition(":")
    head = pod_of(spec.headGroupSpec)
    assert head["hostname"] == host
    assert {"name": "grpc", "containerPort": int(port)} in head["containers"][0]["ports"]
    assert f"USER {head['securityContext']['runAsUser']}\n" in DOCKERFILE.read_text()
    for group in spec.groups:
        (container,) = pod_of(group)["containers"]
        environment = {variable["name"]: variable for variable in container["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        assert "secretKeyRef" in environment["RAY_AUTH_TOKEN"]["valueFrom"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod_of(group)["volumes"]}
        assert set(mounts) == set(volumes)
        assert mounts["shm"] == "/dev/shm"
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert volumes["topology"]["configMap"]["name"] == config_map["metadata"]["name"]
        assert topology.model.path.startswith(mounts["models"])


def test_the_unit_has_known_directives_and_variables() -> None:
    sections = unit()
    for section in sections.sections():
        assert set(sections[section]) <= set(DIRECTIVES[section].split()), section
    named = set(re.findall(r"\$\{(\w+)\}", UNIT.read_text()))
    assert named == set(re.findall(r"^(\w+)=", ENVIRONMENT.read_text(), re.MULTILINE))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_accepts_the_unit_and_refuses_an_unknown_directive(tmp_path: Path) -> None:
    text = UNIT.read_text().replace("/opt/splitserve/bin/splitserve", sys.executable)
    assert verify(tmp_path, text) == ""
    assert "Unknown key" in verify(tmp_path, text.replace("RestartSec", "RestartSecs"))


def verify(folder: Path, text: str) -> str:
    """What systemd has against a unit."""
    file = folder / "splitserve.service"
    file.write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr
