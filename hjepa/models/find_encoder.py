"""Find the weights of an encoder in a checkpoint of any trainer.

Trainers nest state dicts in entries (`teacher`, `state_dict`) and wrap modules, so that names have prefixes
(`module.backbone.`). A *part* of a checkpoint is a prefix of an entry under which the tensors of the encoder lie. Parts are found
by the names of these tensors, and none is chosen where several fit, unless the trainers that write both have a rule for it.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hjepa.config.errors import UserError, first_line
from hjepa.models.encoder import Encoder

log = logging.getLogger(__name__)

Weights = dict[str, Tensor]

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # modules that torch inserts, at any depth

# Of two networks in one checkpoint, the first is the one that the authors of the trainers evaluate.
PREFERRED = {
    ("teacher", "student"),  # DINO, iBOT, DINOv2, and this framework
    ("teacher_backbone", "student_backbone"),  # lightly
    ("target_encoder", "encoder"),  # I-JEPA
    ("encoder_q", "encoder_k"),  # MoCo
    ("base_encoder", "momentum_encoder"),  # MoCo v3
    ("encoder", "momentum_encoder"),  # solo-learn, earlier
    ("backbone", "momentum_backbone"),  # solo-learn
    ("backbone", "backbone_momentum"),  # lightly
    ("online_encoder", "target_encoder"),  # BYOL
    ("state_dict_ema", "state_dict"),  # timm
    ("model_ema", "model"),  # torchvision
}

MIN_SHARE = 0.1  # of the names of an encoder, which a part has to contain; inside a ResNet, conv1 and bn1 repeat in every block


class Part(NamedTuple):
    """Tensors in a checkpoint that may be those of an encoder.

    Attributes:
        entries: Keys of the nested dictionaries that lead to the tensors.
        prefix: What precedes the encoder's own names, with a dot at the end, or nothing.
        weights: The tensors, by their names without the prefix.
    """

    entries: tuple[str, ...]
    prefix: str
    weights: Weights

    @property
    def path(self) -> str:
        """Entries and prefix, joined by dots; a dot if there are none."""
        return ".".join([*self.entries, *self.prefix.split(".")[:-1]]) or "."

    def matches(self, key: str) -> bool:
        """Return whether the path is, or contains, a key such as "student" or "state_dict.encoder"."""
        return key == self.path or f".{key}." in f".{self.path}."

    def describe(self) -> str:
        """Return what was taken and dropped, in words."""
        entry = f"took `{'.'.join(self.entries)}`" if self.entries else "took the tensors of the file"
        return entry + (f", dropped `{self.prefix}`" if self.prefix else "")


def find_encoder(content: Any, encoder: Encoder, key: str | None, source: str, key_option: str) -> Weights:
    """Return the weights of an encoder in a checkpoint, and log what was taken.

    Args:
        content: Content of the file.
        encoder: Encoder whose weights are looked for.
        key: Entry or prefix that the user has chosen, such as "student", or None.
        source: Option and value that name the file, for messages.
        key_option: Name of the option of `key`, for messages.

    Raises:
        UserError: If no part fits the encoder, or several do.
    """
    parts = find_parts(content, encoder)
    if not parts:
        raise UserError(
            f"{source} holds no weights of {describe_names(encoder.state_dict())}; it has {describe_content(content)}."
        )
    chosen = [part for part in parts if key is None or part.matches(key)]
    if not chosen:
        raise UserError(f"{key_option}={key}: {source} holds no encoder there; those in the file are {list_paths(parts)}.")
    adapted = [(part, *adapt(encoder, part)) for part in chosen]
    fitting = [(part, weights) for part, weights, differences in adapted if not differences]
    if not fitting:
        part, _, differences = next((a for a in adapted if all(a is b or is_preferred(a[0], b[0]) for b in adapted)), adapted[0])
        raise UserError(
            f"{source} does not fit the model ({part.describe()}): it {'; it '.join(differences)}. "
            "Choose the same model and levels as in the source."
        )
    part, weights = choose(fitting, source, key_option)
    others = [other.path for other in parts if other.path != part.path]
    log.info("%s: %s", source, "; ".join([part.describe(), *describe_use(encoder, part, weights, others, key_option)]))
    return weights


def find_parts(content: Any, encoder: Encoder) -> list[Part]:
    """Return the parts of a checkpoint that have a good share of the names of an encoder, the largest first.

    If there are none, the children of the encoder are looked for by their numbers, which are their names after
    `nn.Sequential(*network.children())`.
    """
    tensors = {} if isinstance(content, Tensor) else dict(flatten(content))
    names = set(encoder.state_dict())
    numbers = {name: str(i) for i, (name, _) in enumerate(encoder.named_children())}
    numbered = {f"{numbers[first]}.{rest}" for first, _, rest in (name.partition(".") for name in names) if first in numbers}
    parts = split_parts(tensors, names)
    if parts or not numbered:
        return parts
    children = {number: name for name, number in numbers.items()}
    return [part._replace(weights=name_children(part.weights, children)) for part in split_parts(tensors, numbered)]


def flatten(content: Any, entries: tuple[str, ...] = ()) -> Iterator[tuple[tuple[tuple[str, ...], str], Tensor]]:
    """Yield the entries, the name and the value of every tensor in nested dictionaries."""
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, Tensor):
            yield (entries, str(name)), value
        elif isinstance(name, str):
            yield from flatten(value, (*entries, name))


def split_parts(tensors: Mapping[tuple[tuple[str, ...], str], Tensor], names: set[str]) -> list[Part]:
    """Return the parts of a checkpoint under which enough of the given names lie."""
    counts: Counter[tuple[tuple[str, ...], str]] = Counter()
    for entries, name in tensors:
        segments = name.split(".")
        counts.update(
            (entries, "".join(f"{segment}." for segment in segments[:i]))
            for i, segment in enumerate(segments)
            if segment not in WRAPPERS and unwrap(".".join(segments[i:])) in names
        )
    most = max(counts.values(), default=0)
    return [
        Part(
            entries,
            prefix,
            {
                unwrap(name[len(prefix) :]): value
                for (at, name), value in tensors.items()
                if at == entries and name.startswith(prefix)
            },
        )
        for (entries, prefix), count in counts.most_common()
        if count >= max(most / 2, MIN_SHARE * len(names))
    ]


def unwrap(name: str) -> str:
    """Remove the wrapper modules from the name of a tensor."""
    return ".".join(segment for segment in name.split(".") if segment not in WRAPPERS)


def name_children(weights: Weights, children: Mapping[str, str]) -> Weights:
    """Replace the number at the start of every name by the name of the child."""
    split = ((*name.partition("."), value) for name, value in weights.items())
    return {children.get(first, first) + dot + rest: value for first, dot, rest, value in split}


def adapt(encoder: Encoder, part: Part) -> tuple[Weights, list[str]]:
    """Return the weights of a part, converted for the encoder, and their differences from what it expects.

    Tensors outside the modules of the encoder, such as those of a decoder or a projector, are left out.
    """
    try:
        weights = encoder.adapt_state_dict(dict(part.weights))
    except Exception as error:  # functions of timm assert what they need
        return {}, [f"cannot be converted ({first_line(error)})"]
    own = encoder.state_dict()
    weights = {name: value for name, value in weights.items() if name in own or hasattr(encoder, name.partition(".")[0])}
    return weights, find_differences(own, weights)


def find_differences(expected: Weights, weights: Weights) -> list[str]:
    """Return what weights lack, what they have too many, and which shapes differ, in words; empty if they fit."""
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in weights and value.shape != weights[name].shape
    ]
    return [
        f"{verb} {shorten(names)}" for verb, names in (("lacks", missing), ("has the unknown", unknown), ("has", shapes)) if names
    ]


def choose(fitting: list[tuple[Part, Weights]], source: str, key_option: str) -> tuple[Part, Weights]:
    """Return the only part that fits, or the one that is preferred over all others.

    Raises:
        UserError: If there is none.
    """
    for part, weights in fitting:
        if all(part is other or is_preferred(part, other) or equal(weights, others) for other, others in fitting):
            return part, weights
    paths = list_paths([part for part, _ in fitting])
    raise UserError(
        f"{source} holds several encoders that fit, {paths}; choose one of them, as in {key_option}={fitting[-1][0].path}."
    )


def is_preferred(part: Part, other: Part) -> bool:
    """Return whether two parts differ in one entry or module, and trainers use this one."""
    paths = [[name for name in p.path.split(".") if name not in ("module", *WRAPPERS)] for p in (part, other)]
    differing = [pair for pair in zip(*paths, strict=False) if pair[0] != pair[1]]
    return len(paths[0]) == len(paths[1]) and len(differing) == 1 and differing[0] in PREFERRED


def equal(weights: Weights, others: Weights) -> bool:
    """Return whether two state dicts hold the same values."""
    return weights.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in weights.items())


def describe_use(encoder: Encoder, part: Part, weights: Weights, others: list[str], key_option: str) -> list[str]:
    """Return what was left out, changed or not found, in words."""
    own, unused = encoder.state_dict(), encoder.unused_names(part.weights, weights)
    resampled = [name for name, value in weights.items() if name in part.weights and is_resampled(part.weights[name], value)]
    initial = [name for name, value in weights.items() if value.data_ptr() == own[name].data_ptr()]
    groups = list(dict.fromkeys(name.partition(".")[0] for name in unused))
    return [
        f"{verb} {shorten(names)}"
        for verb, names in (("left out", groups), ("resampled", resampled), ("kept the initial", initial))
        if names
    ] + ([f"{shorten(others)} can be chosen by {key_option}"] if others else [])


def is_resampled(before: Tensor, after: Tensor) -> bool:
    """Return whether a tensor has another shape, other than without the position of a class token."""
    return before.shape != after.shape and before[:, 1:].shape != after.shape


def list_paths(parts: list[Part]) -> str:
    """Return the paths of parts in words."""
    return " and ".join(f"{part.path} (no prefix)" if part.path == "." else part.path for part in parts)


def shorten(names: list[str]) -> str:
    """Join names, at most three."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def describe_names(weights: Weights) -> str:
    """Return some names of an encoder in words."""
    return f"this encoder, such as {shorten(list(weights))}"


def describe_content(content: Any) -> str:
    """Return some names of a checkpoint in words."""
    names = [".".join((*entries, name)) for (entries, name), _ in flatten(content)]
    return f"the tensors {shorten(names)}" if names else "no tensors with names"
