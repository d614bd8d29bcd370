"""The verb `info`: what a model is made of, and the memory it takes."""

import json
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    d_inner = config.mamba.expand * config.d_model
    # the float32 stream, the norm's output, both halves of in_proj, and the scan's input, step and output
    per_layer = tokens * (4 * config.d_model + activation_bytes * (config.d_model + 5 * d_inner))
    kept = per_layer * (1 if config.checkpoint_activations else config.n_layers)
    streams = tokens * 4 * config.d_model * config.n_layers if config.checkpoint_activations else 0
    logits = min(tokens * model.hparams.get("vocab_size", 0) * activation_bytes, CHUNK)
    return weights + kept + streams + logits


def inference_memory(model: "Task", config: "BackboneConfig", tokens: int, activation_bytes: int) -> float:
    """An estimate in bytes: weights, the state, and what a layer has at once of the tokens that it reads."""
    weights = activation_bytes * sum(p.numel() for p in model.parameters())
    d_inner = config.mamba.expand * config.d_model
    state = (
        config.n_layers * d_inner * (4 * config.mamba.d_state + activation_bytes * (config.mamba.d_conv - 1))
    )
    # the float32 stream and the norm's output, both halves of in_proj, and the scan's input, step and output
    layer = tokens * (4 * config.d_model + activation_bytes * (config.d_model + 5 * d_inner))
    return weights + state + layer
