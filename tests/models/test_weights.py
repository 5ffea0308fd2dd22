"""Loading: each rank reads its part and no more, and every fault of a folder is one clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from splitserve.cluster.errors import ModelLoadError
from splitserve.models.checkpoint import Checkpoint
from splitserve.models.config import ModelConfig
from splitserve.models.decoder import Decoder
from splitserve.models.layers import SingleRank
from splitserve.models.parameters import local_shape, parameters
from splitserve.models.resolve import CONFIG_ONLY, load_model_config
from splitserve.models.weights import fill_dummy, fill_from, fill_weights, load_model, shard_range
from tests.models.conftest import TINY_MODELS
from tests.models.driver import CPU
from tests.models.test_layers import Meeting, ThreadRank

TinyModels = Callable[[str], tuple[Path, Any]]
DOWN = "model.layers.1.mlp.down_proj.weight"


def load(
    folder: Path,
    rank: int = 0,
    size: int = 1,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """A rank's filled weights, not packed yet."""
    tp = ThreadRank(Meeting(size), rank) if size > 1 else SingleRank()
    config = load_model_config(str(folder))
    model = Decoder(config, tp, dtype, CPU, 256)
    with Checkpoint(folder) as checkpoint:
        fill_weights(model, config, tp, fill_from(checkpoint), progress)
    return dict(model.named_weights())


@pytest.fixture
def copy(tiny: TinyModels, tmp_path: Path) -> Path:
    """A folder to break."""
    return Path(shutil.copytree(tiny("llama")[0], tmp_path / "copy"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(("name", "size"), [("llama", 1), ("llama", 4), ("qwen2", 4), ("llama3-rope-biases", 3)])
def test_ranks_hold_every_element_and_read_no_other(
    tiny: TinyModels, name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, oracle = tiny(name)
    config, whole = load_model_config(str(folder)), oracle.state_dict()
    seen = {parameter: torch.zeros_like(tensor) for parameter, tensor in whole.items()}
    read = Checkpoint.read
    for rank in range(size):
        elements: list[int] = []

        def recording(*arguments: Any, elements: list[int] = elements) -> torch.Tensor:
            part = read(*arguments)
            elements.append(part.numel())
            return part

        monkeypatch.setattr(Checkpoint, "read", recording)
        views = load(folder, rank, size)
        local = [local_shape(parameter, config, size, 1) for parameter in parameters(config)]
        assert sum(elements) <= sum(torch.Size(shape).numel() for shape in local)
        for parameter, shape in zip(parameters(config), local, strict=True):
            dim, start, stop = shard_range(parameter, config, rank, size)
            view = views[parameter.name]
            assert tuple(view.shape) == shape
            assert torch.equal(
                view.narrow(dim, 0, stop - start), whole[parameter.name].narrow(dim, start, stop - start)
            )
            assert not view.narrow(dim, stop - start, view.shape[dim] - (stop - start)).any()
            seen[parameter.name].narrow(dim, start, stop - start).fill_(1)
    assert all(seen[parameter.name].all() for parameter in parameters(config))


def test_sharded_checkpoints_load_alike(tiny: TinyModels, tmp_path: Path) -> None:
    folder, oracle = tiny("qwen2")
    oracle.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    one, many = load(folder), load(tmp_path)
    assert all(torch.equal(one[name], many[name]) for name in one)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ModelLoadError, match=r"model-00002.*no such file"):
        load(tmp_path)


def test_bfloat16_checkpoints_load_into_either_dtype(copy: Path) -> None:
    rewrite(copy, lambda tensors: tensors.update({name: x.bfloat16() for name, x in tensors.items()}))
    stored = load_file(copy / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        weights = load(copy, dtype=dtype)
        assert all(torch.equal(weight, stored[name].to(dtype)) for name, weight in weights.items())


def test_progress_counts_up_to_all_weights(tiny: TinyModels) -> None:
    calls: list[tuple[int, int]] = []
    folder, oracle = tiny("llama")
    load(folder, progress=lambda done, total: calls.append((done, total)))
    total = len(oracle.state_dict())
    assert calls == [(done, total) for done in range(1, total + 1)]


def test_dummy_weights_need_no_files_and_repeat(tiny: TinyModels, tmp_path: Path) -> None:
    config = load_model_config(str(tiny("qwen3")[0]))
    models = [Decoder(config, SingleRank(), torch.float32, CPU, 256) for _ in range(2)]
    for model in models:
        fill_weights(model, config, SingleRank(), fill_dummy)
    first, second = (dict(model.named_weights()) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (first["model.layers.0.self_attn.q_norm.weight"] == 1).all()
    assert first[DOWN].std() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(first[DOWN], first[DOWN.replace("1", "0")])
    load_model(tmp_path, config, torch.float32, CPU, SingleRank(), "dummy")


def break_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def outside_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {DOWN: "../model.safetensors"}}))


def truncate(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: no such file"),
    "truncated": (truncate, "truncated or not safetensors"),
    "not safetensors": (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 999), "not safetensors"),
    "missing tensor": (lambda folder: rewrite(folder, lambda tensors: tensors.__delitem__(DOWN)), f"{DOWN} is missing"),
    "untied head missing": (
        lambda folder: rewrite(folder, lambda tensors: tensors.__delitem__("lm_head.weight")),
        "lm_head.weight is missing",
    ),
    "wrong shape": (
        lambda folder: rewrite(folder, lambda tensors: tensors.update({DOWN: torch.zeros(96, 100)})),
        r"down_proj.weight: found shape \[96, 100\].*\[96, 144\]",
    ),
    "wrong dtype": (
        lambda folder: rewrite(folder, lambda tensors: tensors.update({DOWN: tensors[DOWN].to(torch.int8)})),
        "found dtype I8; expected one of F32, F16, BF16",
    ),
    "broken index": (break_index, "index.json: not JSON"),
    "index outside the folder": (outside_index, "weight_map"),
    "empty index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        "model.embed_tokens.weight is missing",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(copy: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    damage(copy)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load(copy)
    assert str(copy) in str(caught.value)


def test_uneven_shards_and_unrunnable_models_are_refused(tiny: TinyModels, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"q_proj.weight: 192 do not divide over 5 ranks"):
        load(tiny("llama")[0], 0, 5)
    with pytest.raises(ModelLoadError, match=r"k_proj.weight: 4 KV heads do not divide over tp=3"):
        load(tiny("llama")[0], 0, 3)
    config = load_model_config(next(iter(CONFIG_ONLY)))
    with pytest.raises(ModelLoadError, match="fp8 weights can be planned but not run"):
        load_model(tmp_path, config, torch.float32, CPU, SingleRank(), "dummy")


def test_every_parameter_has_a_place(tiny: TinyModels) -> None:
    for name in TINY_MODELS:
        folder, oracle = tiny(name)
        config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
        named = list(load(folder))
        assert sorted(named) == sorted(parameter.name for parameter in parameters(config))
        theirs = {key for key, _ in oracle.named_parameters()}
        theirs |= {key for key, _ in oracle.named_buffers() if key.endswith("correction_bias")}
        assert _without_experts(named) == _without_experts(theirs)


def _without_experts(names: Iterable[str]) -> set[str]:
    """Routed experts have other names in transformers' memory than in its files."""
    return {name for name in names if ".experts." not in name}
