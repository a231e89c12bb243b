"""The exception tree. A message says what was asked, what was found, and what would work.

FewbitError
├── SpecError            a value of the algebra that makes no sense (an element, spec, format or plan)
├── CheckpointError      a file or checkpoint that is not what it claims to be
├── UnsupportedError     understood, and not possible here; `reasons` lists why, one line each
├── CapacityError        memory, disk or cache is not enough
└── RequestError         a user's request is at fault (the only one that becomes HTTP 4xx)
"""

from collections.abc import Sequence


class FewbitError(Exception):
    """Base of every error this package raises on purpose."""


class SpecError(FewbitError):
    """A value of the algebra that makes no sense."""


class CheckpointError(FewbitError):
    """A file or checkpoint that is not what it claims to be."""


class UnsupportedError(FewbitError):
    """Understood, and not possible here."""

    def __init__(self, message: str, reasons: Sequence[str] = ()):
        self.reasons = tuple(reasons)
        super().__init__("\n".join([message, *(f"  - {reason}" for reason in self.reasons)]))


class CapacityError(FewbitError):
    """Memory, disk or cache is not enough."""


class RequestError(FewbitError):
    """A user's request is at fault."""
