"""The verb `bench`: time training and generation beside what else is installed, once the scan proves right.

One JSON object a measurement, then a table. Here are the suites for a CPU, with transformers' MambaForCausalLM and
mambapy beside them when they can be imported; bench_gpu.py has those for a GPU.
"""

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

NAME, SUMMARY = "bench", "time training and generation against what else is installed"

# the model of the comparison: 4 layers of width 256 on 8 sequences of 512 tokens
_D_MODEL, _LAYERS, _VOCAB, _BATCH, _LENGTH = 256, 4, 256, 8, 512
_LENGTHS = (1024, 4096, 16384, 65536)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "suite",
        nargs="*",
        help="train, length, generate; on a GPU scan, operators, models, decode, attention (default: all)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each; the median counts")
    parser.add_argument("--no-peers", action="store_true", help="time this package alone")
    parser.add_argument("--output", help="append the JSON lines to this file")


def run(arguments: Namespace) -> int:
    import torch

    from . import bench_gpu
    from .dna import check_output

    if arguments.repeats < 1:
        raise ValueError(f"--repeats: must be 1 or more, not {arguments.repeats}")
    output = None if arguments.output is None else check_output(arguments.output)
    on_gpu = torch.cuda.is_available()
    suites = bench_gpu.SUITES if on_gpu else {"train": _train, "length": _length, "generate": _generate}
    for name in arguments.suite:
        if name not in suites:
            raise ValueError(
                f"bench: there is no suite {name!r} for {'a GPU' if on_gpu else 'a CPU'}; "
                f"choose from {', '.join(suites)}"
            )
    from .launch import reuse_memory
    from .runs import origin

    if on_gpu:
        # graphs are captured on any stream but the default one
        torch.cuda.set_stream(torch.cuda.Stream())
    else:
        reuse_memory()
    _verify("cuda" if on_gpu else "cpu")

    known = origin()
    rows: list[dict[str, Any]] = []
    for name in arguments.suite or suites:
        for row in suites[name](arguments.repeats, not arguments.no_peers):
            rows.append(row)
            line = json.dumps({**row, **known})
            print(json.dumps(row), flush=True)
            if output is not None:
                with output.open("a") as file:
                    file.write(line + "\n")
    print("\n" + table(rows))
    return 0


def _verify(device: str) -> None:
    """Refuse to time a scan whose output or gradients are wrong, as it is timed: narrow and wide on a GPU."""
    import torch

    _compare(device, torch.float32, 72, 1e-5)
    if device == "cuda":
        _compare(device, torch.bfloat16, 512, 1e-2)


def _compare(device: str, dtype: Any, d: int, tolerance: float) -> None:
    import torch

    from ..kernels.scan import selective_scan

    torch.manual_seed(0)
    rows = {"u": (2, 300, d), "delta": (2, 300, d), "B": (2, 300, 16), "C": (2, 300, 16), "z": (2, 300, d)}
    problem = {name: torch.randn(shape).to(dtype) for name, shape in rows.items()}
    problem |= {"A": -torch.rand(d, 16) * 16, "D": torch.randn(d), "delta_bias": torch.randn(d)}
    weight, results = torch.randn(2, 300, d).to(dtype), []
    for place, backend in (("cpu", "reference"), (device, None)):
        inputs = {
            name: (x.double() if backend else x.to(place)).requires_grad_() for name, x in problem.items()
        }
        y, _ = selective_scan(**inputs, delta_softplus=True, backend=backend)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(y, list(inputs.values()), weight.to(y))
        results.append([x.detach().cpu().double() for x in (y, *gradients)])
    for name, truth, found in zip(("y", *problem), *results, strict=True):
        error = float((found - truth).norm() / truth.norm())
        if not error < tolerance:
            raise ValueError(f"bench: {name} differs from the reference by {error:.1e}; nothing is timed")


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


def table(rows: list[dict[str, Any]]) -> str:
    """The measurements: beside peers, how many times faster the first of a suite is; beside a floor, its share."""
    lines = ["| suite | what | shape | measured | |", "|---|---|---|---|---|"]
    for row in rows:
        first = next(other for other in rows if other["suite"] == row["suite"])
        remark = ""
        if "floor" in row:
            remark = f"floor {row['floor']:.3f} {row['unit']}, {row['share']:.0%} of it reached"
        elif "times" in row:
            remark = f"{row['faster']} is {row['times']:.1f}x as fast"
        elif "gib" in row:
            remark = f"{row['gib']} GiB"
        elif first["name"] == "mambazoo" != row["name"]:
            remark = f"mambazoo is {first['value'] / row['value']:.1f}x as fast"
        if "mamba_ssm" in row:
            remark += f"; mamba_ssm {row['mamba_ssm']} {row['unit']}"
        value = f"{row['value']:,.0f}" if row["value"] >= 100 else f"{row['value']:.3g}"
        lines.append(
            f"| {row['suite']} | {row['name']} | {row['shape']} | {value} {row['unit']} | {remark} |"
        )
    return "\n".join(lines)
