"""Every checkpoint that the peers' own tools wrote, against the logits stored beside it."""

from pathlib import Path

import pytest

import fewbit
from tests.checkpoints.compare import checkpoint_of, compare, table

SHARED = Path(__file__).parents[3] / "shared" / "fixtures"
FOLDERS = sorted(p.parent for p in SHARED.glob("*/meta.json"))
needs_shared = pytest.mark.skipif(not FOLDERS, reason="../shared/fixtures is not there")


@needs_shared
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_logits(folder: Path) -> None:
    row = compare(folder)
    print(table([row]))
    assert row.ok, table([row])


@needs_shared
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_sound(folder: Path) -> None:
    assert [f for f in fewbit.verify(checkpoint_of(folder)) if f.severity == "error"] == []


@needs_shared
@pytest.mark.checkpoints
def test_table() -> None:
    rows = [compare(folder) for folder in FOLDERS]
    print("\n" + table(rows))
    assert all(row.ok for row in rows)
