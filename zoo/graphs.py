"""A backbone's training step as CUDA graphs: what the host would launch a thousand times over, it launches once.

Layers of small models are many kernels of a few microseconds, and a step waits for the processor that launches them.
Here the GPU records what a batch of each shape runs, forward and backward, and replays it from then on. Nothing is
compiled: these are the same kernels, and so the same bits.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Attention
from .unet import UNet

# shapes that are recorded; what comes after is launched kernel by kernel
MOST = 64

Run = Callable[..., tuple[Tensor, Any]]


class Graphs:
    """What a backbone's forward becomes: replays of recorded graphs while it trains, and else what it was.

    Args:
        backbone: called as a Backbone or a UNet is.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone, self.run = backbone, backbone.forward
        # these ask the GPU where packed sequences begin
        self._packs = not any(isinstance(module, Attention | UNet) for module in backbone.modules())
        self._recorded: dict[tuple[Any, ...], _Graph] = {}
        # graphs take turns, so that the memory of what lies between their ends, and of gradients, may be the same
        self._pool: Any = None
        self._gradients: dict[Tensor, Tensor] = {}
        self._turn: Callable[[], _Turn | None] = _nobody

    def __call__(self, x: Tensor, *, state: Any = None, **places: Tensor | None) -> tuple[Tensor, Any]:
        """Map x (b, l, d_model); places are cu_seqlens or lengths."""
        given = {name: place for name, place in places.items() if place is not None}
        graph = self._graph(x, given) if state is None else None
        if graph is None:
            return self.run(x, state=state, **given)
        turn = _Turn(graph)
        self._turn = weakref.ref(turn)
        y: Tensor = _Replay.apply(turn, x, *given.values(), *self.backbone.parameters())  # type: ignore[no-untyped-call]
        return y, None

    def _graph(self, x: Tensor, places: dict[str, Tensor]) -> "_Graph | None":
        """The graph of such a batch; None where nothing is trained, or another batch waits for its backward."""
        weights = list(self.backbone.parameters())
        needs = (x.requires_grad, *(weight.requires_grad for weight in weights))
        trains = self.backbone.training and torch.is_grad_enabled() and any(needs)
        if (
            not (trains and x.is_cuda)
            or self._turn() is not None
            or ("cu_seqlens" in places and not self._packs)
        ):
            return None
        shapes = [(name, tuple(place.shape), place.dtype) for name, place in places.items()]
        key = (tuple(x.shape), x.dtype, torch.is_autocast_enabled("cuda"), *shapes, needs)
        if key not in self._recorded:
            if len(self._recorded) == MOST:
                return None
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            for weight in weights:
                if weight.requires_grad and weight not in self._gradients:
                    self._gradients[weight] = torch.empty_like(weight)
            self._recorded[key] = _Graph(
                self.run, self.backbone, x, places, weights, self._gradients, self._pool
            )
        return self._recorded[key]


def _nobody() -> None:
    """No batch waits for its backward."""


class _Graph:
    """One shape's forward and backward, and the memory that they read and write."""

    def __init__(
        self,
        run: Run,
        backbone: nn.Module,
        x: Tensor,
        places: dict[str, Tensor],
        weights: Sequence[Tensor],
        gradients: dict[Tensor, Tensor],
        pool: Any,
    ) -> None:
        self.x = x.detach().clone().requires_grad_(x.requires_grad)
        self.places = {name: place.clone() for name, place in places.items()}
        wanted = [tensor for tensor in (self.x, *weights) if tensor.requires_grad]
        kind, on = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")

        def forward() -> Tensor:
            # copies of weights in 16 bits, were they kept, would be those of the first step for ever
            with torch.autocast("cuda", kind, enabled=on, cache_enabled=False):
                return run(self.x, **self.places)[0]

        def backward(y: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(y, wanted, self.dy, allow_unused=True)

        # once so that kernels are compiled and libraries have their memory, without another trace
        kept = [(buffer, buffer.clone()) for buffer in backbone.buffers()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.random.fork_rng(devices=[x.device]), torch.cuda.stream(stream):
            y = forward()
            self.dy = torch.zeros_like(y)
            backward(y)
            del y
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)

        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # other threads, which pin batches and write checkpoints, go on meanwhile
        with torch.cuda.graph(self.forward, pool=pool, capture_error_mode="thread_local"):
            y = forward()
        # where each gradient goes: a weight's to one place, whatever the shape
        sinks = [gradients[t] if t in gradients else torch.empty_like(t) for t in wanted]
        self.gradients: list[Tensor | None] = []
        with torch.cuda.graph(self.backward, pool=pool, capture_error_mode="thread_local"):
            for sink, gradient in zip(sinks, backward(y), strict=True):
                self.gradients.append(None if gradient is None else sink.copy_(gradient))
        self.y = y.detach()


class _Turn:
    """A batch between its forward and its backward: as long as there is one, no other batch is replayed."""

    def __init__(self, graph: _Graph) -> None:
        self.graph = graph


class _Replay(torch.autograd.Function):
    """A graph as autograd sees it, from x and the weights to y."""

    @staticmethod
    def forward(ctx: Any, turn: _Turn, x: Tensor, *others: Tensor) -> Tensor:
        graph = turn.graph
        ctx.turn = turn
        graph.x.detach().copy_(x)
        for place, given in zip(graph.places.values(), others, strict=False):
            place.copy_(given)
        graph.forward.replay()
        return graph.y.view_as(graph.y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.turn is None:
            raise RuntimeError(
                "callbacks.compile.mode: graphs takes the gradient of a batch once; set it to null to take it again"
            )
        graph, ctx.turn = ctx.turn.graph, None
        graph.dy.copy_(dy)
        graph.backward.replay()
        found = iter(None if gradient is None else gradient.detach() for gradient in graph.gradients)
        return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
