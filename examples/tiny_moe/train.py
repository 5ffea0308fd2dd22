"""Trains the model: about seven minutes on one H100.

    python -m examples.tiny_moe.train [--steps N] [--batch N] [--length N]

Weights are float32 and the arithmetic bfloat16. Batches are drawn by seed and step, so a run that is started again goes
on from its last state (run/state.pt) as if nothing had been. Routers are balanced by their bias alone (arXiv
2408.15664): after each step it rises where an expert got fewer tokens than the mean and falls where it got more.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from examples.tiny_moe.checkpoint import save
from examples.tiny_moe.network import MixtureOfExperts, Shape, TinyMoe
from examples.tiny_moe.tokens import DATA, HERE, MODEL, Ids

RUN, METRICS = HERE / "run", "metrics.jsonl"
MTP_WEIGHT = 0.3
BIAS_RATE = 1e-3
SAVE_SECONDS, LOG_STEPS, HELDOUT_STEPS = 60.0, 20, 250
HELDOUT_BATCHES = 8


@dataclass(frozen=True)
class Plan:
    """How to train. The learning rate rises over `warm_up` steps, stays, and falls to 0 over the last part, `decay`."""

    steps: int = 9600
    batch: int = 64
    length: int = 1024
    learning_rate: float = 3e-3
    warm_up: int = 200
    decay: float = 0.4
    weight_decay: float = 0.1
    seed: int = 0

    def rate(self, step: int) -> float:
        falling = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warm_up, falling)


@dataclass
class Losses:
    """Mean cross-entropy in nats of the next token, and of the one after it by the MTP module."""

    main: torch.Tensor
    mtp: torch.Tensor
    loads: torch.Tensor


def losses(model: Callable[[torch.Tensor], Any], tokens: torch.Tensor) -> Losses:
    """`tokens` [batch, length + 1]."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        out = model(tokens[:, :-1])
    main = F.cross_entropy(out.logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    mtp = F.cross_entropy(out.mtp_logits.float().flatten(0, 1), tokens[:, 2:].flatten())
    return Losses(main, mtp, out.loads)


def draw(ids: Ids, plan: Plan, step: int) -> torch.Tensor:
    """The batch of `step` [batch, length + 1] int64: pieces from anywhere."""
    starts = np.random.default_rng((plan.seed, step)).integers(0, len(ids) - plan.length - 1, plan.batch)
    return torch.from_numpy(np.stack([ids[start : start + plan.length + 1] for start in starts]).astype(np.int64))


def balance(model: TinyMoe, loads: torch.Tensor) -> None:
    """Move each router's bias by `loads` [layers with experts, experts], the tokens that each expert got."""
    routed = [layer.mlp for layer in model.layers if isinstance(layer.mlp, MixtureOfExperts)]
    for mlp, load in zip(routed, loads, strict=True):
        mlp.gate.get_buffer("e_score_correction_bias").add_(BIAS_RATE * torch.sign(load.mean() - load))


def new_optimizer(model: TinyMoe, plan: Plan) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=matrices[0].is_cuda)


class Run:
    """A training run in `folder`: its state, and metrics.jsonl with one line for every few steps."""

    def __init__(self, shape: Shape, plan: Plan, folder: Path, device: torch.device) -> None:
        self.plan, self.device, self._folder = plan, device, folder
        self.model = TinyMoe(shape)
        self.model.initialise(plan.seed)
        self.model.to(device)
        self._optimizer = new_optimizer(self.model, plan)
        self._forward: Callable[[torch.Tensor], Any] = (
            torch.compile(self.model) if device.type == "cuda" else self.model
        )
        self.step, self._seconds = 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    def train(self, ids: Ids, heldout: Ids) -> None:
        """Run the steps that are left. `heldout` is looked at now and then, and never learnt from."""
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        with Progress(*columns, TimeRemainingColumn(), refresh_per_second=1) as progress:
            bar = progress.add_task("loss", total=self.plan.steps, completed=self.step)
            began, saved = time.monotonic() - self._seconds, time.monotonic()
            while self.step < self.plan.steps:
                found = self._train_step(draw(ids, self.plan, self.step))
                self.step += 1
                last = self.step == self.plan.steps
                if self.step % LOG_STEPS == 0 or last:
                    self._seconds = time.monotonic() - began
                    line = {
                        "loss": found.main.item(),
                        "mtp_loss": found.mtp.item(),
                        "imbalance": imbalance(found.loads),
                    }
                    if self.step % HELDOUT_STEPS == 0 or last:
                        line["heldout_loss"] = self.heldout_loss(heldout)
                    self._log(line)
                    progress.update(bar, completed=self.step, description=f"loss {line['loss']:.3f}")
                if time.monotonic() - saved > SAVE_SECONDS or last:
                    self._save()
                    saved = time.monotonic()

    def _train_step(self, tokens: torch.Tensor) -> Losses:
        for group in self._optimizer.param_groups:
            group["lr"] = self.plan.rate(self.step)
        found = losses(self._forward, tokens.to(self.device, non_blocking=True))
        (found.main + MTP_WEIGHT * found.mtp).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        balance(self.model, found.loads)
        return found

    @torch.no_grad()
    def heldout_loss(self, ids: Ids) -> float:
        """The main model's mean loss over the same pieces each time."""
        plan = Plan(batch=self.plan.batch, length=self.plan.length, seed=self.plan.seed + 1)
        found = [losses(self._forward, draw(ids, plan, step).to(self.device)).main for step in range(HELDOUT_BATCHES)]
        return float(torch.stack(found).mean())

    def _log(self, figures: dict[str, float]) -> None:
        line = {
            "step": self.step,
            "seconds": round(self._seconds, 2),
            "batch_tokens": self.plan.batch * self.plan.length,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU",
            **figures,
        }
        with (self._folder / METRICS).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _save(self) -> None:
        state = {
            "plan": asdict(self.plan),
            "step": self.step,
            "seconds": self._seconds,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        part = self._folder / "state.pt.part"
        torch.save(state, part)
        part.replace(self._folder / "state.pt")

    def _resume(self) -> None:
        path = self._folder / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["plan"] != asdict(self.plan):
            raise SystemExit(f"{path} is of a run with other settings ({state['plan']}); remove it to start anew")
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step, self._seconds = state["step"], state["seconds"]
        metrics = self._folder / METRICS
        lines = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] <= self.step]
        metrics.write_text("".join(f"{line}\n" for line in lines))


def imbalance(loads: torch.Tensor) -> float:
    """The busiest expert's tokens over the mean, of the worst layer."""
    return float((loads.amax(-1) / loads.mean(-1)).max())


def load_ids() -> tuple[Ids, Ids]:
    """The training text, and all that is held out."""
    heldout = [np.load(path) for path in sorted(DATA.glob("heldout-*.npy"))]
    if not heldout:
        raise SystemExit(f"{DATA} holds no tokens; run examples.tiny_moe.corpus and examples.tiny_moe.tokens first")
    return np.load(DATA / "train.npy"), np.concatenate(heldout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("steps", "batch", "length", "warm_up"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Plan, name))
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ids, heldout = load_ids()
    run = Run(Shape(), Plan(**vars(options)), RUN, device)
    run.train(ids, heldout)
    save(run.model, MODEL)
    shutil.copy(RUN / METRICS, MODEL / METRICS)


if __name__ == "__main__":
    main()
