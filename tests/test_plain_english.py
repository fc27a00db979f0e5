"""The rule for writers, enforced: tests/plain_english.toml lists the words and their replacements.

The test reads docstrings, comments and string literals of Python files, whole Markdown pages and
shell scripts, and the comments of TOML and YAML files. CONTRIBUTING.md has the rule.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
RULES = tomllib.loads((ROOT / "tests/plain_english.toml").read_text(encoding="utf-8"))
WORDS = [(re.compile(rule["words"], re.IGNORECASE), rule) for rule in RULES["rule"]]
NAMES = RULES["names"]
STARTS = {kind: re.compile(RULES[f"{kind}_start"]) for kind in ("docstring", "comment")}
COMMENT = re.compile(r"(?:^|\s)#+ ?(.*)$")


def comments(text: str) -> Iterator[str]:
    """Comments of a Python, TOML or shell file; consecutive lines are one comment."""
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        if match := COMMENT.search(line):
            block.append(match[1])
        elif block:
            yield " ".join(block)
            block = []


def strings(tree: ast.AST) -> Iterator[str]:
    """String literals, docstrings included; values inside f-strings become `{}`."""
    inside = set()
    literals = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = []
            for part in node.values:
                inside.add(id(part))
                parts.append(str(part.value) if isinstance(part, ast.Constant) else "{}")
            yield "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            literals.append(node)
    yield from (node.value for node in literals if id(node) not in inside)


def docstrings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef):  # A string below a field documents it.
            for statement in node.body[1:]:
                match statement:
                    case ast.Expr(value=ast.Constant(value=str() as text)):
                        yield text


def names(tree: ast.AST) -> Iterator[str]:
    """Names that a file gives to variables, arguments, functions and classes."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name


def hits_in_prose(text: str) -> list[str]:
    text = " ".join(text.split())
    hits = []
    for pattern, rule in WORDS:
        for match in pattern.finditer(text):
            context = text[max(0, match.start() - 40) : match.end() + 40]
            hits.append(f"{match[0]!r} in '...{context}...': write {rule['instead']}")
    return hits


def hits(text: str, suffix: str) -> list[str]:
    """Violations of the rule in a file's text."""
    if suffix == ".md":
        return hits_in_prose(text)
    if suffix in (".sh", ".slurm"):
        return hits_in_prose(re.sub(r"^\s*#+", "", text, flags=re.MULTILINE))
    if suffix in (".toml", ".yml"):
        return [hit for comment in comments(text) for hit in hits_in_prose(comment)]
    tree = ast.parse(text)
    lines = [hit for part in (*comments(text), *strings(tree)) for hit in hits_in_prose(part)]
    parts = [("docstring", part) for part in docstrings(tree)]
    parts += [("comment", part) for part in comments(text)]
    for kind, part in parts:
        if match := STARTS[kind].match(part):
            line = part.splitlines()[0]
            lines.append(f"a {kind} starts with {match[0]!r}: '{line}'; use a verb or a noun")
    lines += [f"the name {name!r}: {NAMES[name]}" for name in names(tree) if name in NAMES]
    return lines


@cache
def rooms() -> dict[str, list[Path]]:
    """Every file that the rule covers, by the name under which plain_english.toml lists it."""
    by_room: dict[str, list[Path]] = {}
    package = ROOT / "titan_lite"
    for path in {*package.rglob("*.py")} - {ROOT / name for name in RULES["exempt"]}:
        by_room.setdefault(path.relative_to(package).parts[0].removesuffix(".py"), []).append(path)
    by_room["docs"] = [*(ROOT / "docs").rglob("*.md")]
    by_room["pages"] = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    by_room["scripts"] = [*ROOT.glob("*.sh"), *(ROOT / "scripts").glob("*.*")]
    by_room["toml"] = [*ROOT.glob("*.toml"), *(ROOT / "train_configs").rglob("*.toml")]
    by_room["toml"] += [*(ROOT / "assets").rglob("*.toml"), *(ROOT / ".github").rglob("*.yml")]
    by_room["benchmarks"] = [
        path for end in ("py", "md") for path in (ROOT / "benchmarks").glob(f"*.{end}")
    ]
    tests = ROOT / "tests"
    for path in {*tests.rglob("*.py")} - {Path(__file__)}:
        by_room.setdefault(str(path.parent.relative_to(ROOT)), []).append(path)
    return by_room


@pytest.mark.parametrize("room", sorted(rooms()))
def test_a_room_is_written_in_plain_english(room: str) -> None:
    assert [
        f"{path.relative_to(ROOT)}: {hit}"
        for path in rooms()[room]
        for hit in hits(path.read_text(encoding="utf-8"), path.suffix)
    ] == []


def test_exempt_files_exist_and_every_rule_has_a_reason() -> None:
    assert all((ROOT / name).is_file() for name in RULES["exempt"])
    assert all(rule["reason"] and rule["instead"] for rule in RULES["rule"])


@pytest.mark.parametrize(
    ("text", "suffix", "hit"),
    [
        ("The key\ncannot act.", ".md", "'cannot act'"),
        ("# NCCL goes\n# on without it\nx = 1", ".py", "'goes on'"),
        ("# a = 1\n# A rank that tells the others", ".toml", "'tells'"),
        ("say = 'says'", ".toml", None),
        ("x = f'{y} begins {z}'", ".py", "'begins'"),
        ("x = ('broken '\n'off')", ".py", "'broken off'"),
        ("class A:\n    x: int\n    'What it is.'", ".py", "a docstring starts with 'What'"),
        ("# Of each rank.\nx = 1", ".py", "a comment starts with 'Of'"),
        ("x = 1  # a number\ny = 2  # Often more", ".py", None),
        ("def f(found): ...", ".py", "the name 'found'"),
        ("# It is no layer.", ".py", "'is no '"),
        ("# There is no layer; it is no longer one.", ".py", None),
    ],
)
def test_planted_words_are_seen(text: str, suffix: str, hit: str | None) -> None:
    lines = hits(text, suffix)
    assert len(lines) == (hit is not None)
    assert all(line.startswith(str(hit)) for line in lines)
