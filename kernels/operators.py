"""Functions on tensors as others see them: one node to compilers, and in eager mode no more than a call.

An operator of torch.library is what torch.compile, torch.export and modes that watch what is called want. The way
through one with a gradient takes the host some 150 microseconds, for the three of a layer of Mamba a quarter of all
that it has to do (docs/log.md); so where nobody watches, the same function runs with the same gradient as an
autograd.Function.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# tensors of other classes have a say in what is called
_PLAIN = (Tensor, torch.nn.Parameter)


class Operator:
    """A function and its operator.

    Args:
        name: of the operator, without its namespace.
        function: from tensors and plain values to new tensors, which are no views of what came in.
        fake: what it returns where tensors have no values, shapes alone.
        gradient: as torch.library takes them, what saves for the backward (ctx, inputs, output) and the backward, whose
            own gradient there is where it calls operators that have one.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., T],
        fake: Callable[..., T],
        gradient: tuple[Callable[..., None], Callable[..., Any]] | None = None,
    ) -> None:
        self.function = function
        self.node = torch.library.custom_op(f"mambazoo::{name}", function, mutates_args=())
        self.node.register_fake(fake)
        self.applied: Callable[..., Any] | None = None
        if gradient is not None:
            save, backward = gradient
            self.node.register_autograd(backward, setup_context=save)

            class Applied(torch.autograd.Function):
                # a setup_context of its own would have PyTorch look up the signature at every call
                @staticmethod
                def forward(ctx: Any, *arguments: Any) -> Any:
                    output = function(*arguments)
                    save(ctx, arguments, output)
                    return output

                @staticmethod
                def backward(ctx: Any, *gradients: Any) -> Any:
                    return backward(ctx, *gradients)

            self.applied = Applied.apply

    def __call__(self, *arguments: Any) -> Any:
        grad = torch.is_grad_enabled()
        if _is_watched(arguments) or (grad and self.applied is None and _needs_gradient(arguments)):
            # an operator without a gradient says so where one is asked for
            return self.node(*arguments)
        return (self.applied if grad and self.applied is not None else self.function)(*arguments)


def _is_watched(arguments: tuple[Any, ...]) -> bool:
    """Whether a compiler, a mode or a tensor of another class is to see which operator is called."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._is_tracing():
        return True
    return any(isinstance(x, Tensor) and (type(x) not in _PLAIN or x.is_meta) for x in arguments)


def _needs_gradient(arguments: tuple[Any, ...]) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
