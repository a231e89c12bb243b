"""autoround: rounding offsets and block ranges of a whole layer, tuned by the signs of their gradients on its output.

Offsets V in [-0.5, 0.5] of a step are added before rounding; the straight-through estimate treats rounding as the
identity. The planes come from the reference's own rule, so what is trained is exactly what is stored.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.algos.algo import Algo, Encoded, Run, encode_plainly, shared_planes
from fewbit.algos.offsets import Rounding, begin, dense, finish, move
from fewbit.errors import SpecError
from fewbit.quant.qtensor import QTensor
from fewbit.quant.reference import decode, encode
from fewbit.quant.spec import QuantSpec


@dataclass(frozen=True, slots=True)
class Options:
    """batch: sequences a step, seed: which when. minmax: tune ranges too. lr, minmax_lr: 0 = 1 and 0.4 / iters.

    search: start from the ranges that lose least of the weights. relative: errors of a token count in units of its own
    size, which is what the next norm makes of them; else the few huge tokens of a model drown all others. soft: steps
    shrink where the gradient is mostly noise (20 steps leave a fifth less error); without, every step is full.
    """

    iters: int = 200
    lr: float = 0.0
    minmax_lr: float = 0.0
    batch: int = 8
    minmax: bool = True
    search: bool = True
    relative: bool = True
    soft: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.iters < 1 or self.batch < 1 or self.lr < 0 or self.minmax_lr < 0:
            raise SpecError(f"autoround: want iters and batch >= 1, lr and minmax_lr >= 0, found {self}")


def tune(
    run: Run,
    weights: Mapping[str, Tensor],
    specs: Mapping[str, QuantSpec],
    targets: Sequence[Tensor],
    options: Options,
) -> dict[str, Encoded]:
    """Every weight of a layer -> its codes; those of rtn where tuning did not lower the error of the layer's output.

    Two-level specs share one outer scale in the whole layer, whatever an engine fuses.
    """
    names = list(weights)
    wide = {name: weights[name].detach().float() for name in names}
    outer = dict(zip(names, shared_planes(list(wide.values()), [specs[n] for n in names]), strict=True))
    plain = {n: encode(wide[n], specs[n], outer[n]) for n in names}
    before = losses(run, {n: decode(q) for n, q in plain.items()}, targets, options)
    state = {n: begin(wide[n], specs[n], outer[n], options.search, options.minmax) for n in names}
    tuned, at = descend(run, state, targets, before, options)
    after = losses(run, {n: decode(q) for n, q in tuned.items()}, targets, options)
    log = {"rtn_loss": sum(before) / len(before), "loss": sum(after) / len(after), "best_step": at}
    if not sum(after) < sum(before):
        reason = f"tuning did not lower the error of the layer ({log['loss']:.4g}, rtn {log['rtn_loss']:.4g})"
        return {n: Encoded(plain[n], log=log | {"kept": "rtn", "reason": reason}) for n in names}
    return {n: Encoded(tuned[n], log=log | {"kept": "tuned"}) for n in names}


def losses(run: Run, weights: Mapping[str, Tensor], targets: Sequence[Tensor], options: Options) -> list[float]:
    """The error of the layer's output, batch by batch."""
    cast = {n: w.to(targets[0].dtype) for n, w in weights.items()}
    with torch.no_grad():
        return [float(error(run(cast, i), target, options.relative)) for i, target in enumerate(targets)]


def error(out: Tensor, target: Tensor, relative: bool) -> Tensor:
    """The mean square of out - target [B, T, H]; relative: each token's by the mean square of its target."""
    wanted = target.float()
    square = (out.float() - wanted).square().mean(-1)
    if not relative:
        return square.mean()
    size = wanted.square().mean(-1)
    return (square / size.clamp(min=1e-6 * float(size.mean()) + torch.finfo(torch.float32).tiny)).mean()


def descend(
    run: Run, tuned: Mapping[str, Rounding], targets: Sequence[Tensor], before: Sequence[float], options: Options
) -> tuple[dict[str, QTensor], int]:
    """-> the codes where the loss, relative to rtn's on the same batches, was least, and the step of that."""
    best, at, kept = float("inf"), 0, {n: (t.offsets.clone(), t.planes) for n, t in tuned.items()}
    lr, lr_ends = options.lr or 1 / options.iters, options.minmax_lr or 0.4 / options.iters
    for step, batches in enumerate(draws(targets, options)):
        loss, grads = gradient(run, {n: dense(t) for n, t in tuned.items()}, targets, batches, options)
        ratio = loss / max(sum(before[i] for i in batches), 1e-30)
        if ratio < best:
            best, at = ratio, step
            for n, t in tuned.items():
                kept[n] = (kept[n][0].copy_(t.offsets), t.planes)
        left = 1 - step / options.iters
        for n, t in tuned.items():
            move(t, grads[n], lr * left, lr_ends * left, options.soft)
    for n, t in tuned.items():
        t.offsets, t.planes = kept[n]
    return {n: finish(t) for n, t in tuned.items()}, at


def draws(targets: Sequence[Tensor], options: Options) -> Iterator[list[int]]:
    """For each step the numbers of its batches: about `batch` sequences, every batch once before any comes again."""
    generator = torch.Generator().manual_seed(options.seed)
    each = max(1, min(len(targets), options.batch // targets[0].shape[0]))
    left: list[int] = []
    for _ in range(options.iters):
        while len(left) < each:
            left += torch.randperm(len(targets), generator=generator).tolist()
        yield left[:each]
        left = left[each:]


def gradient(
    run: Run, weights: Mapping[str, Tensor], targets: Sequence[Tensor], batches: Sequence[int], options: Options
) -> tuple[float, dict[str, Tensor]]:
    """The summed loss of some batches and its gradient by each dense weight, gathered in float32."""
    leaves = {n: w.to(targets[0].dtype).requires_grad_() for n, w in weights.items()}
    total, grads = 0.0, {n: torch.zeros_like(w, dtype=torch.float32) for n, w in weights.items()}
    for i in batches:
        with torch.enable_grad():
            loss = error(run(leaves, i), targets[i], options.relative)
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        total += float(loss.detach())
        for n, g in zip(leaves, found, strict=True):
            if g is not None:
                grads[n] += g
    return total, grads


ALGO = Algo(
    "autoround",
    "rounding and ranges of a whole layer tuned by signed gradients",
    Options,
    encode_plainly,
    tune=tune,
)
