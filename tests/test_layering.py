"""The one rule of engine/: a file imports from lower layers only, and only one layer knows of process groups."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ENGINE = Path(__file__).resolve().parents[1] / "engine"
FILES = sorted(ENGINE.rglob("*.py"))
LAYERS = {
    "algorithms": 0,
    "data": 1,
    "models": 1,
    "distributed": 2,
    "rollout": 3,
    "answering": 4,
    "rlhf_engine": 4,
    "supervised_engine": 4,
    "trainers": 5,
}
# None is a layer: the config is for layers 2 and up, a tracker is told what to write, a plan is asked before a run, a
# report reads files only, a doctor is asked by nobody and looks at what a run reads, the user's code among it.
FREE = {"config", "doctor", "environments", "memory_plan", "report", "run_folder", "scores", "startup", "tracking"}
MAY_IMPORT = {
    "config": {"startup"},
    "doctor": {"config", "data", "models", "distributed", "rollout", "run_folder"},
    "environments": {"scores"},
    "memory_plan": {"algorithms", "config", "distributed", "models"},
    "report": set(),
    "run_folder": set(),
    "startup": set(),
    "tracking": {"config"},
}


def part_of(module: str) -> str:
    """`engine.rollout.scoring` -> `rollout`; `engine` itself -> ``."""
    return module.split(".")[1] if "." in module else ""


def module_of(path: Path) -> str:
    parts = path.relative_to(ENGINE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Every module a file names in an import statement, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def allowed(importer: str, imported: str) -> bool:
    """Whether a part of the engine may import another."""
    if importer == imported:
        return True
    if importer in MAY_IMPORT:
        return imported in MAY_IMPORT[importer]
    if imported == "config":
        return LAYERS[importer] >= 2
    if imported == "tracking":
        return importer == "trainers"
    if imported in ("memory_plan", "report"):
        return False
    if imported == "run_folder":
        return importer == "distributed"
    return imported in LAYERS and LAYERS[imported] < LAYERS[importer]


def names(path: Path) -> str:
    return str(path.relative_to(ENGINE))


@pytest.mark.parametrize("path", [path for path in FILES if path != ENGINE / "__init__.py"], ids=names)
def test_a_file_imports_lower_layers_only(path):
    importer = part_of(module_of(path))
    assert importer in LAYERS.keys() | FREE, f"{path}: a part of the engine that has no layer yet"
    for module in imports_of(path):
        if module.split(".")[0] == "engine":
            imported = part_of(module)
            assert allowed(importer, imported), f"{names(path)} ({importer}) imports {module}"


@pytest.mark.parametrize("path", FILES, ids=names)
def test_only_distributed_knows_of_process_groups(path):
    if part_of(module_of(path)) == "distributed":
        return
    forbidden = [m for m in imports_of(path) if m.split(".")[0] == "deepspeed" or m.startswith("torch.distributed")]
    assert not forbidden, f"{names(path)} imports {forbidden[0]}; that is for engine/distributed"
    for node in ast.walk(ast.parse(path.read_text())):
        through_torch = isinstance(node, ast.Attribute) and node.attr == "distributed"
        assert not (through_torch and isinstance(node.value, ast.Name) and node.value.id == "torch"), names(path)


@pytest.mark.parametrize("path", sorted(ENGINE.glob("algorithms/*.py")), ids=names)
def test_algorithms_are_pure_torch(path):
    outside = {module.split(".")[0] for module in imports_of(path)} - {"torch", "engine"} - sys.stdlib_module_names
    assert not outside, f"{names(path)} imports {outside}"


@pytest.mark.parametrize("path", FILES, ids=names)
def test_no_file_is_a_drawer(path):
    assert path.stem not in {"utils", "util", "common", "helpers", "helper", "base", "misc"}


def test_the_rule_can_be_broken():
    """Negative control: these would be violations."""
    assert not allowed("algorithms", "models")
    assert not allowed("algorithms", "config")
    assert not allowed("models", "data")
    assert not allowed("data", "config")
    assert not allowed("distributed", "rollout")
    assert not allowed("rollout", "trainers")
    assert not allowed("tracking", "trainers")
    assert not allowed("rollout", "tracking")
    assert not allowed("trainers", "report")
    assert not allowed("report", "tracking")
    assert not allowed("data", "models")
    assert not allowed("memory_plan", "trainers")
    assert not allowed("trainers", "memory_plan")
    assert not allowed("trainers", "doctor")
    assert not allowed("doctor", "trainers")
    assert allowed("rollout", "distributed")
    assert allowed("distributed", "models")
    assert allowed("trainers", "rlhf_engine")
    assert "torch.distributed" in imports_of(ENGINE / "distributed" / "comm.py")


@pytest.mark.parametrize(
    "statement", ["import engine", "from engine import PPOConfig", "import engine.algorithms.losses"]
)
def test_light_imports_stay_light(statement):
    program = f"import sys; {statement}; sys.exit('deepspeed' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ENGINE.parent, check=False).returncode == 0
