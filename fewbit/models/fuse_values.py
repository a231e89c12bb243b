"""What fusing is made of, as plain values: which modules a rewrite is for, what it does, and what became of it."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from fewbit.modules.experts import ATTRIBUTE, Experts
from fewbit.modules.glu import GluForm
from fewbit.modules.latent import LatentForm
from fewbit.modules.mixture import MixtureForm
from fewbit.modules.norm import NormForm
from fewbit.modules.rotary import RotaryForm
from fewbit.modules.router import RouteForm

Kind = Literal["merged", "norm", "glu", "rotary", "route", "latent", "mixture", "sums"]


@dataclass(frozen=True, slots=True)
class Siblings:
    """Linears of one module that read one tensor, in the order of their calls."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return " + ".join(self.names)


@dataclass(frozen=True, slots=True)
class Called:
    """A function that a module's forward finds under a name among its globals. heads: its axis of heads."""

    name: str
    form: RotaryForm
    heads: int

    def __str__(self) -> str:
        return f"{self.name}: {self.form}"


@dataclass(frozen=True, slots=True)
class Sums:
    """A decoder layer's additions, each in one launch with a norm. norms, products: whose outputs are added.

    passes: sums wait for the norm that reads them, in the next layer too.
    """

    norms: tuple[str, ...]
    passes: bool
    products: tuple[str, ...] = ()  # linears, also where such a norm reads them

    def __str__(self) -> str:
        given = f"{', '.join(self.norms)} + residual" if self.norms else ""
        return ", ".join(filter(None, (given, "residual + next norm" if self.passes else "")))


Form = Siblings | NormForm | GluForm | Called | RouteForm | LatentForm | MixtureForm | Sums
ALREADY = "torch's own is one kernel already"
ALONE = "no norm of ours is beside an addition"
NOTHING = (ALREADY, ALONE)  # reasons that refuse nothing: there is nothing to gain
KINDS: dict[type, Kind] = {
    Siblings: "merged",
    NormForm: "norm",
    GluForm: "glu",
    Called: "rotary",
    RouteForm: "route",
    LatentForm: "latent",
    MixtureForm: "mixture",
    Sums: "sums",
}
NUMBERED = (NormForm, GluForm, RouteForm)  # what these do may depend on a module's numbers


@dataclass(frozen=True, slots=True)
class Signature:
    """Modules of one class, with the same children and parameters, that do the same at any size."""

    module: str
    children: tuple[tuple[str, str], ...]
    parameters: tuple[tuple[str, int], ...]
    numbers: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Of the class alone."""
        return self.module.rpartition(".")[2]

    @classmethod
    def of(cls, module: nn.Module, numbers: bool) -> "Signature":
        """numbers: also those attributes that are no sizes."""
        kind, stack = type(module), module._modules.get(ATTRIBUTE)
        children = tuple((n, type(child).__name__) for n, child in module._modules.items() if n != ATTRIBUTE)
        held = {name: p.dim() for name, p in module._parameters.items() if p is not None}
        held |= dict.fromkeys(stack.parts, 3) if isinstance(stack, Experts) else {}  # quantized is as good
        plain = {n: v for n, v in vars(module).items() if type(v) in (bool, float, str) and n[0] != "_"}
        plain.pop("training", None)
        return cls(
            f"{kind.__module__}.{kind.__qualname__}",
            children,
            tuple(sorted(held.items())),
            tuple(sorted(plain.items())) if numbers else (),
        )


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What is done to every module of a signature."""

    target: Signature
    form: Form

    @property
    def kind(self) -> Kind:
        return KINDS[type(self.form)]

    def fits(self, module: nn.Module) -> bool:
        return Signature.of(module, isinstance(self.form, NUMBERED)) == self.target


@dataclass(frozen=True, slots=True)
class Decision:
    """where: a module's path, or in a plan its class. reason: why it was left as it was, "" where it was not."""

    where: str
    kind: Kind
    what: str
    reason: str = ""

    @property
    def kept(self) -> bool:
        return not self.reason

    @property
    def refused(self) -> bool:
        return self.reason not in ("", *NOTHING)


@dataclass(frozen=True, slots=True)
class Plan:
    """Rewrites that the twin of an architecture agrees with, and what it did not. It holds at all sizes."""

    model_type: str
    rewrites: tuple[Rewrite, ...] = ()
    refused: tuple[Decision, ...] = ()

    def __str__(self) -> str:
        found = [Decision(r.target.name, r.kind, str(r.form)) for r in self.rewrites]
        return "\n".join([f"{self.model_type}:", *lines((*found, *self.refused))])


@dataclass(frozen=True, slots=True)
class Fused:
    """What became of every module that a rewrite was proposed for."""

    model_type: str
    decisions: tuple[Decision, ...] = ()

    def count(self, kind: Kind) -> int:
        return sum(d.kind == kind and d.kept for d in self.decisions)

    def json(self) -> list[dict[str, Any]]:
        return [asdict(d) | {"kept": d.kept} for d in self.decisions]

    def __str__(self) -> str:
        return "\n".join([f"{self.model_type}:", *lines(self.decisions)])


def refusals(decisions: Iterable[Decision]) -> tuple[str, ...]:
    """What was refused, one line for those that say the same."""
    return tuple(line.strip() for line in lines(tuple(d for d in decisions if d.refused)))


def lines(decisions: tuple[Decision, ...]) -> Iterator[str]:
    """Decisions for people: those that say the same once, with their number and the first place."""
    counts = Counter((d.kind, d.what, d.reason) for d in decisions)
    first = {(d.kind, d.what, d.reason): d.where for d in reversed(decisions)}
    for (kind, what, reason), n in counts.items():
        where = first[kind, what, reason]
        times = f" and {n - 1} more" if n > 1 else ""
        yield f"  {kind:6} {what} ({where}{times})" + (f": left as it is, {reason}" if reason else "")
