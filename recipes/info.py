"""The verb `info`: what a model is made of, and the memory it takes."""

import json
import math
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..zoo.config import BackboneConfig
    from ..zoo.task import Task

NAME, SUMMARY = "info", "print what a trained model is made of, and the memory it takes"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        help="a model folder, a .ckpt file, a run, a name that `mambazoo ls` lists, or owner/name of the Hub",
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens to estimate the memory for")


def run(arguments: Namespace) -> int:
    from ..checkpoints.io import empty, read
    from ..checkpoints.registry import find
    from ..zoo.config import BackboneConfig

    if arguments.length < 1:
        raise ValueError(f"--length: must be 1 or more, not {arguments.length}")
    # neither fetches nor reads weights where a config says enough
    stored = read(arguments.checkpoint, weights=False)
    model = empty(stored)
    config = BackboneConfig.from_dict(stored.arguments["backbone"])
    print(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")
    for part, count in parameters_by_part(model).items():
        print(f"  {part:12} {count:>14,}")
    vocabulary = (stored.vocabulary or {}).get("kind", "none")
    print(f"vocabulary    {vocabulary}, {stored.arguments.get('vocab_size')} tokens")
    entry = find(arguments.checkpoint)
    for key in ("data", "licence", "recipe", "commit", "metric") if entry else ():
        if getattr(entry, key):
            print(f"{key:13} {getattr(entry, key)}")
    training = training_memory(model, config, arguments.length, 4)
    inference = inference_memory(model, config, arguments.length, 4)
    print(
        f"memory        about {training / 2**30:.2f} GiB to train on {arguments.length} tokens at a time, "
        f"{inference / 2**30:.2f} GiB to read as many, in float32"
    )
    print(json.dumps(stored.arguments, indent=2))
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
    maps = _maps(model, tokens)
    tokens = -(-tokens // model.hparams.get("patch", 1))
    kept = sum(_kept(row, length, activation_bytes) for row, length in _rows(config, tokens))
    # what a convolution made, in float32 for its norm too, and what came of that
    kept += (4 + 3 * activation_bytes) * sum(maps)
    logits = min(tokens * (model.hparams.get("vocab_size") or 0) * activation_bytes, CHUNK)
    return weights + kept + logits


def _maps(model: "Task", tokens: int) -> list[int]:
    """How many numbers each convolution makes of what a classifier of sound hears through filters."""
    from ..zoo.frontends import Filterbank

    heard = getattr(model, "patches", None)
    return heard.maps(tokens) if isinstance(heard, Filterbank) else []


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


def _layer(row: "BackboneConfig", mixer: str, tokens: int, activation_bytes: int) -> int:
    """What a layer keeps for the backward beside the stream, in bytes."""
    d, d_inner, width = row.d_model, row.mamba.expand * row.d_model, row.mlp_width(mixer)
    if mixer == "attention":
        # the norm's output, q, k and v, q and k turned, and what is seen, once by head and once by token
        numbers = 8 * d
    else:
        # the norm's output, both halves of in_proj, and the scan's input, step and output, for each direction
        directions = 1 if row.bidirectional is None else 2
        # one block's B and C are next to nothing
        matrices = 2 * row.mamba.d_state * (row.mamba.heads - 1)
        numbers = d + (5 * d_inner + matrices) * directions
    if width:
        # the norm's output, both halves of fc1, the gate and the product
        numbers += d + 4 * width
    return _strands(row) * tokens * activation_bytes * numbers


def _stream(row: "BackboneConfig", tokens: int) -> int:
    """The residual stream, in float32."""
    return _strands(row) * tokens * 4 * row.d_model


def _strands(row: "BackboneConfig") -> int:
    return 2 if row.reverse_complement else 1


def _kept(row: "BackboneConfig", tokens: int, activation_bytes: int) -> int:
    """What a row of blocks keeps for the backward, in bytes."""
    layers = [_layer(row, mixer, tokens, activation_bytes) for mixer in row.mixers]
    kept = max(layers) if row.checkpoint_activations else sum(layers)
    return kept + _stream(row, tokens) * sum(2 if row.mlp_width(mixer) else 1 for mixer in row.mixers)


def inference_memory(model: "Task", config: "BackboneConfig", tokens: int, activation_bytes: int) -> float:
    """An estimate in bytes: weights, the state, and what a layer has at once of the tokens that it reads."""
    weights = activation_bytes * sum(p.numel() for p in model.parameters())
    state, layers = 0, [(4 + activation_bytes) * numbers for numbers in _maps(model, tokens)]
    for row, length in _rows(config, -(-tokens // model.hparams.get("patch", 1))):
        for mixer in row.mixers:
            state += _state(row, mixer, activation_bytes)
            layers.append(_layer(row, mixer, length, activation_bytes) + _stream(row, length))
    return weights + state + max(layers)


def _state(row: "BackboneConfig", mixer: str, activation_bytes: int) -> int:
    """What a layer remembers of a sequence, in bytes."""
    if not row.causal:
        return 0
    if mixer == "attention":
        return 2 * row.attention.window * row.d_model * activation_bytes
    mamba = row.mamba
    return mamba.expand * row.d_model * (4 * mamba.d_state + activation_bytes * (mamba.d_conv - 1))
