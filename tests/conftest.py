from __future__ import annotations

import os
import shutil

# Before torch loads, as in every worker: bits must not depend on neighbours. Tiny models gain nothing from threads.
os.environ["MKL_CBWR"] = "AVX2,STRICT"
os.environ["OMP_NUM_THREADS"] = "1"
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton loads: kernels run on the CPU, slowly

from pathlib import Path

import pytest

from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a tiny random Llama with a tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny-model"))
