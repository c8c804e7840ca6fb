"""The options of a class or function by its dotted path, read from its source: importing it would import torch first."""

import ast
import importlib.util
from functools import cache
from pathlib import Path

from hjepa.config.errors import UserError

Signature = dict[str, str | None]  # an option's annotation


@cache
def signature_of(target: str) -> Signature:
    """The options of a function or class of this package, by its dotted path, without importing it."""
    module, _, name = target.rpartition(".")
    found = defined_at(module, name) if importlib.util.find_spec(module) else None
    if found is None:
        raise UserError(f"_target_: {target} does not exist.")
    module, _, name = found.rpartition(".")
    definition = definitions(module)[name]
    if isinstance(definition, ast.FunctionDef):
        return arguments(definition)
    body = {n.name: n for n in definition.body if isinstance(n, ast.FunctionDef)}
    bases = [found for b in definition.bases if isinstance(b, ast.Name) and (found := defined_at(module, b.id))]
    inherited = {k: v for base in bases for k, v in signature_of(base).items()}
    if "__init__" in body:
        own = arguments(body["__init__"])
        return own | inherited if body["__init__"].args.kwarg else own
    fields = [n for n in definition.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    return inherited | {n.target.id: ast.unparse(n.annotation) for n in fields}  # type: ignore[union-attr]


def defined_at(module: str, name: str) -> str | None:
    """The dotted path of a name that a module defines or imports from its own package; None for what comes from others."""
    if name in definitions(module):
        return f"{module}.{name}"
    package = module.partition(".")[0]
    for statement in statements(module):
        if isinstance(statement, ast.ImportFrom):
            source = importlib.util.resolve_name("." * statement.level + (statement.module or ""), package_of(module))
            for alias in statement.names:
                if source.partition(".")[0] == package and name == (alias.asname or alias.name):
                    return defined_at(source, alias.name)
    return None


@cache
def definitions(module: str) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    """Classes and functions of a module by name."""
    return {n.name: n for n in statements(module) if isinstance(n, ast.ClassDef | ast.FunctionDef)}


@cache
def statements(module: str) -> list[ast.stmt]:
    """What stands in a module, without importing it; of a package with a stub, what the stub hands on."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    stub = Path(spec.origin).with_name("__init__.pyi")
    file = stub if spec.submodule_search_locations and stub.exists() else Path(spec.origin)
    return ast.parse(file.read_text()).body


def package_of(module: str) -> str:
    """The package that relative imports of a module start from."""
    spec = importlib.util.find_spec(module)
    return module if spec and spec.submodule_search_locations else module.rpartition(".")[0]


def arguments(function: ast.FunctionDef) -> Signature:
    """Named arguments of a function, without self."""
    named = [*function.args.args, *function.args.kwonlyargs]
    return {a.arg: ast.unparse(a.annotation) if a.annotation else None for a in named if a.arg != "self"}
