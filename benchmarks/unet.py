"""How fast the U-Net of audio/digits trains and writes: samples a second, and the share of the scan.

    python benchmarks/unet.py >> results.jsonl

A line is one number, as `mambazoo bench` writes them. Training is eager, in bfloat16, on rows of one second; writing is
as `mambazoo generate` does it, with weights in float32 and in bfloat16. The share is of the time in all GPU kernels.
"""

# mypy: allow-untyped-calls

import json
import shlex
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from mambazoo.recipes.runs import origin
from mambazoo.zoo.audio import WaveformModel
from mambazoo.zoo.generate import Sampling, generate
from mambazoo.zoo.optim import cast
from torch.profiler import ProfilerActivity, profile

BACKBONE = {"d_model": 64, "n_layers": 8, "pool": [4, 4]}
# the kernels of a scan and its gradients (kernels/scan_triton*.py), by a part of their names
SCAN = (
    "matrices_kernel",
    "chunk_states",
    "carry_kernel",
    "scan_fwd",
    "forward_sweep",
    "backward_sweep",
    "chunk_grads",
)


def wait(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def train(device: str, batch: int, length: int, steps: int) -> Iterator[dict[str, Any]]:
    model = WaveformModel(BACKBONE).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device == "cuda")
    codes = torch.randint(256, (batch, length + 1), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            logits, _ = model(codes[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), codes[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(min(6, steps)):
        step()
    start = wait(device)
    for _ in range(steps):
        step()
    rate = steps * batch * length / (wait(device) - start)
    shape = f"{batch} x {length}"
    yield {"name": "training", "shape": shape, "value": round(rate), "unit": "samples/s"}
    if device == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            step()
            wait(device)
        times = {event.key: event.self_device_time_total for event in seen.key_averages()}
        scan = sum(taken for name, taken in times.items() if any(part in name for part in SCAN))
        share = round(scan / sum(times.values()), 3)
        yield {"name": "the scan's share of it", "shape": shape, "value": share, "unit": "of kernels"}


def write(device: str, batch: int, steps: int) -> Iterator[dict[str, Any]]:
    for dtype in (torch.float32, torch.bfloat16):
        model = cast(WaveformModel(BACKBONE), dtype).to(device).eval()
        assert isinstance(model, WaveformModel)
        # what is compiled and captured comes in the first quarter
        drawn = generate(model, [[128]] * batch, steps, Sampling(temperature=1.0), seeds=list(range(batch)))
        for _ in range(steps // 4):
            next(drawn)
        start = wait(device)
        count = batch * sum(1 for _ in drawn)
        rate = round(count / (wait(device) - start))
        name = f"writing, {str(dtype).removeprefix('torch.')}"
        yield {"name": name, "shape": f"batch {batch}", "value": rate, "unit": "samples/s"}


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=16000, help="samples of a row to train on")
    parser.add_argument(
        "--steps", type=int, default=20, help="timed steps of training; written are 200 times as many"
    )
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command = shlex.join(["python", "benchmarks/unet.py", *sys.argv[1:]])
    torch.manual_seed(0)
    for rows in (
        train(device, given.batch, given.length, given.steps),
        write(device, given.batch, 200 * given.steps),
    ):
        for row in rows:
            print(json.dumps({"suite": "unet", **row, **origin(command)}), flush=True)


if __name__ == "__main__":
    main()
