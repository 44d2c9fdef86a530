"""The house as it was drawn: which module may import which, and which may touch what."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fastcifar"

LEAVES = {"errors", "checks", "config", "publish", "metrics", "signals"}
# module or package -> what it may import beside the leaves
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "checks": set(),
    "config": {"checks"},
    "publish": set(),
    "metrics": set(),
    "signals": set(),
    "nets": {"kernels"},
    "batch_op": set(),
    "batches": set(),
    "position": set(),
    "mixing": {"kernels"},
    "policies": {"kernels", "policy_stages"},
    "policy_stages": set(),
    "memory": set(),
    "placement": {"data", "memory"},
    "staging": {"kernels"},
    "streaming": {"data", "kernels"},
    "backends": {"data", "kernels", "staging"},
    "pipeline": {"backends", "data", "kernels", "mixing", "policies", "placement", "runtime", "streaming"},
    "changes": set(),
    "recipes": {"changes"},
    "muon": {"kernels"},
    "optim": {"muon"},
    "averaging": set(),
    "whitening": {"loader"},
    "profiling": {"runtime"},
    "ranks": set(),
    "rank_norm": {"ranks"},
    "runtime": {"ranks"},
    "formats": set(),
    "phase": {"formats"},
    "reporter": set(),
    "panels": {"formats"},
    "console": {"reporter", "formats", "phase", "panels"},
    "figures": {"formats"},
    "page": {"reporter", "formats"},
    "checkpoint": set(),
    "several": set(),
    "runs": {"checkpoint", "several"},
    "data": {"child"},
    "kernels": set(),
    "loader": {"backends", "batch_op", "batches", "data", "kernels", "pipeline", "placement", "position", "runtime"},
    "evaluation": {"loader", "data", "ranks", "runtime"},
    "trainer": {
        *{"averaging", "loader", "evaluation", "optim", "profiling", "rank_norm", "ranks", "reporter", "runtime"},
    },
    "step_graphs": {"trainer", "loader", "muon"},
    "summary": {"checkpoint", "data", "formats", "loader", "recipes", "reporter", "runs", "runtime"},
    "outcome": {"figures", "page", "reporter", "runs"},
    "child": set(),
    "page_worker": {"child", "figures", "outcome", "reporter", "runs", "runtime"},
    "job": {
        *{"trainer", "evaluation", "loader", "data", "nets", "profiling", "ranks", "reporter", "runtime"},
        *{"checkpoint", "recipes", "runs", "whitening", "step_graphs", "summary", "outcome", "page_worker"},
    },
    "trained": {"checkpoint", "nets", "runs", "runtime", "several", "trainer"},
    "engine": {
        *{"job", "trained", "trainer", "evaluation", "data", "nets", "ranks", "recipes", "reporter", "runtime"},
        *{"checkpoint", "memory", "runs", "several"},
    },
    "verification": {"checkpoint", "data", "runs", "several"},
    "estimates": set(),
    "worker": {"child", "engine", "formats", "reporter", "runtime"},
    "stream_worker": {"page_worker", "runtime", "worker"},
    "many": {"checkpoint", "engine", "recipes", "reporter", "runs", "runtime", "stream_worker", "worker"},
    "series": {"ranks", "recipes", "runs", "runtime"},
    "seeds": {"estimates", "formats", "many", "reporter", "runs", "series", "several"},
    "variants": {"changes", "recipes"},
    "ablation": {
        *{"changes", "estimates", "formats", "many", "optim", "recipes", "reporter", "runs", "seeds", "series"},
        *{"several", "variants"},
    },
    "commands": {
        *{"ablation", "console", "data", "engine", "nets", "recipes", "reporter", "runs", "runtime", "seeds"},
        *{"several", "verification"},
    },
    "train": {"commands"},
    "__main__": {"commands"},
}
# each leaf's own imports: none but the errors
ONLY_ERRORS = LEAVES | {"nets"}

# third-party or standard module -> the only modules of ours that may import it
GUARDED = {
    "rich": {"console", "panels"},
    "tyro": {"commands"},
    "argparse": {"commands"},
    "urllib": {"data.download", "data.reach"},
    "http": {"data.download"},
    "socket": {"data.reach"},
    "tarfile": set(),
    "matplotlib": {"figures"},
    "signal": {"signals", "evaluation", "ranks"},
    "pickle": set(),
    "numba": {"kernels", "runtime"},
    "llvmlite": {"kernels"},
    "nvidia": {"kernels.dali"},
    "triton": {"kernels.cuda_loops"},
    "PIL": {"data.images", "data.items", "data.folders"},
    "subprocess": {"child"},
}
BARRED_CALLS = {("pickle", "load"), ("pickle", "loads"), ("torch", "load"), ("tarfile", "extractall")}
GLOBAL_STATE = (
    *("torch.backends.", "torch.manual_seed", "torch.seed", "torch.set_", "torch.use_deterministic", "torch.cuda.set_"),
    *("os.environ[", "os.environ.setdefault", "os.environ.update", "os.environ.pop", "os.putenv", "np.random.seed"),
)
BARRED_NAMES = {"eval", "exec", "print", "__import__"}


def modules() -> list[tuple[str, ast.Module]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        found.append((name, ast.parse(path.read_text(encoding="utf-8"))))
    return found


def imports(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"line {node.lineno}: a relative import"
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            if node.module == "fastcifar" or node.module.startswith("fastcifar."):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def siblings(tree: ast.Module) -> set[str]:
    """Modules and packages of ours at the top level that `tree` imports."""
    tops = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    return {name.split(".")[1] for name in imports(tree) if name.startswith("fastcifar.")} & tops


MODULES = [(name, tree) for name, tree in modules() if name != "__init__"]


@pytest.mark.parametrize(("name", "tree"), MODULES, ids=[name for name, _ in MODULES])
def test_imports_point_one_way(name: str, tree: ast.Module) -> None:
    top = name.split(".")[0]
    assert top in ARROWS, f"{name} is new: give it a place in ARROWS"
    allowed = ARROWS[top] | ({"errors"} if top in ONLY_ERRORS else LEAVES) | {top}
    assert siblings(tree) <= allowed, f"{name} imports {siblings(tree) - allowed}"


@pytest.mark.parametrize(("name", "tree"), MODULES, ids=[name for name, _ in MODULES])
def test_only_the_right_module_touches(name: str, tree: ast.Module) -> None:
    for imported in imports(tree):
        for guarded, owners in GUARDED.items():
            if imported == guarded or imported.startswith(f"{guarded}."):
                assert name in owners or name.split(".")[0] in owners, f"{name} imports {imported}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name):
                assert function.id not in BARRED_NAMES, f"{name}:{node.lineno} calls {function.id}"
            if isinstance(function, ast.Attribute):
                owner = function.value.id if isinstance(function.value, ast.Name) else ""
                assert (owner, function.attr) not in BARRED_CALLS, f"{name}:{node.lineno}"
                assert function.attr != "extractall", f"{name}:{node.lineno}"


FOR_A_MOMENT = {("commands.options", "os.environ['COLUMNS']")}
"""What another module sets while it calls a library that takes it in no other way, and puts back."""


@pytest.mark.parametrize(("name", "tree"), MODULES, ids=[name for name, _ in MODULES])
def test_only_runtime_changes_global_state(name: str, tree: ast.Module) -> None:
    for node in ast.walk(tree):
        found = ""
        if isinstance(node, ast.Call):
            found = ast.unparse(node.func)
        elif isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            found = ast.unparse(node)
        if found.startswith(GLOBAL_STATE) and (name, found) not in FOR_A_MOMENT:
            assert name == "runtime", f"{name}:{node.lineno}: {found}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_tells_one_story(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300, "two stories are two modules"


def test_arrows_have_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ARROWS):
        ready = {name for name, allowed in ARROWS.items() if name not in done and allowed <= done}
        assert ready, f"a cycle among {sorted(set(ARROWS) - done)}"
        done |= ready


def test_importing_the_package_is_light() -> None:
    import subprocess
    import sys

    heavy = "[name for name in ('torch', 'numba', 'rich') if name in sys.modules]"
    code = f"import sys, fastcifar; fastcifar.TrainConfig; print({heavy})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import fastcifar

    for name in fastcifar.__all__:
        assert getattr(fastcifar, name) is not None
    assert fastcifar.loader.Loader is fastcifar.Loader
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastcifar.nothing
