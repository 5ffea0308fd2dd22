"""Normalisation, rotary embedding and gate on one GPU, against the copy bandwidth measured in the same run.

Times come from CUDA graphs. Bandwidth counts each input read once and each output written once; sizes beyond L2's 50 MB
show the memory, smaller ones what a decode step pays.

    python -m benchmarks.kernels.pointwise
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.kernels.timing import copy_gb, graph_us
from benchmarks.rows import Figure, Row, write
from splitserve.kernels.rms_norm import add_rms_norm, rms_norm
from splitserve.kernels.rope import apply_rope
from splitserve.kernels.silu_and_mul import silu_and_mul

DEVICE = torch.device("cuda")
ROWS = (16, 256, 2048, 8192, 32768)
HIDDEN, HEADS, HEAD_DIM, WIDTH = 4096, 32, 128, 11008
REPEATS = 10

Call = tuple[str, int, Callable[[], object]]


def main() -> None:
    copied = copy_gb()
    print(f"{torch.cuda.get_device_name()}, copy {copied:.0f} GB/s (read + write)")
    for rows in ROWS:
        for name, moved, call in calls(rows):
            figure = Figure.of([moved / micros / 1e3 for micros in times(call)])
            write([Row("kernels", f"{name} rows={rows}", "bandwidth", "GB/s", figure, "copy", copied, "higher")])


def times(call: Callable[[], object]) -> list[float]:
    """Microseconds a call, measured five times."""

    def repeated() -> None:
        for _ in range(REPEATS):
            call()

    return [graph_us(repeated, REPEATS) for _ in range(5)]


def calls(rows: int) -> Iterator[Call]:
    """Name, bytes moved and the call."""
    x, residual = random(rows, HIDDEN), random(rows, HIDDEN)
    weight = random(HIDDEN)
    yield f"rms_norm hidden={HIDDEN}", 2 * x.nbytes, lambda: rms_norm(x, weight, 1e-5)
    yield f"add_rms_norm hidden={HIDDEN}", 4 * x.nbytes, lambda: add_rms_norm(x, residual, weight, 1e-5)
    heads = random(rows, HEADS, HEAD_DIM)
    cos, sin = (torch.rand(rows, 1, HEAD_DIM, device=DEVICE) for _ in range(2))
    moved = 2 * heads.nbytes + cos.nbytes  # the second halves of both tables
    yield f"rope heads={HEADS} dim={HEAD_DIM}", moved, lambda: apply_rope(heads, cos, sin)
    both = random(rows, 2 * WIDTH)
    yield f"silu_and_mul width={WIDTH}", both.nbytes * 3 // 2, lambda: silu_and_mul(both)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).bfloat16()


if __name__ == "__main__":
    main()
