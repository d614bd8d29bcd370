"""The operators and the models on a GPU, where there is one."""

import random
from pathlib import Path

import pytest
import torch
from mambazoo.kernels.conv import causal_conv1d
from mambazoo.kernels.norm import rms_norm
from mambazoo.kernels.scan import selective_scan
from mambazoo.zoo.generate import Sampling, generate
from mambazoo.zoo.language import LanguageModel

from .problems import Options, assert_close, double, gradients, scan_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
@pytest.mark.parametrize(
    "problem",
    [{}, {"groups": 2}, {"constant": ("delta", "B", "C")}, {"complex_": True}, {"without": ("D", "z")}],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 63, 1000])
def test_scan_matches_reference(length: int, problem: Options, dtype: torch.dtype, tolerance: float) -> None:
    if problem.get("complex_") and dtype != torch.float32:
        pytest.skip("complex matrices are float32")
    p = scan_problem(l=length, d=24, n=16, dtype=dtype, **problem)
    truth, h_truth = selective_scan(
        **(wide := double(p)), delta_softplus=True, return_final_state=True, backend="reference"
    )
    on_gpu = {name: x.detach().cuda().requires_grad_() for name, x in p.items()}
    y, h = selective_scan(**on_gpu, delta_softplus=True, return_final_state=True)
    assert_close("y", y.cpu(), truth, tolerance)
    assert_close("final_state", h.cpu(), h_truth, tolerance)
    weights = [torch.randn_like(truth), torch.randn_like(h_truth)]
    found = gradients([y, h], on_gpu, [w.to(x) for w, x in zip(weights, (y, h), strict=True)])
    for name, expected in gradients([truth, h_truth], wide, weights).items():
        assert_close(f"d{name}", found[name].cpu(), expected, tolerance)


def test_packed_scan_matches_reference() -> None:
    p = scan_problem(b=1, l=96, d=24, n=16, sequences=4, dtype=torch.float32)
    bounds = torch.tensor([0, 32, 40, 64, 96], dtype=torch.int32)
    truth, _ = selective_scan(**double(p), delta_softplus=True, cu_seqlens=bounds, backend="reference")
    y, _ = selective_scan(
        **{name: x.cuda() for name, x in p.items()}, delta_softplus=True, cu_seqlens=bounds.cuda()
    )
    assert_close("y", y.cpu(), truth, 2e-5)


def test_conv_and_norm_match_reference() -> None:
    x, weight, bias = torch.randn(2, 100, 24), torch.randn(24, 4), torch.randn(24)
    for call in (
        lambda x, w, b, **o: causal_conv1d(x, w, b, activation="silu", **o)[0],
        lambda x, w, b, **o: rms_norm(x, b, residual=x, **o)[0],
    ):
        truth = call(x.double(), weight.double(), bias.double(), backend="reference")
        assert_close("y", call(x.cuda(), weight.cuda(), bias.cuda()).cpu(), truth, 1e-5)


def test_a_model_writes_on_a_gpu_what_it_writes_on_a_cpu() -> None:
    model = LanguageModel({"d_model": 64, "n_layers": 2}, vocab_size=50).eval()
    torch.nn.init.normal_(model.embedding.weight, std=0.3)
    prompts = [[1, 2, 3], [4]]
    texts = [
        list(generate(model.to(device), prompts, 40, Sampling(temperature=0))) for device in ("cpu", "cuda")
    ]
    assert texts[0] == texts[1]


def test_autocast_trains(tmp_path: Path) -> None:
    model = LanguageModel({"d_model": 64, "n_layers": 2}, vocab_size=50).cuda()
    tokens = torch.randint(50, (4, 65), device="cuda")
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    exact = model.training_loss(batch)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model.training_loss(batch)
    loss.backward()
    assert abs(loss.item() - exact.item()) < 0.02
    assert all(p.grad.isfinite().all() for p in model.parameters())


# each compiles once; lengths, batches and values are drawn anew every time
SPECIALISATIONS = [
    {"d": d, "n": n, "dtype": dtype, "options": options, "reverse": reverse, "discretization": discretization}
    for d, n, dtype, options, reverse, discretization in [
        (64, 16, torch.float32, {}, False, "euler"),
        (64, 16, torch.bfloat16, {}, False, "euler"),
        (64, 16, torch.float16, {}, True, "euler"),
        (33, 5, torch.float32, {}, False, "zoh"),
        (96, 16, torch.bfloat16, {"groups": 2}, True, "euler"),
        (48, 8, torch.float32, {"groups": 3}, False, "zoh"),
        (64, 16, torch.float32, {"constant": ("delta", "B", "C")}, False, "zoh"),
        (40, 4, torch.float32, {"constant": ("B",)}, True, "zoh"),
        (64, 64, torch.float32, {}, False, "euler"),
        (1, 1, torch.float32, {}, False, "euler"),
        (64, 16, torch.bfloat16, {"without": ("D", "z", "delta_bias", "initial_state")}, False, "euler"),
        (130, 20, torch.bfloat16, {"without": ("z",)}, False, "euler"),
        (768, 16, torch.bfloat16, {}, False, "euler"),
        (64, 8, torch.float32, {"complex_": True}, False, "euler"),
        (48, 5, torch.float32, {"complex_": True, "groups": 3, "B_bias": True}, True, "euler"),
        (96, 16, torch.bfloat16, {"groups": 2, "B_bias": True}, False, "euler"),
    ]
]


@pytest.mark.parametrize("case", range(len(SPECIALISATIONS)))
def test_fuzz(case: int) -> None:
    """2,000 problems in all, each named by its seed where it fails."""
    fixed = dict(SPECIALISATIONS[case])
    options, dtype = fixed.pop("options"), fixed.pop("dtype")
    tolerance = {torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 8e-3}[dtype]
    flags = {name: fixed.pop(name) for name in ("reverse", "discretization")}
    for seed in range(case * 1000, case * 1000 + 2000 // len(SPECIALISATIONS) + 1):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        # sums of a few rounded terms may cancel: 16-bit problems are never that short
        lengths = [1, 2, 3] * (dtype == torch.float32) + [17, 63, 64, 65, 70, 100, 129, 200]
        length, packed = draw.choice(lengths), draw.random() < 0.3
        sequences = draw.randint(1, 5) if packed else None
        bounds = None
        if packed:
            cuts = sorted(draw.randint(0, length) for _ in range(sequences - 1))
            bounds = torch.tensor([0, *cuts, length], dtype=torch.int32)
        p = scan_problem(
            b=1 if packed else draw.randint(1, 3),
            l=length,
            sequences=sequences,
            dtype=dtype,
            **fixed,
            **options,
        )
        p = {name: x.detach() for name, x in p.items()}
        p["A"] *= draw.choice([0.1, 1.0, 20.0])
        p["delta"] *= draw.choice([0.1, 1.0, 10.0])
        wide = double(p)
        truth, h_truth = selective_scan(
            **wide,
            delta_softplus=True,
            return_final_state=True,
            cu_seqlens=bounds,
            backend="reference",
            **flags,
        )
        here = {name: x.cuda().requires_grad_() for name, x in p.items()}
        y, h = selective_scan(
            **here, delta_softplus=True, return_final_state=True,
            cu_seqlens=None if bounds is None else bounds.cuda(), backend="triton", **flags,
        )  # fmt: skip
        assert_close(f"seed {seed}: y", y.cpu(), truth, tolerance)
        assert_close(f"seed {seed}: final_state", h.cpu(), h_truth, tolerance)
        weights = [torch.randn_like(x) for x in (y, h)]
        found = gradients([y, h], here, weights)
        weights = [w.cpu().to(torch.complex128 if w.is_complex() else torch.float64) for w in weights]
        for name, expected in gradients([truth, h_truth], wide, weights).items():
            assert_close(f"seed {seed}: d{name}", found[name].cpu(), expected, tolerance)


def test_offsets_beyond_two_to_the_thirty_one() -> None:
    d, tail = 1024, 3000
    length = 2**31 // d + 5000
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of GPU memory")
    torch.cuda.empty_cache()
    A, D = -torch.rand(d, 4, device="cuda") - 0.5, torch.randn(d, device="cuda")
    tensors = {"u": (1, length, d), "delta": (1, length, d), "B": (1, length, 4), "C": (1, length, 4)}
    p = {name: torch.randn(shape, device="cuda", dtype=torch.bfloat16) for name, shape in tensors.items()}
    p |= {"A": A, "D": D}
    inputs = {name: x.requires_grad_() for name, x in p.items()}
    y, _ = selective_scan(**inputs, delta_softplus=True)
    dy = torch.randn_like(y)
    found = dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), dy), strict=True))
    # states decay within tens of steps: the end does not know of the beginning
    last = {
        name: (x[:, -tail:] if x.ndim == 3 else x).detach().clone().requires_grad_() for name, x in p.items()
    }
    short, _ = selective_scan(**last, delta_softplus=True)
    expected = torch.autograd.grad(short, [last["u"], last["delta"], last["B"]], dy[:, -tail:])
    half = tail // 2
    assert_close("y", y[:, -half:], short[:, -half:], 1e-3)
    for name, gradient in zip(("u", "delta", "B"), expected, strict=True):
        assert_close(f"d{name}", found[name][:, -half:], gradient[:, -half:], 2e-2)


def test_extra_memory_is_less_than_a_third() -> None:
    b, l, d, n = 8, 2048, 1536, 16
    p = scan_problem(b=b, l=l, d=d, n=n, dtype=torch.bfloat16, without=("initial_state",))
    p = {name: x.detach().cuda().requires_grad_() for name, x in p.items()}
    weight = torch.randn(b, l, d, device="cuda", dtype=torch.bfloat16)
    given = sum(x.nbytes for x in p.values())

    def run() -> None:
        y, _ = selective_scan(**p, delta_softplus=True)
        torch.autograd.grad(y, list(p.values()), weight)

    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    made = torch.cuda.max_memory_allocated() - before
    # inputs with their gradients, y with its own
    assert given + weight.nbytes + made <= 1.3 * (2 * given + 2 * weight.nbytes)


def test_a_small_training_step_can_be_captured() -> None:
    model = LanguageModel({"d_model": 64, "n_layers": 2}, vocab_size=256).cuda()
    tokens = torch.randint(256, (8, 257), device="cuda")
    batch = {"inputs": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=True)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = model.training_loss(batch)
        loss.backward()
        optimizer.step()
        return loss

    saved = {name: x.clone() for name, x in model.state_dict().items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager = [step().item() for _ in range(4)]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    model.load_state_dict(saved)
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
    captured = []
    for _ in range(4):
        graph.replay()
        captured.append(loss.item())
    assert captured == pytest.approx(eager, rel=1e-5)
    assert captured[-1] < captured[0]
