"""The suites of `bench` for a GPU: kernels beside their floors, training steps, and Mamba beside attention.

A floor is the larger of two times that no implementation goes below: the bytes that must move over the bandwidth of
a copy, measured here, and the exponentials that must be taken over the rate of the special-function units (16 a
clock on each multiprocessor, at the card's highest clock).
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

Row = dict[str, Any]

_SCANS = ((8, 4096, 2048), (8, 2048, 1536), (1, 65536, 1024), (1, 131072, 256))
_STATES = 16
_STEPS = (("mamba-130m", 16, 2048), ("mamba-130m", 2, 16384), ("mamba-370m", 8, 2048))
_VOCAB = 50280
_DEVICE = "cuda"
# b, d and d_head of one layer (Mamba, figure 8), and lengths
_LAYER, _LENGTHS = (1, 1024, 64), tuple(512 << i for i in range(11))
# a Mamba and a Transformer of its size, whose cache is as long as what it will hold
_PROMPT, _COUNT, _BATCHES = 2048, 512, (1, 2, 4, 8, 16, 32, 64, 128)
_DECODERS: dict[str, Row] = {
    "mamba-130m": {"size": "mamba-130m"},
    "transformer-125m": {"size": "transformer-125m", "attention": {"window": _PROMPT + _COUNT}},
}


def milliseconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """The median time of a call, by events; captured in a graph, so that it is its kernels that are timed."""
    import torch

    replay, times = _graph(call), []
    # nothing of what the call reads is left in the L2 cache
    flush = torch.empty(1 << 26, device="cuda", dtype=torch.int32)
    for i in range(repeats + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def bandwidth() -> float:
    """Bytes a millisecond that move when every number of a large array is read and written once."""
    import torch

    source = torch.randn(1 << 29, device="cuda").bfloat16()
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(partial(torch.neg, source, out=target))


def exponentials() -> float:
    """Exponentials a millisecond that the special-function units can take."""
    import torch

    card = torch.cuda.get_device_properties(0)
    return 16 * card.multi_processor_count * float(card.clock_rate)


def scan(repeats: int, peers: bool) -> Iterator[Row]:
    """The scan with z, D, bias and softplus, bfloat16, 16 states, forward and backward."""
    import torch

    from ..kernels.scan import selective_scan

    bytes_ms, exp_ms = bandwidth(), exponentials()
    yield _row("scan", "copy", "1 GiB", bytes_ms / 1e9, "TB/s")
    for shape in _SCANS:
        arguments, dy = _scan_problem(*shape)
        elements = shape[0] * shape[1] * shape[2]
        forward = milliseconds(
            _without_grad(partial(selective_scan, **arguments, delta_softplus=True)), repeats
        )
        y = selective_scan(**arguments, delta_softplus=True)[0]
        inputs = list(arguments.values())
        backward = milliseconds(partial(torch.autograd.grad, y, inputs, dy, retain_graph=True), repeats)
        # u, delta, z in, y out; then those and dy in, three gradients out; an exponential a state, and three for
        # softplus and gate; the backward needs that of each state again, and one on the way back
        floor = max(elements * 8 / bytes_ms, elements * (_STATES + 3) / exp_ms)
        floor_back = max(elements * 14 / bytes_ms, elements * 2 * (_STATES + 3) / exp_ms)
        upstream = _upstream(arguments, dy, repeats) if peers else None
        for name, value, low, k in (("forward", forward, floor, 0), ("backward", backward, floor_back, 1)):
            row = _row("scan", name, _by(shape), value, "ms", floor=low)
            yield row if upstream is None else {**row, "mamba_ssm": round(upstream[k], 3)}
        del arguments, dy, y, inputs

    arguments, _ = _scan_problem(1, 32768, 1024)
    for backend in ("triton", "torch"):
        value = milliseconds(
            _without_grad(partial(selective_scan, **arguments, delta_softplus=True, backend=backend)),
            3,
        )
        yield _row("scan", f"forward, {backend} back end", "1 x 32768 x 1024", value, "ms")
    # as in B2S6: eight blocks of channels with a B and C of their own, complex states, a bias on B
    arguments, dy = _scan_problem(32, 2048, 256)
    for name in ("B", "C"):
        arguments[name] = torch.randn(32, 2048, 8, 8, device=_DEVICE, dtype=torch.complex64).requires_grad_()
    arguments["A"] = torch.complex(-torch.rand(256, 8), 3 * torch.rand(256, 8)).to(_DEVICE).requires_grad_()
    arguments["B_bias"] = torch.randn(256, 8, device=_DEVICE, dtype=torch.complex64).requires_grad_()
    call = partial(selective_scan, **arguments, delta_softplus=True)
    yield _row("scan", "forward of B2S6", "32 x 2048 x 256", milliseconds(_without_grad(call), repeats), "ms")
    backward = milliseconds(
        partial(torch.autograd.grad, call()[0], list(arguments.values()), dy, retain_graph=True), repeats
    )
    yield _row("scan", "backward of B2S6", "32 x 2048 x 256", backward, "ms")
    for length in (65536, 1 << 20):
        arguments, dy = _scan_problem(1, length, 512)
        inputs = list(arguments.values())

        def both(a: Any = arguments, i: Any = inputs, dy: Any = dy) -> None:
            torch.autograd.grad(selective_scan(**a, delta_softplus=True)[0], i, dy)

        value = milliseconds(both, 5)
        yield _row("scan", "forward + backward a token", f"1 x {length} x 512", value * 1e6 / length, "ns")
        del arguments, dy, inputs


def operators(repeats: int, peers: bool) -> Iterator[Row]:
    """Convolution and norm at training shapes, in the share of a copy's bandwidth that they reach; the step kernels."""
    import torch

    from ..kernels.conv import causal_conv1d, causal_conv1d_update
    from ..kernels.norm import rms_norm
    from ..kernels.step import selective_state_update

    bytes_ms = bandwidth()

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()

    def timed(name: str, shape: tuple[int, ...], moved: float, call: Callable[[], Any]) -> Row:
        return _row("operators", name, _by(shape), milliseconds(call, repeats), "ms", floor=moved / bytes_ms)

    for b, l, d in ((8, 4096, 2048), (16, 2048, 1536)):
        x, weight, bias = random(b, l, d), random(d, 4, dtype=torch.float32), random(d, dtype=torch.float32)
        y = causal_conv1d(x, weight, bias, activation="silu")[0]
        dy, size = torch.randn_like(y), x.nbytes
        yield timed(
            "conv + silu forward", (b, l, d), 2 * size,
            _without_grad(partial(causal_conv1d, x, weight, bias, activation="silu")),
        )  # fmt: skip
        yield timed(
            "conv + silu backward", (b, l, d), 3 * size,
            partial(torch.autograd.grad, y, (x, weight, bias), dy, retain_graph=True),
        )  # fmt: skip
    for b, l, d in ((16, 2048, 768), (8, 4096, 1024)):
        x, residual, weight = (
            random(b, l, d),
            random(b, l, d, dtype=torch.float32),
            random(d, dtype=torch.float32),
        )
        y, stream = rms_norm(x, weight, residual=residual)
        grads, size = (torch.randn_like(y), torch.randn_like(stream)), x.nbytes
        yield timed(
            "norm + residual forward", (b, l, d), 6 * size,
            _without_grad(partial(rms_norm, x, weight, residual=residual)),
        )  # fmt: skip
        yield timed(
            "norm + residual backward", (b, l, d), 8 * size,
            partial(torch.autograd.grad, (y, stream), (x, residual, weight), grads, retain_graph=True),
        )  # fmt: skip
    for b in (1, 128):
        d, n = 1536, _STATES
        state, A = torch.randn(b, d, n, device="cuda"), -torch.rand(d, n, device="cuda")
        u, B, D = (x.detach() for x in (random(b, d), random(b, n), random(d, dtype=torch.float32)))
        yield timed(
            "state update", (b, d, n), 2 * state.nbytes + A.nbytes,
            partial(selective_state_update, state, u, u, A, B, B, D, u, D, True),
        )  # fmt: skip
        window, weight, bias = torch.randn(b, 3, d, device="cuda").bfloat16(), random(d, 4).detach(), D
        yield timed(
            "conv update", (b, d, 4), 2 * window.nbytes + 2 * u.nbytes,
            partial(causal_conv1d_update, u, window, weight, bias, activation="silu"),
        )  # fmt: skip


def models(repeats: int, peers: bool) -> Iterator[Row]:
    """Training steps of language models: bfloat16 autocast, fused AdamW, gradients clipped."""
    import torch

    for size, b, l in _STEPS:
        step = training_step(size, b, l)
        for name, call in (("training step", step), ("training step, captured", None)):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            # launched one by one, or all at once as one CUDA graph
            call = call or _graph(step)
            seconds = _loop(call, repeats)
            yield {
                **_row("models", f"{size} {name}", f"{b} x {l}", b * l / seconds, "tokens/s"),
                "gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
            }
        del step, call


def _loop(step: Callable[[], Any], repeats: int) -> float:
    """Seconds of a step among others, as in training: none waits for the one before to be over."""
    import torch

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def training_step(size: str, b: int, l: int) -> Callable[[], None]:
    """A step of a language model on random tokens."""
    import torch

    from ..zoo.config import OptimizerConfig
    from ..zoo.language import LanguageModel
    from ..zoo.optim import build_optimizer

    model = LanguageModel({"size": size}, _VOCAB).cuda()
    optimizer, _ = build_optimizer(model, OptimizerConfig(), 100)
    for group in optimizer.param_groups:
        group["capturable"] = True
    tokens = torch.randint(_VOCAB, (b, l + 1), device="cuda")
    batch = {"inputs": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.training_loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def attention(repeats: int, peers: bool) -> Iterator[Row]:
    """The scan over growing lengths, beside PyTorch's causal attention of as many channels."""
    import torch
    import torch.nn.functional as F

    from ..kernels.scan import selective_scan

    b, d, d_head = _LAYER
    for length in _LENGTHS:
        scanned, dy = _scan_problem(b, length, d)
        attended = [scanned["u"].detach().clone().requires_grad_() for _ in "qkv"]

        def scan_(scanned: Any = scanned) -> Any:
            return selective_scan(**scanned, delta_softplus=True)[0]

        def attend(attended: Any = attended) -> Any:
            q, k, v = (x.unflatten(-1, (-1, d_head)).transpose(1, 2) for x in attended)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

        calls = {"scan": (scan_, list(scanned.values())), "sdpa": (attend, attended)}
        for kind in ("forward", "forward + backward"):
            found: dict[str, float] = {}
            for name, (call, inputs) in calls.items():

                def both(call: Any = call, inputs: Any = inputs, dy: Any = dy) -> None:
                    torch.autograd.grad(call(), inputs, dy)

                timed = _without_grad(call) if kind == "forward" else both
                # what takes seconds is timed a few times
                found[name] = milliseconds(timed, repeats if length < 1 << 16 else min(repeats, 3))
                row = _row("attention", f"{name} {kind}", _by((b, length, d)), found[name], "ms")
                yield row if name == "scan" else _beside(row, "the scan", found["sdpa"] / found["scan"])
        del scanned, dy, attended, calls


def decode(repeats: int, peers: bool) -> Iterator[Row]:
    """Tokens a second of greedy decoding after prompts, bfloat16 weights, a captured graph a step."""
    import torch

    from ..zoo.generate import Sampling, generate
    from ..zoo.language import LanguageModel
    from ..zoo.optim import cast

    first: dict[int, float] = {}
    for name, backbone in _DECODERS.items():
        model = LanguageModel(backbone, _VOCAB).to(_DEVICE).eval()
        cast(model, torch.bfloat16)
        for batch in _BATCHES:
            prompts = torch.randint(_VOCAB, (batch, _PROMPT)).tolist()
            steps = generate(model, prompts, _COUNT, Sampling(temperature=0))
            # prefill, the step that compiles, and the capture lie before the clock starts
            for _ in range(4):
                next(steps)
            _wait()
            start = time.perf_counter()
            made = sum(1 for _ in steps)
            speed = made * batch / (time.perf_counter() - start)
            row = _row("decode", name, f"batch {batch}, prompt {_PROMPT}", speed, "tokens/s")
            first.setdefault(batch, speed)
            yield row if name == "mamba-130m" else _beside(row, "mamba-130m", first[batch] / speed)
        del model


SUITES = {
    "scan": scan,
    "operators": operators,
    "models": models,
    "decode": decode,
    "attention": attention,
}


def _scan_problem(b: int, l: int, d: int) -> tuple[dict[str, Any], Any]:
    import torch

    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=_DEVICE, dtype=torch.bfloat16)

    arguments = {
        "u": random(b, l, d),
        "delta": random(b, l, d),
        "A": -torch.rand(d, _STATES, device=_DEVICE) * _STATES - 0.5,
        "B": random(b, l, _STATES),
        "C": random(b, l, _STATES),
        "D": torch.randn(d, device=_DEVICE),
        "z": random(b, l, d),
        "delta_bias": torch.rand(d, device=_DEVICE) * 3 - 6,
    }
    return {name: x.requires_grad_() for name, x in arguments.items()}, random(b, l, d)


def _upstream(arguments: dict[str, Any], dy: Any, repeats: int) -> tuple[float, float] | None:
    """The compiled kernels of mamba_ssm on the same problem, where that package is installed."""
    import torch

    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    own = {
        name: (x.detach().transpose(1, 2).contiguous() if x.ndim == 3 else x.detach()).requires_grad_()
        for name, x in arguments.items()
    }

    def forward() -> Any:
        return selective_scan_fn(**own, delta_softplus=True)

    y, dy = forward(), dy.transpose(1, 2).contiguous()
    backward = milliseconds(
        lambda: torch.autograd.grad(y, list(own.values()), dy, retain_graph=True), repeats
    )
    return milliseconds(_without_grad(forward), repeats), backward


def _without_grad(call: Callable[[], Any]) -> Callable[[], Any]:
    import torch

    return torch.no_grad()(call)


def _graph(call: Callable[[], Any]) -> Callable[[], None]:
    """A captured graph of a call, after a run that compiles what it needs.

    What is captured lies on the current stream, where a backward goes too if its forward did.
    """
    import torch

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    return graph.replay


def _wait() -> None:
    """Until the device has done all that it was given."""
    import torch

    if _DEVICE == "cuda":
        torch.cuda.synchronize()


def _beside(row: Row, other: str, times: float) -> Row:
    """A row that says how many times as fast another one is."""
    return {**row, "faster": other, "times": round(times, 2)}


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _row(suite: str, name: str, shape: str, value: float, unit: str, floor: float | None = None) -> Row:
    row = {
        "suite": suite,
        "name": name,
        "shape": shape,
        "value": round(value, 4 if value < 10 else 1),
        "unit": unit,
    }
    return row if floor is None else {**row, "floor": round(floor, 4), "share": round(floor / value, 3)}
