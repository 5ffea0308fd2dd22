from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from splitserve.cluster.topology import Topology
from splitserve.cluster.topology_pools import DecodePool, PrefillPool
from splitserve.cluster.units import format_bytes, parse_bytes

MINIMAL: dict[str, Any] = {"name": "demo", "model": {"path": "folder/some-model.gguf"}}


def topology(**sections: Any) -> Topology:
    return Topology.model_validate(MINIMAL | sections)


def test_name_and_model_path_suffice() -> None:
    built = topology()
    assert built.roles == ("prefill", "decode")
    assert isinstance(built.pool("prefill"), PrefillPool)
    assert isinstance(built.pool("decode"), DecodePool)
    assert built.model.served_name == "some-model"
    assert built.router.grpc_address(2) == "127.0.0.1:50063"
    assert built.router.http_address(2) is None
    assert topology(router={"http": "[::1]:8000"}).router.http_address(2) == "[::1]:8002"
    with pytest.raises(KeyError):
        built.pool("colocated")


def test_colocated_has_one_pool_with_chunks() -> None:
    for sections in ({}, {"decode": {"slots": 4}}):
        built = topology(colocated=True, **sections)
        assert built.roles == ("colocated",)
        assert built.prefill is None
        assert built.pool("colocated") is built.decode
        assert built.decode.chunk_tokens == 512
    assert topology(colocated=True, decode={"chunk_tokens": 64}).decode.chunk_tokens == 64


def test_models_are_frozen() -> None:
    built = topology()
    with pytest.raises(ValidationError):
        built.decode.slots = 3


@pytest.mark.parametrize(
    ("sections", "where", "message"),
    [
        ({"name": "Demo"}, "name", "pattern"),
        ({"name": "demo\n"}, "name", "pattern"),
        ({"colocated": True, "prefill": {}}, "prefill", "decode describes the one pool"),
        ({"prefill": None}, "prefill", "expected a mapping"),
        ({"decode": {"chunk_tokens": 5}}, "decode", "chunk_tokens"),
        ({"colocated": True, "decode": {"chunk_tokens": None}}, "decode", "chunk_tokens"),
        ({"prefill": {"slots": 5}}, "prefill.slots", "Extra inputs"),
        ({"decode": {"max_sequences": 8}}, "decode.slots", "at most max_sequences, 8"),
        ({"decode": {"page_size": 48}}, "decode.page_size", "16, 32, 64 or 128"),
        ({"decode": {"replicas": "2"}}, "decode.replicas", "valid integer"),
        ({"decode": {"replicas": True}}, "decode.replicas", "valid integer"),
        ({"decode": {"kv_memory": "512 megs"}}, "decode.kv_memory", "512MiB"),
        ({"decode": {"kv_memory": 0}}, "decode.kv_memory", "greater than 0"),
        ({"router": {"grpc": "127.0.0.1"}}, "router.grpc", "host:port"),
        ({"router": {"grpc": "127.0.0.1:70000"}}, "router.grpc", "65535"),
        ({"router": {"grpc": "[::]:50061"}}, "router.grpc", "not every interface"),
        ({"router": {"grpc": ":50061"}}, "router.grpc", "not every interface"),
        ({"router": {"grpc": "127.0.0.1:65535", "replicas": 2}}, "router.grpc", "65536"),
        *(
            (sections, where, "1 to 63 characters between its dots")
            for host in ("a..b", "a" * 64, "x." + "a" * 64, "\u00fc", "a\0b", ".")
            for sections, where in (
                ({"router": {"grpc": f"{host}:50061"}}, "router.grpc"),
                ({"router": {"http": f"[{host}]:8000"}}, "router.http"),
                ({"security": {"bind": host}}, "security.bind"),
            )
        ),
        ({"tracing": {"endpoint": "http://a..b:4317"}}, "tracing.endpoint", "a host name of ASCII and a port"),
        ({"tracing": {"endpoint": "http://a:99999"}}, "tracing.endpoint", "a port from 1 to 65535"),
        ({"router": {"http": "127.0.0.1"}}, "router.http", "host:port"),
        ({"router": {"http": "0.0.0.0:8000"}}, "router.http", "not every interface"),
        ({"router": {"http": "0:8000"}}, "router.http", "not every interface"),
        ({"router": {"grpc": "0x0.0:8000"}}, "router.grpc", "not every interface"),
        ({"router": {"grpc": "[::ffff:0.0.0.0]:50061"}}, "router.grpc", "not every interface"),
        ({"router": {"http": "127.0.0.1:65535", "replicas": 2}}, "router.http", "65536"),
        ({"router": {"http": "127.0.0.1:50061"}}, "router.http", "overlap; move grpc or http"),
        ({"router": {"http": "127.0.0.1:50060", "replicas": 2}}, "router.http", "overlap; move grpc or http"),
        ({"router": {"slo": {"ttft_s": float("inf")}}}, "router.slo.ttft_s", "finite"),
        (
            {"security": {"curve": "off", "cluster_key": "k"}},
            "security.cluster_key",
            "expected none where curve is off",
        ),
        ({"security": {"bind": "*"}}, "security.bind", "not every interface"),
        ({"security": {"tls": {"cert": "a.pem"}}}, "security.tls.key", "required"),
        ({"kv_transfer": {"transport": "rdma"}}, "kv_transfer.transport", "'auto', 'cuda_ipc', 'shm', 'nccl' or 'tcp'"),
    ],
)
def test_refused(sections: dict[str, Any], where: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        topology(**sections)
    faults = {".".join(map(str, fault["loc"])): fault["msg"] for fault in caught.value.errors()}
    assert list(faults) == [where]
    assert message in faults[where]


def test_encryption_follows_the_address() -> None:
    assert not topology().security.encrypted
    assert not topology(security={"bind": "::1"}).security.encrypted
    assert topology(security={"curve": "on"}).security.encrypted
    assert topology(security={"bind": "node"}).security.encrypted
    assert topology(security={"bind": "10.0.0.1"}).security.encrypted
    assert not topology(security={"bind": "eth0", "curve": "off"}).security.encrypted
    assert topology(security={"cluster_key": "cluster.key"}).security.encrypted


@pytest.mark.parametrize(
    ("text", "size"),
    [("1B", 1), ("2KB", 2000), ("2KiB", 2048), ("512MiB", 2**29), ("80GB", 80 * 10**9), ("1.5 GiB", 3 * 2**29)],
)
def test_sizes_parse(text: str, size: int) -> None:
    assert parse_bytes(text) == size
    assert topology(decode={"kv_memory": text}).decode.kv_memory == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1MiB", "1mib", "1e9B", "0x10B", "1MiB ", "1MiB\n", "٣MiB", "9" * 99 + "B"]
)
def test_sizes_refused(text: str) -> None:
    with pytest.raises(ValueError, match="512MiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1000, "0.977 KiB"), (2**29, "512 MiB"), (1023 * 2**20, "0.999 GiB"), (2**42, "4096 GiB")],
)
def test_sizes_read_well(size: int, text: str) -> None:
    assert format_bytes(size) == text
