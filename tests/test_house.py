"""The limits that the code keeps to: sizes of classes and files, other objects' private attributes, import circles."""

from __future__ import annotations

import ast
import graphlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TREES = {
    file: ast.parse(file.read_text())
    for folder in ("fastlr", "kernels")
    for file in sorted(ROOT.glob(f"{folder}/**/*.py"))
}
pytestmark = pytest.mark.skipif(not TREES, reason="the sources are not beside the tests")

LONGEST_CLASS, LONGEST_FILE, TOP_MODULES, PRIVATE_USES = 500, 700, 20, 50


def module(file: Path) -> str:
    """The name by which a file is imported; `kernels/` is installed as `fastlr.kernels`."""
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return f"fastlr.{name}" if name.startswith("kernels") else name


def imported(file: Path, files: dict[str, Path]) -> Iterator[str]:
    """The modules that a file imports from its own project, wherever in it; packages themselves do not count."""
    here = module(file).split(".") + ["__init__"] * (file.name == "__init__.py")
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*here[: -node.level], *([node.module] if node.module else [])])
            for alias in node.names:
                name = next((n for n in (f"{base}.{alias.name}", base) if n in files), None)
                if name is not None and files[name].name != "__init__.py" and files[name] != file:
                    yield name


def private_uses(tree: ast.AST) -> int:
    """How often a file uses an attribute `x._y` of something else than `self`, its class, or its base class."""

    def is_own(value: ast.expr) -> bool:
        if isinstance(value, ast.Call):
            return isinstance(value.func, ast.Name) and value.func.id == "super"
        return isinstance(value, ast.Name) and value.id in ("self", "cls", "os", "sys")

    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return sum(a.attr.startswith("_") and not a.attr.startswith("__") and not is_own(a.value) for a in attributes)


def test_classes_are_short():
    """Methods of one class share all of its attributes: few readers keep track of 500 lines of that."""
    classes = [
        (file, node) for file, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    ]
    sizes = {f"{node.name} in {file.relative_to(ROOT)}": node.end_lineno - node.lineno + 1 for file, node in classes}
    longer = {name: size for name, size in sizes.items() if size > LONGEST_CLASS}
    assert not longer, f"longer than {LONGEST_CLASS} lines: {longer}. Move what belongs together to a class of its own."


def test_files_are_short():
    sizes = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in TREES}
    longer = {name: size for name, size in sizes.items() if size > LONGEST_FILE}
    assert not longer, f"longer than {LONGEST_FILE} lines: {longer}. Make two modules, each with one subject."


def test_few_modules_are_at_the_top():
    top = [file.name for file in TREES if file.parent == ROOT / "fastlr"]
    assert len(top) <= TOP_MODULES, f"{len(top)} modules in fastlr/, at most {TOP_MODULES}. Move some to a package."


def test_private_attributes_are_private():
    uses = Counter({str(file.relative_to(ROOT)): private_uses(tree) for file, tree in TREES.items()})
    assert uses.total() <= PRIVATE_USES, (
        f"private attributes of other objects are used {uses.total()} times, at most {PRIVATE_USES}; most in "
        f"{uses.most_common(5)}. Give what others need a public name, documented in its class."
    )


def test_imports_have_no_circles():
    """Those for type checkers alone, and those inside functions, count as well."""
    files = {module(file): file for file in TREES}
    try:
        graphlib.TopologicalSorter({name: set(imported(file, files)) for name, file in files.items()}).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"{' <- '.join(error.args[1])}: move what they share to a module that imports none of them.")
