"""What the saved model makes of text that it was not trained on, beside an n-gram model of the same training tokens.

    python -m examples.tiny_moe.evaluate      writes model/evaluation.json

The text of a domain is cut into pieces of the model's context. Both models predict the same tokens, all but the first
of each piece; the n-gram model is interpolated modified Kneser-Ney of order 5.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F

from examples.tiny_moe.checkpoint import load
from examples.tiny_moe.network import TinyMoe
from examples.tiny_moe.ngram import KneserNey
from examples.tiny_moe.tokens import DATA, MODEL, VOCAB, Ids

BATCH, ORDER = 8, 5
RESULT = MODEL / "evaluation.json"


@dataclass
class Sums:
    """Over the tokens of a domain. `nats` are negative log probabilities.

    `accepted`: how often the MTP module's best token for the position after the next is what the main model will
    choose there, of `drafts`; `mtp_right` how often it is the text's.
    """

    tokens: int = 0
    nats: float = 0.0
    ngram_nats: float = 0.0
    right: int = 0
    drafts: int = 0
    mtp_right: int = 0
    accepted: int = 0

    def __iadd__(self, other: Sums) -> Sums:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self


def pieces_of(ids: Ids, length: int) -> Ids:
    """[pieces, length]: what is left at the end is not used."""
    return ids[: len(ids) // length * length].reshape(-1, length)


@torch.inference_mode()
def judge(model: TinyMoe, pieces: Ids) -> tuple[Sums, torch.Tensor]:
    """The sums over `pieces` [pieces, length], and how many tokens chose each expert [layers, experts]."""
    sums, loads = Sums(), torch.zeros(())
    for start in range(0, len(pieces), BATCH):
        tokens = torch.from_numpy(pieces[start : start + BATCH].astype(np.int64))
        out = model(tokens)
        best, ahead = out.logits.argmax(-1), out.mtp_logits.argmax(-1)
        loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        sums += Sums(
            tokens=tokens[:, 1:].numel(),
            nats=float(loss),
            right=int((best[:, :-1] == tokens[:, 1:]).sum()),
            drafts=tokens[:, 2:].numel(),
            mtp_right=int((ahead[:, :-1] == tokens[:, 2:]).sum()),
            accepted=int((ahead[:, :-1] == best[:, 1:-1]).sum()),
        )
        loads = loads + out.loads
    return sums, loads


def ngram_nats(ngram: KneserNey, pieces: Ids) -> float:
    """The n-gram model's sum over the same tokens; it may look back over a piece's beginning."""
    log_probabilities = np.concatenate(([0.0], ngram.log_probabilities(pieces.reshape(-1)))).reshape(pieces.shape)
    return -float(log_probabilities[:, 1:].sum())


def main() -> None:
    model = load(MODEL).eval()
    ngram = KneserNey.fit(np.load(DATA / "train.npy"), ORDER, VOCAB)
    result = {}
    for path in sorted(DATA.glob("heldout-*.npy")):
        pieces = pieces_of(np.load(path), model.shape.max_position_embeddings)
        sums, loads = judge(model, pieces)
        sums.ngram_nats = ngram_nats(ngram, pieces)
        domain = path.stem.removeprefix("heldout-")
        result[domain] = {**asdict(sums), "loads": loads.int().tolist()}
        perplexity, peer = np.exp(sums.nats / sums.tokens), np.exp(sums.ngram_nats / sums.tokens)
        print(
            f"{domain:12} {sums.tokens:8,} tokens: perplexity {perplexity:.2f} (n-gram {peer:.2f}), "
            f"MTP right {sums.mtp_right / sums.drafts:.1%}, accepted {sums.accepted / sums.drafts:.1%}",
            flush=True,
        )
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
