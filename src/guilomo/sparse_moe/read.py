"""Reads the sparse blocks of a transformers model: experts in fused 3-D parameters behind a softmax router.

gate_up_proj (E, 2 I, d)    rows [0:I] of an expert are its gate, rows [I:2I] its up projection
down_proj    (E, d, I)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from guilomo.errors import GuilomoError, invalid

PROBES = 64
"""Random tokens on which a router is compared with the two forms that are known."""


@dataclass(frozen=True)
class SparseBlock:
    """One sparse feed-forward.

    Attributes:
        name: dotted path. gate, up: ``(E, I, d)``. down: ``(E, d, I)``. router: ``(E, d)`` its rows.
        top_k: K. renormalised: whether the K weights are made to sum to 1.
    """

    name: str
    gate: Tensor
    up: Tensor
    down: Tensor
    router: Tensor
    top_k: int
    renormalised: bool

    @property
    def experts(self) -> int:
        """E."""
        return len(self.down)


def sparse_blocks(model: nn.Module) -> dict[str, SparseBlock]:
    """The sparse feed-forwards of a model by name, such as those of Mixtral, OLMoE, Qwen3-MoE and FlexOlmo.

    Raises:
        GuilomoError: there are none, or one has a part that these do not have (shared experts, biases, another layout
            of the parameters, another router than top-k of a softmax).
    """
    found = {name: _read(name, block) for name, block in model.named_modules() if _is_sparse(block)}
    if not found:
        raise invalid("model", type(model).__name__, "a sparse model whose experts lie in fused 3-D parameters")
    return found


def _is_sparse(block: nn.Module) -> bool:
    parameters = dict(getattr(block, "experts", nn.Module()).named_parameters(recurse=False))
    down = parameters.get("down_proj")
    return down is not None and down.dim() == 3


def _read(name: str, block: nn.Module) -> SparseBlock:
    experts, router = block.get_submodule("experts"), getattr(block, "gate", None)
    parameters = dict(experts.named_parameters(recurse=False))
    others = {child for child, _ in block.named_children()} - {"experts", "gate"}
    odd = [
        *(f"the part {child!r}" for child in sorted(others)),
        *(f"the parameter {key!r}" for key in sorted(parameters.keys() - {"gate_up_proj", "down_proj"})),
        *(["transposed weights"] if getattr(experts, "is_transposed", False) else []),
        *([] if getattr(experts, "is_concatenated", True) else ["interleaved gate and up projections"]),
    ]
    weight = getattr(router, "weight", None)
    if odd or "gate_up_proj" not in parameters or not isinstance(weight, Tensor) or not isinstance(router, nn.Module):
        what = odd[0] if odd else "no gated experts behind a linear router called 'gate'"
        raise GuilomoError(f"The sparse block {name!r} cannot be read: it has {what}, which is not supported.")
    gate, up = parameters["gate_up_proj"].detach().chunk(2, dim=1)
    top_k, renormalised = _routing_of(name, router, weight.detach())
    return SparseBlock(name, gate, up, parameters["down_proj"].detach(), weight.detach(), top_k, renormalised)


@torch.no_grad()
def _routing_of(name: str, router: nn.Module, weight: Tensor) -> tuple[int, bool]:
    """K, and whether the K probabilities are renormalised; found by asking the router, for models name it otherwise."""
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(PROBES, weight.shape[1], generator=generator, device=weight.device).to(weight.dtype)
    training = router.training
    _, weights, chosen = router.eval()(x)
    router.train(training)
    probabilities = (x @ weight.T).float().softmax(-1)
    plain = probabilities.gather(-1, chosen)
    top = probabilities.topk(chosen.shape[-1]).values.sum(-1)
    near = 1e-2 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if torch.allclose(plain.sum(-1), top, rtol=near):
        for renormalised, wanted in ((False, plain), (True, plain / plain.sum(-1, keepdim=True))):
            # A router that keeps all experts is of both forms.
            if torch.allclose(weights.float(), wanted, rtol=near):
                return chosen.shape[-1], renormalised
    raise GuilomoError(
        f"The router of the sparse block {name!r} ({type(router).__name__}) is not the top-k of a softmax, "
        "renormalised or not: other routers are not supported."
    )
