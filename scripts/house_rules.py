"""Check what ruff and the type checker do not: sizes, names, leftovers and facts about one machine.

Run it as `python scripts/house_rules.py [FILE...]`; without arguments it reads every file that git tracks or would
track. It prints one line per offence and exits with 1 if there is one.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60
FORBIDDEN_STEMS = {"utils", "util", "helpers", "helper", "misc", "common"}

REGISTRY_HOST = "the host of a package registry"

# Each pattern is written so that it does not match its own line.
FORBIDDEN_TEXT = {
    re.compile(r"\b(TO[D]O|FIX[M]E|X[X]X|HA[C]K)\b"): "unfinished work: finish it or open an issue",
    re.compile(r"(?<![\w.~}$-])/(wor[k]|roo[t]|hom[e]/\w+|User[s]/\w+|tmp/[w])/"): "a path of one machine",
    re.compile(
        r"https?://[^/\s\"'>]*(arti[f]actory|nexu[s]|reg[i]stry|mirr[o]r|pack[a]ges)[^/\s\"'>]*\."
    ): REGISTRY_HOST,
    re.compile(r"https?://(?!pypi\.org|download\.pytorch\.org)[^\s\"'>]+/simp[l]e\b"): REGISTRY_HOST,
}
# Layers with one owner for one deed; `nemo_rl/` is left off the paths.
FORBIDDEN_CODE = {
    re.compile(r"\bos\.(environ|getenv|putenv)\b"): ("distributed/", "only distributed/ touches environment variables"),
    re.compile(r"\.backward\("): ("training/passes.py", "only training/passes.py calls backward"),
    re.compile(r"^\s*print\("): ("cli.py", "the library logs; only the command line prints"),
}


def main(arguments: list[str]) -> int:
    """Check the files and return the exit code."""
    paths = [Path(argument).resolve() for argument in arguments] or tracked_files()
    offences = [offence for path in paths for offence in check(path)]
    print("\n".join(offences) if offences else f"house rules: {len(paths)} files, no offence")
    return 1 if offences else 0


def tracked_files() -> list[Path]:
    """Every file under version control, and new ones that are not ignored; the whole tree where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        files = (path for path in ROOT.rglob("*") if path.is_file() and not is_cache(path.relative_to(ROOT)))
        return sorted(files)
    return [ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]


def is_cache(path: Path) -> bool:
    """Whether a tool made it: hidden folders, except for the scripts of the continuous integration."""
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts[:-1]) and path.parts[0] != ".ci"


def check(path: Path) -> Iterator[str]:
    """Yield `file:line: offence` for everything wrong with one file."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return  # a picture
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        for pattern, offence in FORBIDDEN_TEXT.items():
            if pattern.search(line):
                yield f"{name}:{number}: {offence}"
    if path.suffix == ".py":
        yield from check_python(name, text, lines)


def check_python(name: str, text: str, lines: list[str]) -> Iterator[str]:
    """Yield the offences that only Python can commit."""
    if Path(name).stem in FORBIDDEN_STEMS:
        yield f"{name}:1: a file is named for what it does, not {Path(name).stem}"
    if len(lines) > MOST_LINES_OF_A_FILE:
        yield f"{name}:1: {len(lines)} lines, {MOST_LINES_OF_A_FILE} are the most"
    if name.startswith("tests/"):
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MOST_LINES_OF_A_FUNCTION:
                yield f"{name}:{node.lineno}: {node.name} has {length} lines, {MOST_LINES_OF_A_FUNCTION} are the most"
    if name.startswith("nemo_rl/"):
        yield from check_owners(name.removeprefix("nemo_rl/"), name, lines)


def check_owners(module: str, name: str, lines: list[str]) -> Iterator[str]:
    """Yield deeds done in a module that does not own them."""
    for pattern, (owner, offence) in FORBIDDEN_CODE.items():
        if not module.startswith(owner):
            yield from (f"{name}:{number}: {offence}" for number, line in enumerate(lines, 1) if pattern.search(line))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
