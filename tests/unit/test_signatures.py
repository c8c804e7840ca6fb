"""The options read from the source of a class are those that its constructor takes, and nothing is imported to find them."""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.utils import get_object

from hjepa.config.errors import UserError
from hjepa.config.schema import check_node, check_type
from hjepa.config.signatures import ANY_OPTION, definitions, imports, signature_of, statements
from hjepa.config.targets import hjepa_targets


def accepted(target: object) -> set[str]:
    """Return the named arguments of a function, or of a class and of the bases to which it passes further ones."""
    if not inspect.isclass(target):
        return set(inspect.signature(target).parameters)  # type: ignore[arg-type]
    names: set[str] = set()
    for base in target.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters
            named = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
            names |= named - {"self"}
            if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
                break
    return names


# Options of a base that a class passes by itself, so that Python would refuse a second value.
PASSED = {"ImageFolder": ["roots", "weights"], "ImageNet": ["roots", "weights"], "FolderMixture": ["classes"]}


@pytest.mark.parametrize("target", sorted(hjepa_targets()))
def test_the_options_read_from_the_source_are_those_that_are_accepted(target: str) -> None:
    assert set(signature_of(target)) == accepted(get_object(target)).difference(PASSED.get(target.rpartition(".")[2], ()))


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, options in PASSED.items() for option in options])
def test_an_option_that_a_class_passes_to_its_base_is_refused_by_name(name: str, option: str) -> None:
    with pytest.raises(UserError, match=rf"dataset.{option} is not an option of hjepa.data.{name}; its options are "):
        check_node("dataset", {"_target_": f"hjepa.data.{name}", option: ["a"]})


@pytest.mark.parametrize("name", ["ImageFolder", "ImageNet"])
@pytest.mark.parametrize("classes", ["classes.txt", ["a", "b c"], None])
def test_the_annotation_of_a_class_counts_more_than_that_of_its_base(name: str, classes: object) -> None:
    check_node("dataset", {"_target_": f"hjepa.data.{name}", "classes": classes})


def write_package(folder: Path, files: dict[str, str]) -> None:
    (folder / "somebodys").mkdir()
    for name, text in files.items():
        (folder / "somebodys" / f"{name}.py").write_text(text)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put an empty folder on the import path, and forget afterwards what was read from it."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for cached in (signature_of, statements, definitions, imports):
        cached.cache_clear()


FIRST = "raise ImportError\nclass First:\n    def __init__(self, size: int, root: float): ..."
OUTSIDE = {
    "relative import, alias and re-export, own annotation first": (
        "from torch.nn import Module\nfrom .between import Base\n"
        "class X(Base, Module):\n    def __init__(self, root: str, **common: object): ...",
        {"root": "str", "size": "int"},
    ),
    "options that the class passes by itself, past a base without a constructor": (
        "from .first import First\nclass Empty(First): ...\nclass X(Empty):\n"
        "    def __init__(self, name: str, **more):\n        super().__init__(1, **more)",
        {"root": "float", "name": "str"},
    ),
    "the same, by keyword, and an own option of the same name": (
        "from .first import First\nclass X(First):\n"
        "    def __init__(self, size: str, **more):\n        super().__init__(size=int(size), root=1.0, **more)",
        {"size": "str"},
    ),
    "dotted base": (
        "import somebodys.first as f\nclass X(f.First[int]):\n    pass",
        {"size": "int", "root": "float"},
    ),
    "base of hjepa through its stub": (
        "from hjepa.masking import PartitionMasking\nclass X(PartitionMasking): ...",
        {"grid": "int", "pools": "Sequence[int]", "num_parts": "int"},
    ),
    "base of a third package": (
        "from timm.models import ResNet\nclass X(ResNet):\n    def __init__(self, own: int, **more): ...",
        {"own": "int", ANY_OPTION: None},
    ),
    "dataclass": (
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass X:\n    a: ClassVar[int]\n    b: int = 1",
        {"b": "int"},
    ),
    "function": ("def X(a, *, b: float = 1.0): ...", {"a": None, "b": "float"}),
    "made at run time": ("X = lambda **options: options", {ANY_OPTION: None}),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_classes_outside_the_package_are_read_as_well(name: str, package: Path) -> None:
    text, expected = OUTSIDE[name]
    write_package(package, {"first": FIRST, "between": "from somebodys.first import First as Base", "mine": text})
    assert signature_of("somebodys.mine.X").keys() == expected.keys()
    assert all(signature_of("somebodys.mine.X")[key] == value for key, value in expected.items() if key != "num_parts")
    assert "somebodys.first" not in sys.modules


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("X", "there is no module X; write package.module.Class"),
        ("nobodys.module.X", r"there is no module nobodys.module; .* the folder that holds nobodys, or put .* on PYTHONPATH"),
        ("somebodys.mine.Y", "the module somebodys.mine has no class or function Y"),
        ("somebodys.mine.Z", "the module somebodys.mine has no class or function Z"),
        ("somebodys.first.Second", r"importing somebodys.first failed at .*first.py, line 1 \(ImportError"),
        ("somebodys.typo.X", r"typo.py, line 2: "),
    ],
)
def test_a_target_that_cannot_be_found_is_explained(target: str, words: str, package: Path) -> None:
    write_package(package, {"first": FIRST, "mine": "Z = 1", "typo": "class X:\n    def"})
    with pytest.raises(UserError, match=words):
        signature_of(target)


@pytest.mark.parametrize(
    ("annotation", "value", "message"),
    [
        ("PositiveInt", 0, "expected PositiveInt (input should be greater than 0)."),
        ("PositiveInt | None", "a", "expected PositiveInt | None (input should be a valid integer)."),
        ("PositiveFloat | list[PositiveFloat]", 0, "(input should be greater than 0)."),
        ("float | list[float]", [1.0, "a"], "(item 1: input should be a valid number)."),
        ("float | list[float]", "a", "(input should be a valid number, or input should be a valid list)."),
        ("FractionRange", [0.5, 0.2], ": expected [smallest, largest] with 0 < smallest <= largest <= 1."),
        ("Literal['a', 'b']", "c", "expected Literal['a', 'b'] (input should be 'a' or 'b')."),
    ],
)
def test_a_wrong_value_is_explained_by_the_type_that_it_matches_best(annotation: str, value: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_type("a.b", value, annotation)
    assert str(caught.value).startswith(f"a.b={value!r}: expected ")
    assert str(caught.value).endswith(message)


@pytest.mark.parametrize("annotation", ["torch.Tensor", "'Encoder'", "Callable[..., Encoder] | None", "'A' | None", "1 + 'a'"])
def test_annotations_that_only_the_source_of_a_class_knows_are_left_to_the_constructor(annotation: str) -> None:
    check_type("a.b", 1, annotation)
