"""A finding of verify, and what an error does to load."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fewbit.errors import CheckpointError

Severity = Literal["error", "warning"]
SHOWN = 40  # errors listed in one message


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong (error) or worth knowing (warning). `name` is what --unsafe-skip-verify takes."""

    severity: Severity
    name: str
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.name}: {self.where}: {self.text}"


def refuse_on_errors(path: Path, findings: Iterable[Finding], skip: Collection[str] = ()) -> None:
    """Raise one CheckpointError with every error whose name is not skipped."""
    errors = [f for f in findings if f.severity == "error" and f.name not in skip]
    if errors:
        shown = [f"  {f.name}: {f.where}: {f.text}" for f in errors[:SHOWN]]
        more = [f"  ... and {len(errors) - SHOWN} more: fewbit verify {path}"] if len(errors) > SHOWN else []
        raise CheckpointError("\n".join([f"{path}: {len(errors)} errors", *shown, *more]))
