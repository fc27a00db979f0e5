"""Every test checks something: by itself, by a function that it calls, or by a fixture it takes."""

import ast
from pathlib import Path

FOLDER = Path(__file__).parent
Functions = dict[str, ast.FunctionDef]


def functions(path: Path) -> Functions:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def checks(function: ast.FunctionDef, known: Functions, seen: frozenset[str] = frozenset()) -> bool:
    names = {argument.arg for argument in function.args.args}
    for node in ast.walk(function):
        match node:
            case ast.Assert():
                return True
            case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)):
                if name in ("raises", "warns", "fail") or name.startswith("assert_"):
                    return True
                names.add(name)
    later = names & known.keys() - seen
    return any(checks(known[name], known, seen | later) for name in later)


def unchecked(path: Path, shared: Functions) -> list[str]:
    own = functions(path)
    tests = (node for name, node in own.items() if name.startswith("test_"))
    return [f"{path.name}: {test.name}" for test in tests if not checks(test, shared | own)]


def test_every_test_has_an_assertion() -> None:
    paths = sorted(FOLDER.rglob("*.py"))
    shared = {name: node for path in paths for name, node in functions(path).items()}
    assert [actual for path in paths for actual in unchecked(path, shared)] == []


def test_a_test_without_an_assertion_is_found(tmp_path: Path) -> None:
    path = tmp_path / "test_it.py"
    path.write_text("def test_a(): print(1)\ndef help(): assert 1\ndef test_b(): help()\n")
    assert unchecked(path, {}) == ["test_it.py: test_a"]
