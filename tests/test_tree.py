"""The import arrows of docs/structure.md, over the syntax tree; and the one file that may know transformers."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fewbit"

MAY = {
    "errors": set(),
    "env": set(),
    "quant": {"errors"},
    "files": {"errors"},
    "codecs": {"errors", "files", "quant"},
    "algos": {"errors", "quant"},
    "transforms": {"errors", "quant"},
    "kernels": {"errors", "env", "quant"},
    "modules": {"errors", "quant", "kernels"},
    "models": {"errors", "files", "quant", "codecs", "kernels", "modules", "transforms"},
    "inc": {"errors", "files", "quant", "codecs", "kernels", "modules", "models"},
    "workflows": {"errors", "env", "files", "quant", "codecs", "kernels", "modules", "models", "algos", "transforms"},
    "engine": {"errors", "env", "quant", "codecs", "kernels", "modules", "models", "inc"},
    "server": {"errors", "env", "files", "engine", "models", "workflows"},
    "registry": {"errors", "quant", "codecs", "kernels", "algos"},
}
TOP = {"cli", "compat", "llm", "lm_eval", "served", "serve_fakequant", "__init__", "__main__"}  # may import everything
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module name that a file imports, wherever the statement stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows(path: Path) -> None:
    home = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if home in TOP:
        return
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("fewbit.")}
    assert ours <= MAY[home] | {home}, f"{path} imports {ours - MAY[home] - {home}}"


def test_one_file_imports_transformers() -> None:
    users = [p for p in FILES if any(n.split(".")[0] == "transformers" for n in imported(p))]
    assert users == [PACKAGE / "models" / "hf.py"]


def test_one_file_reads_the_environment() -> None:
    users = [p for p in FILES if "os.environ" in p.read_text() or "getenv" in p.read_text()]
    assert users == [PACKAGE / "env.py"]


def test_codecs_do_not_import_one_another() -> None:
    shared = {"codec", "source", "int_packing", "int_config", "planes"}
    dialects = {p.stem for p in (PACKAGE / "codecs").glob("*.py")} - shared - {"__init__"}
    for path in (PACKAGE / "codecs").glob("*.py"):
        seen = {n.split(".")[2] for n in imported(path) if n.startswith("fewbit.codecs.") and path.stem != "__init__"}
        others = {n for n in seen & dialects if n.split("_")[0] != path.stem.split("_")[0]}
        assert not others, f"{path} imports {others}"


def test_nothing_unpickles() -> None:
    """But plain tensors, from a file that a user names."""
    reader = PACKAGE / "files" / "pickled.py"
    for path in FILES:
        names = {n.split(".")[0] for n in imported(path)} & {"pickle", "dill", "joblib"}
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        loads = [call for call in calls if ast.unparse(call.func) in ("torch.load", "pickle.load", "pickle.loads")]
        if path != reader:
            assert not names and not loads, path
        else:
            assert [ast.unparse(call) for call in loads] == ["torch.load(path, map_location='cpu', weights_only=True)"]
