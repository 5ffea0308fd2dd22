"""A cluster with every kind of secret: none of them is in what it logs, tells, or shows of its processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import trustme

from splitserve.client import Client, SplitserveClientError
from splitserve.cluster.api_key_file import add_api_key, hash_key
from splitserve.cluster.channel import CurveKeys
from splitserve.cluster.cluster_key import read_cluster_key, write_cluster_key
from splitserve.cluster.rank_spec import RankSpec
from splitserve.cluster.topology_file import load_topology
from splitserve.deploy.cluster_spec import ClusterSpec
from splitserve.deploy.cluster_state import ClusterFolder
from splitserve.deploy.processes import session_members
from tests.deploy.clusters import run_command, state_of, succeed, units, wait_until, write_topology

SECURITY = """
security:
  cluster_key: {0}/cluster.key
  api_keys: {0}/keys.toml
  tls: {{cert: {0}/cert.pem, key: {0}/key.pem, client_ca: {0}/ca.pem}}
"""


class Secrets:
    """Files of every secret in `folder`, and what must be seen nowhere, by name."""

    def __init__(self, folder: Path) -> None:
        self.ca = trustme.CA()
        leaf = self.ca.issue_cert("127.0.0.1")
        self.pair = leaf.cert_chain_pems[0].bytes(), leaf.private_key_pem.bytes()
        for name, content in (("cert", self.pair[0]), ("key", self.pair[1]), ("ca", self.ca.cert_pem.bytes())):
            (folder / f"{name}.pem").write_bytes(content)
        write_cluster_key(folder / "cluster.key")
        self.api_key = add_api_key(folder / "keys.toml", "alice")
        keys = read_cluster_key(folder / "cluster.key")
        self.texts = {
            "cluster key": (folder / "cluster.key").read_bytes().strip(),
            "CURVE secret": keys.secret.encode(),
            "CURVE public half": keys.public.encode(),
            "API key": self.api_key.encode(),
            "hash of the API key": hash_key(self.api_key).encode(),
            "wrong API key": b"sk-wrong",
            "TLS key": self.pair[1].splitlines()[1],
        }

    def client(self, endpoint: str, api_key: str) -> Client:
        return Client(endpoint, root_certificates=self.ca.cert_pem.bytes(), certificate=self.pair, api_key=api_key)


def written(*folders: Path) -> Iterator[tuple[str, bytes]]:
    """All files below `folders`, but for the one that is a secret itself."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and path.name not in ("token", "auth_token"):
                yield str(path), path.read_bytes()


def shown(pids: Iterable[int]) -> Iterator[tuple[str, bytes]]:
    """What every user of the host sees of processes."""
    for pid in pids:
        yield f"arguments of {pid}", Path(f"/proc/{pid}/cmdline").read_bytes()


def test_no_secret_is_seen(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topology, secrets = write_topology(tmp_path, tiny_model), Secrets(tmp_path)
    topology.write_text(topology.read_text() + SECURITY.format(tmp_path))
    name = load_topology(topology).name
    (tmp_path / "uvicorn.py").write_text("raise SystemExit('imported from the working folder')")
    monkeypatch.chdir(tmp_path)
    told = {"check": succeed("check", topology), "up": succeed("up", topology)}
    state = state_of(name)
    try:
        endpoint, folder = state.endpoints[0], ClusterFolder(name)
        with secrets.client(endpoint, secrets.api_key) as client:
            assert len(client.generate("The fox", max_tokens=4, ignore_eos=True).result().samples[0].token_ids) == 4
        with secrets.client(endpoint, "sk-wrong") as client, pytest.raises(SplitserveClientError) as caught:
            client.generate("The fox", max_tokens=4).result()
        told["refusal"] = str(caught.value)
        monkeypatch.setenv("SPLITSERVE_API_KEY", "sk-wrong")
        told["generate"] = run_command("generate", "--cluster", name, "--text", "x").stderr  # without TLS
        os.kill(units(name)["router/0"]["workers"][0]["pid"], signal.SIGKILL)
        (tmp_path / "key.pem").write_bytes(secrets.pair[1][:100])  # it starts anew with a key that is none
        wait_until(lambda: units(name)["router/0"]["deaths"] > 1, 60, "the router fails")
        told["status"] = succeed("status", name, "--json") + succeed("status", name)
        told["logs"] = succeed("logs", "--cluster", name, "-n", "10000")
        assert "security.tls" in told["logs"]
        assert '"tenant": "alice"' in (folder.logs / "router-0.log").read_text()
        assert state.ray is not None
        secrets.texts["Ray's token"] = folder.token.read_bytes().strip()
        seen = [
            *((place, text.encode()) for place, text in told.items()),
            *written(folder.path, Path(state.ray.folder)),
            *shown(session_members(state.ray.owner)),
        ]
    finally:
        succeed("down", name)
    assert len(seen) > 20
    found = [(what, place) for place, content in seen for what, text in secrets.texts.items() if text in content]
    assert found == []


def test_what_carries_keys_does_not_show_them(tmp_path: Path, tiny_model: Path) -> None:
    topology, keys = load_topology(write_topology(tmp_path, tiny_model)), CurveKeys.generate()
    rank = RankSpec(topology, "prefill", 0, 0, 0, "cpu", "127.0.0.1", "a", keys)
    for text in (repr(keys), str(keys), repr(ClusterSpec(topology, keys)), repr(rank)):
        assert keys.secret not in text
        assert keys.public not in text
