"""Every setting of the schema is read by code that holds its section, not just by something of the same name."""

import ast
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAliasType, get_args, get_origin, get_type_hints

import pytest
from pydantic import BaseModel

import nemo_rl
import nemo_rl.config.schema
from nemo_rl.config.fields import sections
from nemo_rl.config.schema.base import Section

type Types = set[type[BaseModel]]

PACKAGE = Path(nemo_rl.__path__[0])
SCHEMA = PACKAGE / "config" / "schema"


def declared() -> Iterator[tuple[str, Types]]:
    """Every section and every union of sections, by the name that annotations have for it."""
    for info in pkgutil.iter_modules([str(SCHEMA)]):
        module = importlib.import_module(f"{nemo_rl.config.schema.__name__}.{info.name}")
        for name, thing in vars(module).items():
            if isinstance(thing, TypeAliasType) or (isinstance(thing, type) and issubclass(thing, Section)):
                yield name, set(sections(thing))


NAMED = dict(declared())
SECTIONS: Types = set().union(*NAMED.values()) - {Section}


class Reads(ast.NodeVisitor):
    """The fields that a piece of code reads, found by following sections through annotations and assignments.

    A name means the same all over a file. An attribute that is no field (`.values()`, `LoadedConfig.config`) leads to
    the sections that it is asked of.
    """

    def __init__(self) -> None:
        self.fields: set[str] = set()
        self.attributes: set[str] = set()
        self._held: dict[str, Types] = {}

    def all_of(self, tree: ast.AST, held: Mapping[str, Types] = MappingProxyType({})) -> "Reads":
        self._held.update(held)
        known = -1
        while known < (known := len(self.fields) + sum(map(len, self._held.values()))):
            self.visit(tree)
        return self

    def visit(self, node: ast.AST) -> None:
        match node:
            case ast.arg(arg=name, annotation=ast.AST() as annotation):
                self._hold(ast.Name(name), self._annotated(annotation))
            case ast.TypeVar(name=name, bound=ast.AST() as bound):
                self._hold(ast.Name(name), self._annotated(bound))
            case ast.AnnAssign():
                self._hold(node.target, self._annotated(node.annotation))
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                for target, value in zip(targets, values, strict=True):
                    self._hold(target, self._types(value))
            case ast.Assign(targets=[target]):
                self._hold(target, self._types(node.value))
            case ast.For() | ast.comprehension():
                self._hold(node.target, self._types(node.iter))
            case ast.Attribute(attr=name, ctx=ast.Load()):
                self.attributes.add(name)
                for held in self._types(node.value):
                    related = (one for one in SECTIONS if issubclass(held, one) or issubclass(one, held))
                    self.fields |= {f"{one.__name__}.{name}" for one in related if name in one.model_fields}
            case _:
                pass
        self.generic_visit(node)

    def _types(self, node: ast.AST) -> Types:
        """The sections that the value of an expression is, or holds."""
        match node:
            case ast.Attribute(value=base, attr=name):
                inner = (inside(held, name) for held in self._types(base))
                return self._held.get(ast.unparse(node), set()).union(*inner)
            case ast.Name(id=name):
                return self._held.get(name, set())
            case ast.Call(func=part) | ast.Subscript(value=part):
                return self._types(part)
            case ast.IfExp(body=one, orelse=other):
                return self._types(one) | self._types(other)
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Dict(values=parts):
                return set().union(*map(self._types, parts))
            case _:
                return set()

    def _hold(self, target: ast.AST, held: Types) -> None:
        for part in target.elts if isinstance(target, ast.Tuple) else [target]:
            if held:
                self._held.setdefault(ast.unparse(part), set()).update(held)

    def _annotated(self, annotation: ast.AST) -> Types:
        names = (part.id for part in ast.walk(annotation) if isinstance(part, ast.Name))
        return set().union(*(NAMED.get(name) or self._held.get(name, set()) for name in names))


def inside(held: type[BaseModel], name: str) -> Types:
    """The sections that an attribute of a section is: of its field, of its property, or else still the same."""
    if name in held.model_fields:
        return set(sections(held.model_fields[name].annotation))
    found = getattr(held, name, None)
    if isinstance(found, property):
        return set(sections(get_type_hints(found.fget).get("return")))
    return {held}


def fields_read() -> set[str]:
    """By the package, the properties of the schema that it uses included."""
    files = [path for path in PACKAGE.rglob("*.py") if SCHEMA not in path.parents]
    reads = [Reads().all_of(ast.parse(path.read_text())) for path in files]
    used = set().union(*(one.attributes for one in reads))
    fields = set().union(*(one.fields for one in reads))
    for path in SCHEMA.glob("*.py"):
        for section in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)):
            for part in section.body:
                if isinstance(part, ast.FunctionDef) and part.name in used:
                    fields |= Reads().all_of(part, {"self": NAMED[section.name]}).fields
    return fields


def is_tag(annotation: object) -> bool:
    """Whether a field can hold one value only: it tells the members of a union apart and is read by the schema."""
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def test_every_config_field_is_read_by_code_that_holds_its_section() -> None:
    fields = {
        f"{section.__name__}.{name}"
        for section in SECTIONS
        for name, field in section.model_fields.items()
        if not is_tag(field.annotation)
    }
    unread = sorted(fields - fields_read())
    assert not unread, f"no code reads {', '.join(unread)}"
    assert len(fields) > 80


@pytest.mark.parametrize(
    ("code", "read"),
    [
        ("def f(config: GRPOConfig): return config.grpo.seed", True),
        ("def f(loaded: LoadedConfig[GRPOConfig]):\n    loop, x = loaded.config.grpo, 1\n    return loop.seed", True),
        (
            "class A:\n    def __init__(self, c: GRPOLoopConfig): self._c = c\n    def f(self): return self._c.seed",
            True,
        ),
        ("class A[C: GRPOConfig]:\n    def f(self, c: C): return c.loop.seed", True),
        ("def f(seed): return source.seed + config.grpo.seed", False),
        ("def f(config: GRPOConfig): return config.data.train.seed", False),
        ("def f(config: GRPOConfig): config.grpo.seed = 3", False),
    ],
)
def test_a_read_counts_only_through_the_section(code: str, read: bool) -> None:
    assert ("GRPOLoopConfig.seed" in Reads().all_of(ast.parse(code)).fields) == read
