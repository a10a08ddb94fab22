"""How much there is to read, counted: python tests/house.py [--check]

What a reader holds in mind is ideas, and a line may hold one or nine. So this counts syntax nodes
(expressions and statements of Python's ast) in the top level's *.py and in data/*.py. Nodes a line:

    minbpe 3.0    nanochat 3.5    nanoGPT 3.9    gpt-fast 4.3

This project once had 31,005 nodes in 5,411 lines, 5.7 a line: too dense to be read. LIMITS holds
what it may have now; with --check the exit code is 1 if something is above. The aim is 25,000
nodes without Qwen3-MoE, lora_experts, the pictures of runs, locks and stops. It is not reached: the
limit stands where the count is. It goes down when an idea goes; it went up once, from 29,719, when
what readers had stopped at was unfolded, and files of strangers, full disks and numbers that are
none got their answers.

The imports among our own files should form a tower: each stands on those below it, and no path
leads back. An import inside a function is lazy: it runs when the function does, so Python would
bear a circle of those. A reader would not, and they count.
"""

import argparse
import ast
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LARGE, HUGE = 300, 600  # nodes of a function: of more there should be few, or none
LIMITS = {
    "nodes": 30_524,
    "nodes a line": 5.0,
    f"functions above {LARGE} nodes": 3,
    f"functions above {HUGE} nodes": 0,
    "circles of imports": 0,
    "fmt: skip": 12,
}


class File(NamedTuple):
    module: str  # data.hub
    nodes: int
    lines: int
    functions: dict[str, int]  # those above LARGE, with their nodes
    skips: int  # `# fmt: skip`: places that are not formatted as the rest is
    imports: dict[str, bool]  # of our modules -> whether all of these imports are lazy


def nodes_of(tree: ast.AST) -> int:
    return sum(isinstance(node, ast.expr | ast.stmt) for node in ast.walk(tree))


def names_imported(node: ast.AST) -> list[str]:
    """The modules that a statement may import: `from data import run` asks for data or data.run."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def read(path: Path, root: Path, modules: set[str]) -> File:
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    functions, inside = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            inside.update(ast.walk(node))
            if nodes_of(node) > LARGE:
                functions[node.name] = nodes_of(node)
    imports = {}
    for node in ast.walk(tree):
        for name in modules.intersection(names_imported(node)):
            imports[name] = imports.get(name, True) and node in inside
    return File(
        module=module_of(path, root),
        nodes=nodes_of(tree),
        lines=source.count("\n"),
        functions=functions,
        skips=source.count("# fmt: skip"),
        imports=imports,
    )


def module_of(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts)


def survey(root: Path) -> list[File]:
    paths = sorted(root.glob("*.py")) + sorted(root.glob("data/*.py"))
    modules = {module_of(path, root) for path in paths}
    return [read(path, root, modules) for path in paths]


def circles(files: list[File]) -> list[list[str]]:
    """The shortest ways on which imports lead from a module back to it, such as [a, b, a]."""
    imports = {file.module: list(file.imports) for file in files}
    found = []
    for start in imports:
        ways, seen = [[start]], set()
        for way in ways:  # it grows as we go, so that shorter ways come first
            for module in imports[way[-1]]:
                if module not in seen:
                    seen.add(module)
                    ways.append([*way, module])
        back = [way for way in ways[1:] if way[-1] == start]
        known = [set(way) for way in found]
        found += [way for way in back if set(way) not in known]
    return found


def measure(files: list[File]) -> dict[str, float]:
    """The numbers that LIMITS bounds."""
    nodes = sum(file.nodes for file in files)
    sizes = [size for file in files for size in file.functions.values()]
    return {
        "nodes": nodes,
        "nodes a line": round(nodes / sum(file.lines for file in files), 2),
        f"functions above {LARGE} nodes": len(sizes),
        f"functions above {HUGE} nodes": sum(size > HUGE for size in sizes),
        "circles of imports": len(circles(files)),
        "fmt: skip": sum(file.skips for file in files),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 above a limit")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project's folder")
    args = parser.parse_args(argv)
    files = survey(args.root)

    print(f"{'':18} {'nodes':>6} {'lines':>6} {'a line':>7} {'skips':>6}    imports (lazy ones)")
    for file in files:
        density = file.nodes / max(file.lines, 1)
        numbers = f"{file.nodes:6,} {file.lines:6,} {density:7.2f} {file.skips:6}"
        names = [f"({name})" if lazy else name for name, lazy in sorted(file.imports.items())]
        print(f"{file.module:18} {numbers}    {' '.join(names)}")
    for file in files:
        for name, size in file.functions.items():
            print(f"large: {file.module}.{name} {size}")
    for way in circles(files):
        print("circle:", " -> ".join(way))

    print(f"\n{'':30} {'now':>9} {'limit':>9}")
    above = False
    for name, value in measure(files).items():
        print(f"{name:30} {value:9,} {LIMITS[name]:9,}")
        above = above or value > LIMITS[name]
    sys.exit(1 if above and args.check else 0)


if __name__ == "__main__":
    main()
