"""Writes the model's card, model/README.md, and its plots, from what training and evaluation left.

python -m examples.tiny_moe.card      needs matplotlib
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from examples.tiny_moe.checkpoint import WEIGHTS, load
from examples.tiny_moe.evaluate import RESULT
from examples.tiny_moe.sources import SOURCES
from examples.tiny_moe.tokens import DATA, MODEL
from examples.tiny_moe.train import METRICS

Json = dict[str, Any]

TEXT = """# tiny-moe

A mixture of experts of {parameters:.1f} million parameters in the shape of DeepSeek-V3, with its multi-token prediction
module, trained from nothing on {train_tokens:.0f} million tokens in {minutes:.1f} minutes on one {device}. It is
there to be served and measured: random weights have flat logits, routers that see no difference, and drafts that nobody
accepts. It writes in the manner of manuals, dictionaries and old books, and is no source of facts.

| | |
|---|---|
{sizes}

Weights are bfloat16, the routers' biases float32: {megabytes:.1f} MB in `{weights}`. transformers loads the main model
(`DeepseekV3ForCausalLM`); the MTP module is layer {layers}, under the names of DeepSeek's checkpoints, and takes the
main model's embedding and head.

## Held-out text

Documents that training never saw. Perplexity is that of a token, for all but the first of every {context} tokens;
beside it that of an interpolated modified Kneser-Ney model of order 5, counted on the same training tokens. The MTP
module sees a position and the token behind it, and is right where its best guess is the token after that; a draft is
accepted where that guess is what the main model chooses there.

{results}

## Training

{tokens_seen:.0f} million tokens ({epochs:.1f} times the text), {steps} steps; AdamW, float32 weights, bfloat16
arithmetic. `python -m examples.tiny_moe.train` does it again from the same seed.

![Loss](loss.png)

## Experts

How much of a domain's tokens each expert of a layer gets; the line is an equal share.

![Load](experts.png)

## Text

{sources}

`examples/tiny_moe/sources.py` names the packages, with their hashes, and what is taken of them. Speeches and the
Factbook are works of the United States government: their texts are in the public domain, not the packages around them.
`prompts.json` quotes the beginnings of 100 held-out documents, which stay under the licences of their packages.

> WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved. THIS SOFTWARE AND DATABASE IS PROVIDED
> "AS IS" AND PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES, EXPRESS OR IMPLIED. BY WAY OF EXAMPLE,
> BUT NOT LIMITATION, PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES OF MERCHANTABILITY OR FITNESS
> FOR ANY PARTICULAR PURPOSE OR THAT THE USE OF THE LICENSED SOFTWARE, DATABASE OR DOCUMENTATION WILL NOT INFRINGE
> ANY THIRD PARTY PATENTS, COPYRIGHTS, TRADEMARKS OR OTHER RIGHTS. The name of Princeton University or Princeton
> may not be used in advertising or publicity pertaining to distribution of the software and/or database. Title to
> copyright in this software, database and any associated documentation shall at all times remain with Princeton
> University and LICENSEE agrees to preserve same.
"""


SIZES = (
    ("vocabulary", "vocab_size"),
    ("hidden size", "hidden_size"),
    ("layers, the first of them dense", "num_hidden_layers"),
    ("attention heads", "num_attention_heads"),
    ("rank of queries", "q_lora_rank"),
    ("rank of keys and values", "kv_lora_rank"),
    ("routed experts", "n_routed_experts"),
    ("chosen by a token", "num_experts_per_tok"),
    ("groups of experts", "n_group"),
    ("groups chosen from", "topk_group"),
    ("shared experts", "n_shared_experts"),
    ("width of an expert", "moe_intermediate_size"),
    ("context", "max_position_embeddings"),
)


def card(
    metrics: list[Json], evaluation: dict[str, Json], config: Json, size: int, parameters: int, tokens: int
) -> str:
    """The card's text. `tokens` are those of the training text, `size` the bytes of the weights' file."""
    last = metrics[-1]
    seen = last["step"] * last["batch_tokens"]
    return TEXT.format(
        parameters=parameters / 1e6,
        train_tokens=tokens / 1e6,
        minutes=last["seconds"] / 60,
        device=last["device"],
        sizes=_rows([[name, str(config[key])] for name, key in SIZES]),
        megabytes=size / 1e6,
        weights=WEIGHTS,
        layers=config["num_hidden_layers"],
        context=config["max_position_embeddings"],
        results=results(evaluation),
        tokens_seen=seen / 1e6,
        epochs=seen / tokens,
        steps=last["step"],
        sources=_table(
            ["domain", "package", "licence"],
            [[source.domain, f"{source.name} {source.version}", source.licence] for source in SOURCES],
        ),
    )


def results(evaluation: dict[str, Json]) -> str:
    """A row for each domain, and one for all together."""
    names = ("tokens", "nats", "ngram_nats", "right", "drafts", "mtp_right", "accepted")
    total = {name: sum(domain[name] for domain in evaluation.values()) for name in names}
    rows = [
        [
            name,
            f"{sums['tokens']:,}",
            f"{np.exp(sums['nats'] / sums['tokens']):.1f}",
            f"{np.exp(sums['ngram_nats'] / sums['tokens']):.1f}",
            f"{sums['right'] / sums['tokens']:.1%}",
            f"{sums['mtp_right'] / sums['drafts']:.1%}",
            f"{sums['accepted'] / sums['drafts']:.1%}",
        ]
        for name, sums in [*evaluation.items(), ("all", total)]
    ]
    head = ["domain", "tokens", "perplexity", "5-gram", "next token right", "MTP right", "drafts accepted"]
    return _table(head, rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return _rows([head, ["---"] * len(head), *rows])


def _rows(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot_losses(metrics: list[Json], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label in (("loss", "next token"), ("mtp_loss", "the one after it (MTP)"), ("heldout_loss", "held-out")):
        lines = [line for line in metrics if key in line]
        axes.plot([line["step"] for line in lines], [line[key] for line in lines], label=label)
    axes.set(xlabel="step", ylabel="nats a token", ylim=(None, 6))
    axes.legend()
    figure.savefig(path)


def plot_loads(evaluation: dict[str, Json], path: Path) -> None:
    import matplotlib.pyplot as plt

    layers = len(next(iter(evaluation.values()))["loads"])
    figure, grid = plt.subplots(layers, 1, figsize=(9, 1.6 * layers), sharex=True, layout="constrained")
    for layer, axes in enumerate(grid):
        for index, (domain, sums) in enumerate(evaluation.items()):
            load = np.array(sums["loads"][layer])
            place = np.arange(len(load)) + (index + 0.5) / len(evaluation) * 0.8 - 0.4
            axes.bar(place, load / load.sum(), width=0.8 / len(evaluation), label=domain)
        axes.axhline(1 / len(load), color="black", linewidth=0.6)
        axes.set(ylabel="MTP" if layer == layers - 1 else f"layer {layer + 1}", xticks=range(len(load)))
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    figure.savefig(path)


def main() -> None:
    metrics = [json.loads(line) for line in (MODEL / METRICS).read_text().splitlines()]
    evaluation = json.loads(RESULT.read_text())
    config = json.loads((MODEL / "config.json").read_text())
    parameters = sum(parameter.numel() for parameter in load(MODEL).parameters())
    tokens = len(np.load(DATA / "train.npy", mmap_mode="r"))
    size = (MODEL / WEIGHTS).stat().st_size
    (MODEL / "README.md").write_text(card(metrics, evaluation, config, size, parameters, tokens))
    plot_losses(metrics, MODEL / "loss.png")
    plot_loads(evaluation, MODEL / "experts.png")


if __name__ == "__main__":
    main()
