"""The operators and the models on a GPU, where there is one."""

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
