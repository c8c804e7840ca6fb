"""What a config may say of a class is what its constructor takes, found without importing it."""

import inspect
from pathlib import Path

import pytest
from hydra.utils import get_object

from hjepa.config.schema import allowed_targets
from hjepa.config.signatures import signature_of


def accepted(target: object) -> set[str]:
    """The named arguments of a function, or of a class and the bases to which it passes others on."""
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


@pytest.mark.parametrize("target", sorted(allowed_targets()))
def test_the_options_read_from_the_source_are_those_that_are_accepted(target: str) -> None:
    assert set(signature_of(target)) == accepted(get_object(target))


def test_a_class_takes_what_a_base_of_another_file_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over a relative import, another name and a file that only passes it on, and without importing any of them."""
    package = tmp_path / "somebodys"
    package.mkdir()
    for name, text in {
        "__init__": "",
        "first": "raise ImportError\nclass First:\n    def __init__(self, size: int): ...",
        "between": "from somebodys.first import First as Base",
        "second": "from torch.nn import Module\nfrom .between import Base\n"
        "class Second(Base, Module):\n    def __init__(self, root: str, **common: object): ...",
    }.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert signature_of("somebodys.second.Second") == {"root": "str", "size": "int"}
