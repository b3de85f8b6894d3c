"""Write the map in CONTRIBUTING.md: every module by package, with the first sentence of its docstring.

`python bench/map.py` writes it, `python bench/map.py --check` fails if it is not up to date.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def sentence(file: Path) -> str:
    """The first sentence of a module's docstring.

    Raises:
        ValueError: if there is none.
    """
    doc = ast.get_docstring(ast.parse(file.read_text()))
    if not doc:
        raise ValueError(f"{file} has no docstring; its first sentence must say what is in the module.")
    first = " ".join(doc.split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", first)[0]


def package(folder: Path) -> list[str]:
    """The lines of a package and of the packages in it."""
    name = folder.relative_to(ROOT).as_posix()
    lines = [f"- **`{name}/`**: {sentence(folder / '__init__.py')}"]
    modules = (file for file in sorted(folder.glob("*.py")) if not file.name.startswith("_"))
    lines += [f"    - `{file.name}`: {sentence(file)}" for file in modules]
    for inner in sorted(folder.glob("*/__init__.py")):
        lines += package(inner.parent)
    return lines


def generated(text: str) -> str:
    """CONTRIBUTING.md with its map written anew."""
    lines = "\n".join([*package(ROOT / "fastlr"), *package(ROOT / "kernels")])
    text, count = re.subn(
        r"(<!-- map: bench/map.py -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{lines}\n{m[2]}", text, flags=re.S
    )
    assert count == 1, "CONTRIBUTING.md has no map"
    return text


def main() -> int:
    """Write or check."""
    path = ROOT / "CONTRIBUTING.md"
    old = path.read_text()
    new = generated(old)
    if "--check" in sys.argv:
        if new != old:
            print("CONTRIBUTING.md is not up to date: run python bench/map.py")
        return int(new != old)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
