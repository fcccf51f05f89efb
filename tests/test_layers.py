"""The floors of the house: which package may import which, and what stays out of a light import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mmalign"
BELOW = {
    "core": set(),
    "world": set(),
    "data": {"core"},
    "modalities": {"core"},
    "feedback": {"core"},
    "training": {"core", "data", "modalities", "feedback"},
    "evaluate": {"core", "data", "modalities", "feedback", "training", "world"},
    "jobs": {"core", "data", "modalities", "feedback", "training", "world", "evaluate", "config"},
}
HEAVY = {"diffusers", "transformers", "open_clip", "peft"}


def imports_of(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names


@pytest.mark.parametrize("floor", sorted(BELOW))
def test_no_import_runs_upward(floor):
    files = list((PACKAGE / floor).rglob("*.py"))
    assert files, f"mmalign/{floor} is empty"
    for path in files:
        for name in imports_of(ast.parse(path.read_text())):
            if name.startswith("mmalign."):
                target = name.split(".")[1]
                assert target == floor or target in BELOW[floor], f"{path.relative_to(PACKAGE)} imports {name}"


def test_core_is_torch_and_the_standard_library():
    allowed = set(sys.stdlib_module_names) | {"torch", "jaxtyping", "mmalign", "PIL"}  # PIL: for type checkers only
    for path in (PACKAGE / "core").rglob("*.py"):
        assert {name.split(".")[0] for name in imports_of(ast.parse(path.read_text()))} <= allowed, path.name


def test_model_libraries_are_imported_only_inside_functions_of_modalities_and_feedback():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        if path.relative_to(PACKAGE).parts[0] not in ("modalities", "feedback"):
            assert not HEAVY & {name.split(".")[0] for name in imports_of(tree)}, path
        top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        assert not HEAVY & {name.split(".")[0] for name in imports_of(top)}, f"{path} imports a model library at once"


def test_importing_mmalign_is_light():
    code = "import sys, mmalign; sys.exit(bool({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0


def test_no_file_and_no_function_has_outgrown_the_house():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"
