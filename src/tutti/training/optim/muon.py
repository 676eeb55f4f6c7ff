"""Muon: momentum whose update is orthogonalised, for the matrices of a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from tutti.distributed.sharded_tensors import gather_tensor, shard_like

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The quintic of Keller Jordan 2024: singular values in (0, 1] end near 1 (0.7 to 1.2) after 5 rounds."""


def orthogonalised(
    stacks: Sequence[Float[Tensor, "_ rows _"]], rounds: int
) -> list[Float[Tensor, "_ rows _"]]:
    """About U V^T of each wide matrix G = U S V^T, by `rounds` of a quintic Newton-Schulz iteration.

    X_0 = G / |G|_F;  A = X X^T;  X <- M X with M = a I + b A + c A^2, (a, b, c) = `COEFFICIENTS`. A zero
    matrix gives zero. The stacks have equally many rows, but their own columns.

    A matrix with columns > 2 rows collects P <- M P and A <- M A M instead (M and A commute) and applies
    P to X_0 once at the end: the same in exact arithmetic, and 40 to 60 % fewer FLOPs. These products have
    rows x rows numbers, whatever the columns: one batch for all stacks, which keeps every core busy.

    Source: Keller Jordan 2024, "Muon: an optimizer for hidden layers in neural networks".
    Differs: keeps the dtype it is given, because bfloat16 products are hundreds of times slower on a CPU
    without bfloat16 units. In bfloat16, which `Muon` gives on CUDA, P is not collected: the error of A would
    grow with every round.
    """
    scaled = [x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7) for x in stacks]
    collects = [rounds > 0 and x.shape[2] > 2 * x.shape[1] and x.dtype != torch.bfloat16 for x in stacks]
    long = [x for x, one in zip(scaled, collects, strict=True) if one]
    products: Iterator[Tensor] = iter(())
    if long:
        grams = torch.cat([torch.bmm(x, x.mT) for x in long])
        products = iter(_collected(grams, rounds).split([len(x) for x in long]))
    return [
        torch.bmm(next(products), x) if one else _iterate(x, rounds)
        for x, one in zip(scaled, collects, strict=True)
    ]


def _iterate(x: Float[Tensor, "n rows columns"], rounds: int) -> Float[Tensor, "n rows columns"]:
    a, b, c = COEFFICIENTS
    for _ in range(rounds):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _collected(gram: Float[Tensor, "n rows rows"], rounds: int) -> Float[Tensor, "n rows rows"]:
    """The product P of the factors M of all rounds, from A = X_0 X_0^T."""
    a, b, c = COEFFICIENTS
    product: Tensor | None = None
    for done in range(1, rounds + 1):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else torch.bmm(factor, product)
        if done < rounds:
            gram = torch.bmm(torch.bmm(factor, gram), factor)
    assert product is not None, "no rounds"
    return product


def newton_schulz_maps(stack: Float[Tensor, "n rows columns"], rounds: int) -> Float[Tensor, "n rows rows"]:
    """Q of each wide matrix G, with `orthogonalised`(G) = Q G in exact arithmetic: a polynomial in G G^T."""
    length = torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True) + 1e-7
    scaled = stack / length
    return _collected(torch.bmm(scaled, scaled.mT), rounds) / length


def wide_matrix(weight: Tensor) -> Float[Tensor, "rows columns"]:
    """A weight (out, in, ...) as the matrix (out, in * ...), transposed if it has more rows than columns."""
    matrix = weight.reshape(len(weight), -1)
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def divided(
    stacks: Sequence[Float[Tensor, "_ rows _"]], rounds: int, group: dist.ProcessGroup, first: int = 0
) -> list[Float[Tensor, "_ rows _"]]:
    """`orthogonalised`, with the work divided over the ranks of `group`, which all hold the same matrices.

    Rank k mod n iterates matrix k, counted over all stacks from `first` on; one all-gather sends the results.
    """
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    begins = [first + sum(map(len, stacks[:place])) for place in range(len(stacks))]
    portions = [
        [x[(one - begin) % count :: count] for x, begin in zip(stacks, begins, strict=True)]
        for one in range(count)
    ]
    own = orthogonalised([x for x in portions[rank] if len(x)], rounds)
    sizes = [sum(x.numel() for x in portion) for portion in portions]
    sent = stacks[0].new_zeros(max(sizes))
    if own:
        sent[: sizes[rank]] = torch.cat([x.flatten() for x in own])
    received = [torch.empty_like(sent) for _ in range(count)]
    dist.all_gather(received, sent, group=group)
    results = [torch.empty_like(x) for x in stacks]
    for one, portion in enumerate(portions):
        parts = received[one][: sizes[one]].split([x.numel() for x in portion])
        for result, begin, part, x in zip(results, begins, parts, portion, strict=True):
            result[(one - begin) % count :: count] = part.view_as(x)
    return results


_Move = tuple[Tensor, Tensor, float]
"""A parameter, its update as a wide matrix, and its learning rate."""
Made = tuple[list[_Move], Tensor]
"""Moves of matrices of one shape, and their directions as one stack."""


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum for matrices.

    m <- mu m + (1 - mu) g;  u = mu m + (1 - mu) g;  with (rows, columns) the shape of the matrix:

        theta <- (1 - lr * decay) theta - lr * 0.2 sqrt(max(rows, columns)) * NewtonSchulz(u)

    The factor 0.2 sqrt(max(rows, columns)) gives the update the root mean square of an AdamW update, so
    learning rates carry over between shapes (2502.16982). Every parameter needs at least two dimensions;
    a convolution kernel (out, in, kh, kw) counts as the matrix (out, in * kh * kw).

    Source: Keller Jordan 2024; scale and decay from 2502.16982.
    Differs from torch.optim.Muon: on a CPU the iteration runs in float32 (on CUDA in bfloat16, as there),
    convolution kernels are accepted, and matrices of equal shape (up to transposition) are iterated as one
    batch. Of sharded matrices (FSDP) the momentum is sharded too; each rank gathers the directions, iterates
    its portion of the matrices, sends the results to the others and moves its share.

    Raises: ValueError for a parameter of fewer than two dimensions.
    """

    iterates: torch.dtype | None = None
    """dtype of the iteration; None: bfloat16 on CUDA, where float32 would leave the tensor cores idle and
    nearly double a step, elsewhere that of the parameters."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        rounds: int = 5,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "rounds": rounds}
        super().__init__(params, defaults)  # pyright: ignore[reportArgumentType]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(
                        f"Muon moves matrices, but was given a parameter of shape {tuple(parameter.shape)}; "
                        "give it to AdamW."
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move every parameter that has a gradient."""
        loss = None if closure is None else closure()
        self._accumulate()
        self._add(self._directions(ahead=False))
        return loss

    @torch.no_grad()
    def prepare(self) -> list[Made]:
        """The directions of a step on the gradients as they are now, for `step_prepared`; nothing moves.

        So nearly all of a step can be queued on a GPU before it is known whether the step is made.
        """
        return list(self._directions(ahead=True))

    @torch.no_grad()
    def step_prepared(self, made: list[Made]) -> None:
        """`step`, to the same bits, by the directions that `prepare` made of the same gradients."""
        self._accumulate()
        self._add(made)

    def _moving(self) -> Iterator[tuple[dict[str, Any], list[Tensor], list[Tensor], list[Tensor]]]:
        """Of each group: its settings, the parameters that have a gradient, their gradients and momenta."""
        for group in self.param_groups:
            if not (parameters := [p for p in group["params"] if p.grad is not None]):
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            gradients = [p.grad for p in parameters if p.grad is not None]
            yield group, parameters, gradients, [self.state[p]["momentum"] for p in parameters]

    def _accumulate(self) -> None:
        """Moves the momenta on; the parameters themselves only decay."""
        for group, parameters, gradients, momenta in self._moving():
            torch._foreach_lerp_(momenta, gradients, 1.0 - group["momentum"])  # pyright: ignore[reportPrivateImportUsage]
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])  # pyright: ignore[reportPrivateImportUsage]

    def _directions(self, *, ahead: bool) -> Iterator[Made]:
        """The directions, one batch a shape over all groups: wide matrices as they are, tall ones transposed
        to the same. `ahead`: the momenta have not been moved on yet."""
        batches: defaultdict[tuple[int, int], defaultdict[int, list[_Move]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for group, parameters, gradients, momenta in self._moving():
            moved = momenta
            if ahead:
                moved = torch._foreach_lerp(momenta, gradients, weight=1.0 - group["momentum"])  # pyright: ignore[reportPrivateImportUsage]
            updates = torch._foreach_lerp(gradients, moved, group["momentum"])  # pyright: ignore[reportPrivateImportUsage]
            for parameter, update in zip(parameters, updates, strict=True):
                whole = gather_tensor(update) if isinstance(update, DTensor) else update
                wide = wide_matrix(whole)
                rows, columns = wide.shape
                rate = group["lr"] * 0.2 * columns**0.5
                batches[group["rounds"], rows][columns].append((parameter, wide, rate))
        done = 0
        for (rounds, _), stacks in batches.items():
            stacked = [self._stacked([wide for _, wide, _ in members]) for members in stacks.values()]
            moves = (move for members in stacks.values() for move in members)
            mesh = next((p.device_mesh for p, _, _ in moves if isinstance(p, DTensor)), None)
            if mesh is None:
                made = orthogonalised(stacked, rounds)
            else:
                made = divided(stacked, rounds, mesh.get_group(), done)
            done += sum(map(len, stacked))
            yield from zip(stacks.values(), made, strict=True)

    def _add(self, made: Iterable[Made]) -> None:
        """theta <- theta - rate * direction."""
        for members, directions in made:
            # All of a shape at once, not some kernels for each: the GPU would wait for their launches.
            whole = directions.to(members[0][0].dtype)
            plain = defaultdict[float, tuple[list[Tensor], list[Tensor]]](lambda: ([], []))
            for (parameter, _, rate), direction in zip(members, whole, strict=True):
                rows = len(parameter)
                moved = direction.mT if rows > parameter.numel() // rows else direction
                step = moved.reshape(parameter.shape).to(parameter.dtype)
                if isinstance(parameter, DTensor):
                    parameter.add_(shard_like(step, parameter), alpha=-rate)
                else:
                    plain[rate][0].append(parameter)
                    plain[rate][1].append(step)
            for rate, (parameters, steps) in plain.items():
                torch._foreach_add_(parameters, steps, alpha=-rate)  # pyright: ignore[reportPrivateImportUsage]

    def _stacked(self, matrices: list[Tensor]) -> Float[Tensor, "n rows columns"]:
        """One batch, in the dtype of the iteration."""
        stack = torch.stack(matrices)
        return stack.to(self.iterates or (torch.bfloat16 if stack.is_cuda else stack.dtype))
