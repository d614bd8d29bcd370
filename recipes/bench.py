"""The verb `bench`: time training and generation beside what else is installed, once the scan proves right.

One JSON object a measurement, then a table with ratios. Peers, transformers' MambaForCausalLM and mambapy,
are compared when they can be imported.
"""

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

NAME, SUMMARY = "bench", "time training and generation against what else is installed"

# the model of the comparison: 4 layers of width 256 on 8 sequences of 512 tokens
_D_MODEL, _LAYERS, _VOCAB, _BATCH, _LENGTH = 256, 4, 256, 8, 512
_LENGTHS = (1024, 4096, 16384, 65536)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "suite", nargs="*", default=["train", "length", "generate"], help="train, length, generate"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each; the median counts")
    parser.add_argument("--no-peers", action="store_true", help="time this package alone")
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file")


def run(arguments: Namespace) -> int:
    suites = {"train": _train, "length": _length, "generate": _generate}
    for name in arguments.suite:
        if name not in suites:
            raise ValueError(f"bench: there is no suite {name!r}; choose from {', '.join(suites)}")
    from .launch import reuse_memory
    from .runs import environment

    reuse_memory()
    _verify()

    surroundings = environment()
    rows: list[dict[str, Any]] = []
    for name in arguments.suite:
        for row in suites[name](arguments.repeats, not arguments.no_peers):
            rows.append(row)
            line = json.dumps(
                {**row, **{key: surroundings[key] for key in ("command", "commit", "hardware", "versions")}}
            )
            print(json.dumps(row), flush=True)
            if arguments.output:
                with arguments.output.open("a") as file:
                    file.write(line + "\n")
    print("\n" + _table(rows))
    return 0


def _verify() -> None:
    """Refuse to time a scan that is wrong."""
    import torch

    from ..kernels.scan import selective_scan

    torch.manual_seed(0)
    u, delta, z = (torch.randn(2, 70, 24) for _ in range(3))
    B, C = (torch.randn(2, 70, 16) for _ in range(2))
    A, D = -torch.rand(24, 16) * 8, torch.randn(24)
    ours, truth = (
        selective_scan(u, delta, A, B, C, D, z, delta_softplus=True, backend=name)[0]
        for name in (None, "reference")
    )
    error = float((ours - truth).norm() / truth.norm())
    if not error < 1e-5:
        raise ValueError(f"bench: the scan differs from the reference by {error:.1e}; nothing is timed")


def _median(repeats: int, call: Callable[[], Any], warmups: int = 1) -> float:
    for _ in range(warmups):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _ours() -> Any:
    from ..zoo.language import LanguageModel

    return LanguageModel({"d_model": _D_MODEL, "n_layers": _LAYERS}, _VOCAB)


def _transformers() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(
        MambaConfig(hidden_size=_D_MODEL, num_hidden_layers=_LAYERS, vocab_size=_VOCAB, state_size=16)
    )


def _mambapy() -> Any:
    # its language model cannot be imported without another package; this is the same around its backbone
    from mambapy.mamba import Mamba, MambaConfig
    from torch import nn

    return nn.Sequential(
        nn.Embedding(_VOCAB, _D_MODEL),
        Mamba(MambaConfig(d_model=_D_MODEL, n_layers=_LAYERS)),
        nn.RMSNorm(_D_MODEL),
        nn.Linear(_D_MODEL, _VOCAB, bias=False),
    )


def _training_step(model: Any, logits: Callable[[Any], Any], tokens: Any) -> None:
    import torch.nn.functional as F

    model.zero_grad()
    F.cross_entropy(logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()


def _train(repeats: int, peers: bool) -> list[dict[str, Any]]:
    """Tokens a second of a forward and backward at 8 x 512."""
    import torch

    torch.manual_seed(0)
    tokens = torch.randint(_VOCAB, (_BATCH, _LENGTH + 1))
    contenders: list[tuple[str, Callable[[], Any], Callable[[Any], Callable[[Any], Any]]]] = [
        ("mambazoo", _ours, lambda model: lambda x: model(x)[0]),
    ]
    if peers:
        contenders += [
            ("mambapy (pscan)", _mambapy, lambda model: model),
            ("transformers (slow path)", _transformers, lambda model: lambda x: model(x).logits),
        ]
    rows = []
    for name, build, logits in contenders:
        try:
            model = build()
        except ImportError:
            continue
        slow = name.startswith("transformers")
        # a step of the slow path takes minutes: it is timed once, after a step on a few tokens
        if slow:
            _training_step(model, logits(model), tokens[:1, :17])
        seconds = _median(
            1 if slow else repeats,
            partial(_training_step, model, logits(model), tokens),
            0 if slow else 1,
        )
        rows.append(_row("train", name, f"{_BATCH} x {_LENGTH}", _BATCH * _LENGTH / seconds, "tokens/s"))
    return rows


def _length(repeats: int, peers: bool) -> list[dict[str, Any]]:
    """Tokens a second of a forward and backward on one sequence, over its length."""
    import torch

    model, rows = _ours(), []
    for length in _LENGTHS:
        tokens = torch.randint(_VOCAB, (1, length + 1))
        seconds = _median(
            1 if length > 20000 else repeats, partial(_training_step, model, lambda x: model(x)[0], tokens)
        )
        rows.append(_row("length", "mambazoo", f"1 x {length}", length / seconds, "tokens/s"))
    return rows


def _generate(repeats: int, peers: bool) -> list[dict[str, Any]]:
    """Tokens a second of greedy decoding from short and long prompts, batch 1."""
    import torch

    from ..zoo.generate import Sampling, generate

    count, rows = 100, []
    model = _ours().eval()
    for prompt_length in (16, 2048):
        prompt = torch.randint(_VOCAB, (prompt_length,)).tolist()
        steps = generate(model, [prompt], count + 1, Sampling(temperature=0))
        next(steps)
        start = time.perf_counter()
        made = sum(1 for _ in steps)
        rows.append(
            _row(
                "generate",
                "mambazoo",
                f"prompt {prompt_length}",
                made / (time.perf_counter() - start),
                "tokens/s",
            )
        )
    if peers:
        try:
            peer = _transformers().eval()
        except ImportError:
            return rows
        tokens = torch.randint(_VOCAB, (1, 16))
        with torch.inference_mode():
            seconds = _median(
                1,
                lambda: peer.generate(tokens, max_new_tokens=count, min_new_tokens=count, do_sample=False),
                0,
            )
        rows.append(_row("generate", "transformers (slow path)", "prompt 16", count / seconds, "tokens/s"))
    return rows


def _row(suite: str, name: str, shape: str, value: float, unit: str) -> dict[str, Any]:
    return {"suite": suite, "name": name, "shape": shape, "value": round(value, 1), "unit": unit}


def _table(rows: list[dict[str, Any]]) -> str:
    """The measurements, each with how many times faster the first of its suite is."""
    lines = ["| suite | what | shape | tokens/s | mambazoo is |", "|---|---|---|---|---|"]
    for row in rows:
        first = next(other for other in rows if other["suite"] == row["suite"])
        ratio = "" if row["name"] == "mambazoo" else f"{first['value'] / row['value']:.1f}x as fast"
        lines.append(f"| {row['suite']} | {row['name']} | {row['shape']} | {row['value']:,.0f} | {ratio} |")
    return "\n".join(lines)
