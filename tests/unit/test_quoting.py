"""Arguments that Hydra's grammar refuses are printed as they have to be typed, and what is printed works."""

import re
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

import hjepa
from hjepa.config.errors import UserError
from hjepa.config.quoting import correct, quote
from hjepa.config.schema import check_type

VALUES = (
    "lr=0.1",
    "a=b=c",
    "/data/My Photos (2024)",
    "~/photos",
    "実験",
    "Größe",
    "эксперимент 1",
    "it's",
    'say "hello"',
    "a & b; c",
    "#1",
    "100 % (!)",
    "`x` <y> | z",
    "(x)",
    "a,b=c",
    "C:\\(x)\\",
    '\\"',
    "'unfinished",
    '"unfinished',
    "[unfinished",
    "😀",
)


def typed(text: str) -> str:
    """Return the argument that a shell makes of a text."""
    (argument,) = shlex.split(text)
    return argument


@pytest.mark.parametrize("value", VALUES)
def test_the_correction_of_a_refused_value_is_read_as_that_value(value: str) -> None:
    with pytest.raises(HydraException):
        OverridesParser.create().parse_override(f"name={value}")
    corrected = correct(f"name={value}")
    assert corrected is not None
    override = OverridesParser.create().parse_override(typed(corrected))
    assert (override.key_or_group, override.value()) == ("name", value)
    with pytest.raises(UserError) as caught:
        hjepa.compose(f"name={value}")
    assert str(caught.value) == f"name={value} cannot be parsed as it is; write {corrected}"
    assert hjepa.compose(typed(corrected)).name == value


@pytest.mark.parametrize("text", [*VALUES, "", "a", "\\", "\\\\", 'a\\\\"b', "${x}", "a\nb"])
def test_a_quoted_text_is_read_as_that_text(text: str) -> None:
    assert OverridesParser.create().parse_override(f"key={quote(text)}").value() == text


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("dataset.roots=[/a (1),b, c d,~/e]", ["/a (1)", "b", "c d", "~/e"]),
        ("dataset.classes=[実験,2]", ["実験", 2]),
    ],
)
def test_the_elements_of_a_list_are_quoted_one_by_one(argument: str, value: list[object]) -> None:
    corrected = correct(argument)
    assert corrected is not None
    assert OverridesParser.create().parse_override(typed(corrected)).value() == value


@pytest.mark.parametrize("position", [1, 2, 3])
def test_words_that_the_shell_has_cut_off_are_joined(position: int) -> None:
    arguments = ["dataset.root=/data/My", "Photos", "of", "(2024)", "seed=1"]
    corrected = correct(arguments[position], arguments)
    assert corrected == "'dataset.root=\"/data/My Photos of (2024)\"'"
    assert correct("Photos", ["Photos", "seed=1"]) is None
    assert correct("Photos", ["seed=1", "--multirun", "Photos"]) is None


def test_the_values_of_a_sweep_are_quoted_one_by_one() -> None:
    assert correct("name=a=1,b", ["--multirun", "name=a=1,b"]) == "'name=\"a=1\",b'"


@pytest.mark.parametrize("argument", ["model.encoder={", "=3", "a b=3", "x", "name={a=(b)}"])
def test_where_nothing_can_be_corrected_the_form_of_an_argument_is_shown(argument: str) -> None:
    assert correct(argument) is None


@pytest.mark.parametrize(
    ("path", "value", "annotation", "written"),
    [
        ("name", 2024, "str | None", "'name=\"2024\"'"),
        ("name", True, "str | None", "'name=\"true\"'"),
        ("experiment_name", 0.5, "str", "'experiment_name=\"0.5\"'"),
        ("dataset.classes", [1, "b"], "list[str] | str | None", '\'dataset.classes=["1","b"]\''),
    ],
)
def test_a_number_where_a_text_belongs_is_printed_as_a_text(path: str, value: object, annotation: str, written: str) -> None:
    with pytest.raises(UserError, match=rf"; write {re.escape(written)}\.$"):
        check_type(path, value, annotation)
    OverridesParser.create().parse_override(typed(written))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["name=a,b"], r"name=a,b has several values; .*, or write 'name=\[a,b\]' for a list"),
        (["+dataset=cifar10"], "dataset already has an option; write dataset=OPTION without the plus sign"),
        (["=3"], "=3 chooses no option of a config group; write group=option"),
        (["seed=1", "model=3"], "model=3 chooses no option"),
        (["dataset=null"], "dataset=null chooses no option"),
        (["model="], r"model= is not an option. The options are conv_nano"),
        (["train.steps=${nope}"], r"train.steps refers to a value that does not exist \(Interpolation key 'nope' not found\)"),
        (["name=${oc.env:NOPE}"], r"name refers to a value that does not exist .*'NOPE' not found"),
        (["seed=${seed}"], r"seed refers to a value that does not exist \(Recursive"),
        (["~dataset"], r"model.image_size refers to a value that does not exist"),
        (["train=3"], r"train=3: expected an option of the group, or its values as train.KEY=VALUE"),
        (["train=null"], r"train=None: expected an option of the group"),
        (["model.encoder=null"], r"model.encoder=None: expected options with a _target_"),
        (["model.encoder=3"], r"model.encoder=3: expected options with a _target_"),
    ],
)
def test_other_arguments_that_make_no_config_are_explained_in_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        hjepa.compose(*arguments)
    assert "\n" not in str(caught.value)
