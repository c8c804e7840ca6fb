"""Signatures: the options of a class or function and their annotations, read from its source code.

Importing a target would usually import torch first. Reading its source instead lets a mistake in a config be reported in under
a second. Bases and imported names are followed within the package of the target and into hjepa, through the `__init__.pyi`
stubs of hjepa's packages.
"""

import ast
import traceback
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

from hjepa.config.errors import UserError

Signature = dict[str, str | None]  # the annotation of every option; None where there is none

ANY_OPTION = "**"  # in a signature: further options are accepted and left to the constructor

NO_OPTIONS = ("ABC", "abc.ABC", "object", "Protocol", "Generic", "Module", "nn.Module", "torch.nn.Module")  # base classes

Definition = ast.ClassDef | ast.FunctionDef


@cache
def signature_of(target: str) -> Signature:
    """Return the signature of a class or function.

    Args:
        target: Dotted path of the class or function.

    Raises:
        UserError: There is no such module, class or function.
    """
    module, _, name = target.rpartition(".")
    path = find_definition(module, name)
    if path is None:
        import_target(target)
        return {ANY_OPTION: None}
    module, _, name = path.rpartition(".")
    definition = definitions(module)[name]
    return arguments(definition) if isinstance(definition, ast.FunctionDef) else class_signature(module, definition)


def class_signature(module: str, definition: ast.ClassDef) -> Signature:
    """Return the signature of a class.

    It has the options of its constructor and, if that passes further ones to a base, those of the base, except for the ones that
    it passes by itself. Where both have an option, the annotation of the class itself counts.
    """
    inherited: Signature = {}
    for base in reversed(definition.bases):
        name = ast.unparse(base).partition("[")[0]
        path = find_definition(module, name)
        if path is not None:
            inherited |= signature_of(path)
        elif name not in NO_OPTIONS and not module.startswith("hjepa."):
            inherited[ANY_OPTION] = None
    for statement in definition.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            own = arguments(statement)
            if not statement.args.kwarg:
                return own
            passed = passed_to_base(statement, positional_options(module, definition.bases))
            return {name: annotation for name, annotation in inherited.items() if name not in passed} | own
    if not any("dataclass" in ast.unparse(decorator) for decorator in definition.decorator_list):
        return inherited
    fields = [node for node in definition.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    options = [field for field in fields if not (field.value and "init=False" in ast.unparse(field.value))]
    annotations = {ast.unparse(field.target): ast.unparse(field.annotation) for field in options}
    return inherited | {name: annotation for name, annotation in annotations.items() if "ClassVar" not in annotation}


def positional_options(module: str, bases: list[ast.expr]) -> list[str]:
    """Return the options of the first constructor among some base classes, in the order of its positional arguments."""
    for base in bases:
        if path := find_definition(module, ast.unparse(base).partition("[")[0]):
            owner, _, name = path.rpartition(".")
            definition = definitions(owner)[name]
            constructors = [node for node in definition.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
            if constructors:
                return [argument.arg for argument in constructors[0].args.args[1:]]
            if isinstance(definition, ast.ClassDef) and (options := positional_options(owner, definition.bases)):
                return options
    return []


def passed_to_base(constructor: ast.FunctionDef, options: list[str]) -> set[str]:
    """Return the options of a base that a constructor passes by itself: `root` in `super().__init__(root, **options)`.

    Args:
        constructor: The constructor of the class.
        options: Options of the base in the order of its positional arguments.
    """
    for node in ast.walk(constructor):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "super().__init__":
            return {*options[: len(node.args)], *(keyword.arg for keyword in node.keywords if keyword.arg)}
    return set()


def arguments(function: ast.FunctionDef) -> Signature:
    """Return the named arguments of a function, without `self`."""
    named = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return {a.arg: ast.unparse(a.annotation) if a.annotation else None for a in named if a.arg != "self"}


def find_definition(module: str, name: str) -> str | None:
    """Return the dotted path under which a name that a module uses is defined.

    Args:
        module: Dotted path of the module.
        name: The name, possibly dotted (`masking.MaskSampler`).

    Returns:
        The dotted path, or None for what the source does not show, or what comes from a third package.
    """
    if name in definitions(module):
        return f"{module}.{name}"
    first, _, rest = name.partition(".")
    source = imports(module).get(first)
    if source is None or source.partition(".")[0] not in ("hjepa", module.partition(".")[0]):
        return None
    owner, _, attribute = f"{source}.{rest}".rstrip(".").rpartition(".")
    return find_definition(owner, attribute) if (owner, attribute) != (module, name) else None


@cache
def definitions(module: str) -> dict[str, Definition]:
    """Return the classes and functions that a module defines, by name."""
    return {node.name: node for node in statements(module) if isinstance(node, Definition)}


@cache
def imports(module: str) -> dict[str, str]:
    """Return the names that a module imports and the dotted paths that they stand for."""
    spec = find_module(module)
    package = module if spec and spec.submodule_search_locations else module.rpartition(".")[0]
    paths: dict[str, str] = {}
    for node in statements(module):
        if isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            paths |= {alias.asname or alias.name: f"{source}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            tops = [alias.name.partition(".")[0] for alias in node.names]
            paths |= {a.asname or top: a.name if a.asname else top for a, top in zip(node.names, tops, strict=True)}
    return paths


@cache
def statements(module: str) -> list[ast.stmt]:
    """Return the statements of a module's source, without importing it; those of the stub if a package has one."""
    spec = find_module(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return []
    file = Path(spec.origin)
    if spec.submodule_search_locations and file.with_suffix(".pyi").exists():
        file = file.with_suffix(".pyi")
    try:
        return ast.parse(file.read_text()).body
    except SyntaxError as error:
        raise UserError(f"{file}, line {error.lineno}: {error.msg}.") from None


def find_module(module: str) -> ModuleSpec | None:
    """Find a module without importing it or its parent packages; None if there is none."""
    top, *names = module.split(".")
    try:
        spec = find_spec(top)
    except ValueError:  # no name, or a module without a specification, such as __main__
        return None
    for name in names:
        locations = spec and spec.submodule_search_locations
        spec = PathFinder.find_spec(name, list(locations)) if locations else None  # by the full name, parents would be imported
    return spec


def import_target(target: str) -> Any:
    """Import a class or function by its dotted path.

    Raises:
        UserError: It cannot be imported.
    """
    module, _, name = target.rpartition(".")
    package = module.partition(".")[0]
    if find_module(module) is None:
        raise UserError(
            f"_target_={target}: there is no module {module or target}; write package.module.Class, and start the command in the "
            f"folder that holds {package or 'the package'}, or put that folder on PYTHONPATH."
        )
    try:
        value = getattr(import_module(module), name, None)
    except Exception as error:
        if package == "hjepa":
            raise
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
        raise UserError(
            f"_target_={target}: importing {module} failed at {frames[-1].filename}, line {frames[-1].lineno} "
            f"({type(error).__name__}: {error}); the packages that it imports must be installed, in the current folder or on "
            "PYTHONPATH."
        ) from error
    if not callable(value):
        raise UserError(f"_target_={target}: the module {module} has no class or function {name}.")
    return value
