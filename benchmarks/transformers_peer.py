"""Hugging Face transformers in a process of its own: the peer of the CPU benchmarks.

Reads jobs from standard input, one JSON object a line: {"prompts": [[token ids], ...], "new_tokens": n}; answers each
with the seconds that `generate` took. Prompts of one job have one length, so that nothing is padded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class TransformersPeer:
    """`generate` on the model in `folder`, with as many threads as the workers it is compared with."""

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment.pop("MKL_CBWR", None)  # the peer runs as its users run it
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.transformers_peer", str(folder), dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def generate(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Seconds for exactly `new_tokens` greedy tokens of every prompt, as one batch."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
        self._process.stdin.flush()
        return float(json.loads(self._process.stdout.readline())["seconds"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder, dtype = sys.argv[1:]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    for line in sys.stdin:
        job = json.loads(line)
        ids, new_tokens = torch.tensor(job["prompts"]), job["new_tokens"]
        start = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        seconds = time.perf_counter() - start
        assert output.shape[1] == ids.shape[1] + new_tokens
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
