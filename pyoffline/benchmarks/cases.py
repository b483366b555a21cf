"""What a benchmarked loss is: its own call, the same in plain PyTorch, its peers and its floor.

Every call is a function of (hidden, weight, inputs) that returns a scalar to run backward on, or
log-probs when no gradient is wanted. Not here: the calls (one module per op), timing.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pyoffline.benchmarks.floor import GEMMS
from pyoffline.benchmarks.providers import Provider, eager, torch_compiled
from pyoffline.benchmarks.shapes import Inputs, Shape

Call = Callable[[Tensor, Tensor, Inputs], Tensor]


@dataclass(frozen=True)
class Case:
    """A name of `--op`. `products`: GEMMs that the method needs; `floor`: those of the bar."""

    name: str
    ours: Call
    torch: Call
    bar: Callable[[Shape, str, str], float | None]  # shape, dtype, device
    floor: tuple[str, ...] = GEMMS
    products: int = 3
    grads: tuple[bool, bool] = (True, True)  # hidden, weight
    more_peers: tuple[Provider, ...] = ()

    @property
    def peers(self) -> tuple[Provider, ...]:
        """Plain PyTorch, torch.compile of it, and what else computes this loss."""
        return (eager(self.torch), torch_compiled(self.torch), *self.more_peers)

    def step(self, call: Call, inputs: Inputs) -> Callable[[], Tensor]:
        """One forward and, where gradients are wanted, backward."""

        def run():
            out = call(inputs.hidden, inputs.weight, inputs)
            if out.requires_grad:
                out.backward()
            return out

        return run

    def prepare(self, inputs: Inputs) -> None:
        """Set which gradients are formed, and drop old ones."""
        inputs.want_grads(*self.grads)
        inputs.clear_grads()

    def flop(self, shape: Shape) -> int:
        """Of the method: 2NDV per product."""
        return self.products * shape.gemm_flop

    def grad_nbytes(self, shape: Shape, itemsize: int) -> int:
        """Bytes of the gradients that a run leaves behind."""
        hidden, weight = self.grads
        return (hidden * shape.n * shape.d + weight * shape.v * shape.d) * itemsize
