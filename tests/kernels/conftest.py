"""Triton 3.6's interpreter turns the bounds of a loop into numbers in a way that NumPy 2.4 has ended: mended here."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True, scope="session")
def loops_of_the_interpreter() -> Iterator[None]:
    try:
        from triton.runtime import interpreter
    except ImportError:
        yield
        return
    plain = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", patched)
        yield
