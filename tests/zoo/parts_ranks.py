"""What each rank of a group does with its part of a sequence, compared with the whole; test_parallel.py runs it."""

import itertools
import os

import torch
import torch.distributed as dist
from mambazoo.zoo.config import MambaConfig
from mambazoo.zoo.mamba import Mamba
from mambazoo.zoo.parts import Parts

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
kinds = [
    {}, {"a_init": "s4d-lin"}, {"selective": ("B", "C")}, {"selective": ("delta",), "discretization": "zoh"},
    {"d_conv": 1}, {"heads": 4, "B_bias": True, "a_init": "s4d-lin"},
]  # fmt: skip
for values, dtype in itertools.product(kinds, (torch.float64, torch.float32)):
    torch.manual_seed(0)
    mixer = Mamba(8, MambaConfig(**values)).to(dtype)
    with torch.no_grad():
        # steps so small that a state lives through all parts
        mixer.delta_bias.sub_(2)
    x = torch.randn(2, 12 * size, 8, dtype=dtype)
    dy = torch.randn_like(x)

    whole = x.clone().requires_grad_()
    y, _ = mixer(whole)
    y.backward(dy)
    expected = {name: p.grad.clone() for name, p in mixer.named_parameters()}
    mixer.zero_grad()

    mine = slice(12 * rank, 12 * (rank + 1))
    part = x[:, mine].clone().requires_grad_()
    mixer.parts = Parts(dist.group.WORLD, rank, size)
    y_part, _ = mixer(part)
    y_part.backward(dy[:, mine])
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(y_part, y[:, mine], **tolerance)
    torch.testing.assert_close(part.grad, whole.grad[:, mine], **tolerance)
    for name, p in mixer.named_parameters():
        dist.all_reduce(p.grad)
        torch.testing.assert_close(
            p.grad, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )
    # what came from the part before matters
    if rank and not values:
        mixer.parts = None
        assert not torch.allclose(mixer(part)[0], y_part, rtol=1e-3)
dist.destroy_process_group()
os._exit(0)
