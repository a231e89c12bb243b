"""The table of algorithms: names, errors, other packages' entries, and options."""

from importlib.metadata import EntryPoint

import pytest

from fewbit import algos
from fewbit.algos.algo import Algo, options
from fewbit.errors import SpecError

NAMES = ("rtn", "gptq", "awq", "smooth", "autoround", "hqq", "imatrix")
POINT = "fewbit.algos.rtn:ALGO"


@pytest.fixture
def points(monkeypatch):
    """Pretend that other packages declare these (name, value) entries."""

    def declare(*entries):
        found = [EntryPoint(name, value, "fewbit.algos") for name, value in entries]
        monkeypatch.setattr(algos, "entry_points", lambda group: found)
        algos._points.cache_clear()

    yield declare
    monkeypatch.undo()
    algos._points.cache_clear()


def test_every_name_is_an_algo_of_that_name():
    assert tuple(algos.ALGOS)[: len(NAMES)] == NAMES
    for name in NAMES:
        algo = algos.get(name)
        assert isinstance(algo, Algo)
        assert algo.name == name
        assert algo.summary
        options(algo, {})  # every option has a default


@pytest.mark.parametrize(("asked", "near"), [("gptqq", "gptq"), ("imat", "imatrix"), ("round", "autoround")])
def test_unknown_names_say_what_is_near(asked, near):
    with pytest.raises(SpecError, match=rf"{asked!r} is not known; near: {near}.*all: rtn"):
        algos.get(asked)


def test_unknown_options_say_what_there_is():
    with pytest.raises(SpecError, match=r"gptq has no option dampp; it has damp=0.01, order=weight"):
        options(algos.get("gptq"), {"dampp": 1})


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("rtn", {"scale": "best"}),
        ("gptq", {"order": "up"}),
        ("gptq", {"damp": -1}),
        ("gptq", {"hadamard": 24}),
        ("hqq", {"power": 2.0}),
        ("imatrix", {"trials": 0}),
    ],
)
def test_senseless_options_are_errors(name, given):
    with pytest.raises(SpecError, match=name):
        options(algos.get(name), given)


def test_an_entry_point_adds_one(points):
    points(("other", POINT))
    assert algos.get("other") is algos.get("rtn")
    assert "other" in list(algos.ALGOS)
    assert algos.origins() == {"other": POINT}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("rtn", "theirs:algo")], r"'rtn': of fewbit and theirs:algo"),
        ([("x", "one:algo"), ("x", "two:algo")], r"'x': of one:algo and two:algo"),
    ],
)
def test_two_of_one_name_are_an_error(points, entries, message):
    points(*entries)
    with pytest.raises(SpecError, match=message):
        algos.get("other")


def test_an_entry_point_must_be_an_algo(points):
    points(("odd", "fewbit.algos.rtn:encode"))
    with pytest.raises(SpecError, match=r"'odd' of fewbit.algos gives function, not an Algo"):
        algos.get("odd")
