"""The verb `info`: what a model is made of, and the memory it takes."""

import json
import math
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..zoo.config import BackboneConfig
    from ..zoo.task import Task

NAME, SUMMARY = "info", "print what a trained model is made of"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", help="a model folder, a .ckpt file, a run, or runs/<recipe> for its newest run"
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens to estimate the training memory for")


def run(arguments: Namespace) -> int:
    from ..checkpoints.io import load
    from ..zoo.config import BackboneConfig

    model, vocabulary = load(arguments.checkpoint)
    hparams = dict(model.hparams)
    config = BackboneConfig.from_dict(hparams["backbone"])
    print(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")
    for part, count in parameters_by_part(model).items():
        print(f"  {part:12} {count:>14,}")
    print(f"vocabulary    {(vocabulary or {}).get('kind', 'none')}, {hparams.get('vocab_size')} tokens")
    memory = training_memory(model, config, arguments.length, 4)
    print(
        f"memory        about {memory / 2**30:.2f} GiB to train on {arguments.length} tokens at a time, in float32"
    )
    print(json.dumps(hparams, indent=2))
    return 0


def parameters_by_part(model: "Task") -> dict[str, int]:
    """How many parameters each child of a task has; tied ones count where they come first."""
    seen: set[int] = set()
    parts = {}
    for name, child in model.named_children():
        own = {id(p): p.numel() for p in child.parameters() if id(p) not in seen}
        seen |= own.keys()
        if own:
            parts[name] = sum(own.values())
    return parts


def training_memory(model: "Task", config: "BackboneConfig", tokens: int, activation_bytes: int) -> float:
    """An estimate in bytes: weights, gradients, AdamW's moments, what the backward keeps, and a chunk of logits."""
    from ..kernels.cross_entropy import CHUNK

    weights = 16 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens = -(-tokens // model.hparams.get("patch", 1))
    kept = sum(_kept(row, length, activation_bytes) for row, length in _rows(config, tokens))
    logits = min(tokens * (model.hparams.get("vocab_size") or 0) * activation_bytes, CHUNK)
    return weights + kept + logits


def _rows(config: "BackboneConfig", tokens: int) -> "Iterator[tuple[BackboneConfig, int]]":
    """The rows of blocks that a config describes, and how many positions each sees."""
    from ..zoo.config import UNetConfig

    if not isinstance(config, UNetConfig):
        yield config, tokens
        return
    for i in range(len(config.pool) + 1):
        length = tokens // math.prod(config.pool[:i])
        # all but the innermost are there on the way up too
        yield from [(config.stage(i), length)] * (2 if i < len(config.pool) else 1)


def _kept(row: "BackboneConfig", tokens: int, activation_bytes: int) -> float:
    """What a row of blocks keeps for the backward, in bytes."""
    d_inner = row.mamba.expand * row.d_model
    # the float32 stream, the norm's output, both halves of in_proj, and the scan's input, step and output
    per_layer = tokens * (4 * row.d_model + activation_bytes * (row.d_model + 5 * d_inner))
    if row.checkpoint_activations:
        return per_layer + tokens * 4 * row.d_model * row.n_layers
    return per_layer * row.n_layers
