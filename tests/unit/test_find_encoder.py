"""Encoders in checkpoints of other trainers: found where they are, said in the log, and never guessed."""

import contextlib
import logging
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hjepa.config.errors import UserError
from hjepa.models.encoder import Encoder
from hjepa.models.hiera import HieraEncoder
from hjepa.models.pretrained import load_encoder
from hjepa.models.timm_encoder import TimmEncoder
from hjepa.models.vit import ViTEncoder
from hjepa.training.build import build_untrained
from tests.helpers.runs import build_components, checked_config

Weights = dict[str, Tensor]


def small_vit(**options: Any) -> ViTEncoder:
    return ViTEncoder(**({"image_size": 32, "patch_size": 8, "dim": 32, "depth": 3, "heads": 2} | options))


def timm_vit(seed: int = 0, **options: Any) -> nn.Module:
    """Return a ViT of timm, with a class token, as most trainers use it."""
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **(sizes | options)).eval()


def resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=0)


def resnet_encoder() -> TimmEncoder:
    return TimmEncoder(image_size=32, patch_size=32, name="test_resnet", options={})


def put(prefix: str, weights: Mapping[str, Tensor]) -> Weights:
    return {f"{prefix}{name}": value for name, value in weights.items()}


HEAD = {"mlp.0.weight": torch.zeros(2, 2)}
DECODER = {
    "mask_token": torch.zeros(1, 1, 32),
    "decoder_pos_embed": torch.zeros(1, 17, 16),
    "decoder_blocks.0.norm1.weight": torch.zeros(16),
}
OPTIONS = Namespace(arch="vit", output=Path("/out"))


def dino(vit: Weights, other: Weights) -> Any:
    student = put("module.backbone.", other) | put("module.head.", HEAD)
    teacher = put("module.backbone.", vit) | put("module.head.", HEAD)
    return {"student": student, "teacher": teacher, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "args": OPTIONS}


def moco(network: Weights, other: Weights) -> Any:
    query = put("module.encoder_q.", network | {"fc.0.weight": torch.zeros(2, 2)})
    return {"state_dict": query | put("module.encoder_k.", other) | {"module.queue": torch.zeros(2, 2)}, "arch": "resnet18"}


def wrapped(vit: Weights, other: Weights) -> Any:
    """Return what torch.compile, activation checkpointing and DDP make of the names."""
    names = {name: name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module.") for name in vit}
    return {"state_dict": {f"module._orig_mod.{names[name]}": value for name, value in vit.items()}}


VIT = {  # layout of a checkpoint, and what is said
    "DINO": (dino, "took `teacher`, dropped `module.backbone.`; left out cls_token; student.module.backbone can be chosen"),
    "MAE": (lambda vit, other: {"model": vit | DECODER, "args": OPTIONS}, "took `model`; left out cls_token, mask_token"),
    "MoCo v3": (
        lambda vit, other: {"state_dict": put("module.base_encoder.", vit) | put("module.momentum_encoder.", other)},
        "took `state_dict`, dropped `module.base_encoder.`; left out cls_token; state_dict.module.momentum_encoder can",
    ),
    "I-JEPA": (
        lambda vit, other: {"encoder": put("module.", other), "predictor": {}, "target_encoder": put("module.", vit)},
        "took `target_encoder`, dropped `module.`",
    ),
    "timm": (lambda vit, other: {"state_dict": other, "state_dict_ema": vit, "args": OPTIONS}, "took `state_dict_ema`"),
    "Lightning": (lambda vit, other: {"state_dict": put("backbone.", vit) | put("head.", HEAD)}, "dropped `backbone.`"),
    "plain": (lambda vit, other: vit, "took the tensors of the file; left out cls_token"),
    "compiled": (wrapped, "took `state_dict`, dropped `module._orig_mod.`"),
    "one network twice": (lambda vit, other: {"a": vit, "b": vit}, "took `a`"),
}


@pytest.mark.parametrize("trainer", VIT)
def test_a_vit_is_found_in_the_checkpoint_of_a_trainer(trainer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights, other = timm_vit(1).state_dict(), timm_vit(2).state_dict()
    layout, said = VIT[trainer]
    torch.save(layout(weights, other), tmp_path / "c.pth")
    encoder = loaded(small_vit(), tmp_path / "c.pth", caplog)
    assert torch.equal(encoder.blocks[1].mlp.fc1.weight, weights["blocks.1.mlp.fc1.weight"])
    assert torch.equal(encoder.pos_embed, weights["pos_embed"][:, 1:])
    assert f"model.pretrained={tmp_path}/c.pth: " in caplog.text
    assert said in caplog.text


def numbered(network: nn.Module) -> Weights:
    return nn.Sequential(*list(network.children())[:-1]).state_dict()


RESNET = {
    "MoCo": (lambda a, b: moco(a.state_dict(), b.state_dict()), "dropped `module.encoder_q.`; left out fc"),
    "SwAV": (
        lambda a, b: put("module.", a.state_dict() | {"prototypes.weight": torch.zeros(2, 2)}),
        "dropped `module.`; left out prototypes",
    ),
    "solo-learn": (
        lambda a, b: {"state_dict": put("backbone.", a.state_dict()) | put("momentum_backbone.", b.state_dict())},
        "took `state_dict`, dropped `backbone.`",
    ),
    "lightly": (
        lambda a, b: {"state_dict": put("backbone.", numbered(a)) | put("backbone_momentum.", numbered(b))},
        "took `state_dict`, dropped `backbone.`",
    ),
    "VISSL": (
        lambda a, b: {"classy_state_dict": {"base_model": {"model": {"trunk": put("_feature_blocks.", a.state_dict())}}}},
        "took `classy_state_dict.base_model.model.trunk`, dropped `_feature_blocks.`",
    ),
}


@pytest.mark.parametrize("trainer", RESNET)
def test_a_resnet_is_found_in_the_checkpoint_of_a_trainer(trainer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layout, said = RESNET[trainer]
    torch.save(layout(resnet(1), resnet(2)), tmp_path / "c.ckpt")
    encoder = loaded(resnet_encoder(), tmp_path / "c.ckpt", caplog)
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in resnet(1).state_dict().items())
    assert said in caplog.text


def test_a_hiera_of_its_authors_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = {"image_size": 32, "patch_size": 8, "dim": 8, "stages": [1, 1, 1]}
    source = HieraEncoder(**small)
    renamed = {name.replace("head.norm", "encoder_norm"): value for name, value in source.state_dict().items()}
    torch.save({"model_state": renamed | DECODER}, tmp_path / "c.pth")
    encoder = loaded(HieraEncoder(**small), tmp_path / "c.pth", caplog)
    assert torch.equal(encoder.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)
    assert "took `model_state`; left out mask_token, decoder_pos_embed, decoder_blocks" in caplog.text


def loaded(encoder: Encoder, file: Path, caplog: pytest.LogCaptureFixture, key: str | None = None) -> Any:
    with caplog.at_level(logging.INFO, "hjepa"):
        load_encoder(encoder, str(file), "model.pretrained", key)
    return encoder


def dinov2(weights: Weights) -> Weights:
    """Return the weights of a ViT with register tokens by the names of DINOv2, where the class token has a position."""
    named = {name.replace("reg_token", "register_tokens"): value for name, value in weights.items()}
    positions = torch.cat([torch.ones(1, 1, 32), weights["pos_embed"]], dim=1)
    return named | {"cls_token": weights["cls_token"] - 1, "pos_embed": positions, "mask_token": torch.zeros(1, 32)}


REGISTERS = {"reg_tokens": 2, "no_embed_class": True}


@pytest.mark.parametrize(("tokens", "options", "layout"), [(1, {}, dict), (3, REGISTERS, dict), (3, REGISTERS, dinov2)])
def test_class_and_register_tokens_become_as_many_summary_tokens(
    tokens: int,
    options: dict[str, Any],
    layout: Callable[[Weights], Weights],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source, images = timm_vit(**options), torch.randn(2, 3, 32, 32)
    torch.save(layout(source.state_dict()), tmp_path / "c.pth")
    encoder = loaded(small_vit(num_summary_tokens=tokens), tmp_path / "c.pth", caplog)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(images)[-1].tokens, source.forward_features(images), atol=1e-4, rtol=0)
    assert "cls_token" not in caplog.text


def test_summary_tokens_and_resampling_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(timm_vit(img_size=64, patch_size=16, num_classes=5).state_dict(), tmp_path / "c.pth")
    encoder = loaded(small_vit(num_summary_tokens=4, image_size=64), tmp_path / "c.pth", caplog)
    assert encoder.pos_embed.shape == (1, 64, 32)
    assert "left out cls_token, head; resampled pos_embed, patch_embed.proj.weight; kept the initial reg_token" in caplog.text


def test_several_encoders_that_fit_are_named_and_one_can_be_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights, other = timm_vit(1).state_dict(), timm_vit(2).state_dict()
    torch.save({"state_dict": put("image.", weights) | put("depth.", other)}, tmp_path / "two.pth")
    with pytest.raises(
        UserError, match=r"two.pth holds several encoders that fit, state_dict.image and state_dict.depth; .*key="
    ):
        load_encoder(small_vit(), f"{tmp_path}/two.pth", "model.pretrained")
    for key in ("depth", "state_dict.depth"):
        encoder = loaded(small_vit(), tmp_path / "two.pth", caplog, key)
        assert torch.equal(encoder.norm.weight, other["norm.weight"])
        assert torch.equal(encoder.blocks[2].attn.qkv.weight, other["blocks.2.attn.qkv.weight"])
    with pytest.raises(UserError, match=r"model.pretrained_key=dep: .* are state_dict.image and state_dict.depth"):
        load_encoder(small_vit(), f"{tmp_path}/two.pth", "model.pretrained", "dep")
    torch.save(dino(weights, other), tmp_path / "dino.pth")
    encoder = loaded(small_vit(), tmp_path / "dino.pth", caplog, "student")
    assert torch.equal(encoder.blocks[2].attn.qkv.weight, other["blocks.2.attn.qkv.weight"])
    assert "took `student`" in caplog.text
    torch.save(weights | put("ema.", other), tmp_path / "root.pth")
    encoder = loaded(small_vit(), tmp_path / "root.pth", caplog, ".")
    assert torch.equal(encoder.blocks[2].attn.qkv.weight, weights["blocks.2.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"teacher": timm_vit(depth=4).state_dict()},
            r"not fit the model \(took `teacher`\): it has the unknown blocks.3.attn.proj",
        ),
        ({"teacher": timm_vit(depth=1).state_dict()}, r"it lacks blocks.1.attn.proj.bias, .* and 21 more"),
        (timm_vit(init_values=1e-5).state_dict(), r"has the unknown blocks.0.ls1.gamma"),
        (
            dino(timm_vit(embed_dim=64).state_dict(), timm_vit(embed_dim=64).state_dict()),
            r"took `teacher`.*\(1, 16, 64\) instead",
        ),
        (timm_vit(**REGISTERS).state_dict(), r"has the unknown reg_token"),
        (timm_vit().state_dict() | {"pos_embed": torch.zeros(1, 15, 32)}, r"it cannot be converted \("),
        (
            moco(resnet().state_dict(), resnet().state_dict()),
            r"no weights of this encoder, such as pos_embed, .*it has the tensors",
        ),
        ({"epoch": 3}, r"it has no tensors with names"),
        ([torch.zeros(2)], r"it has no tensors with names"),
        (torch.zeros(2), r"it has no tensors with names"),
    ],
)
def test_what_does_not_fit_is_named(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "c.pth")
    encoder = small_vit()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        load_encoder(encoder, f"{tmp_path}/c.pth", "model.pretrained")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


class Touch:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mknod, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_execute_code_is_refused_with_the_reason_and_a_way_out(zipped: bool, tmp_path: Path) -> None:
    content = {"state_dict": timm_vit().state_dict(), "config": Touch(tmp_path / "owned")}
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UserError, match=r"c.pth is refused: .*it contains posix.mknod, .*python -c .*weights_only=False"
    ) as caught:
        load_encoder(small_vit(), f"{tmp_path}/c.pth", "model.pretrained")
    assert not (tmp_path / "owned").exists()
    (way_out,) = [part for part in str(caught.value).split('"') if part.startswith("import torch")]
    with contextlib.chdir(tmp_path):
        exec(way_out)
    load_encoder(small_vit(), f"{tmp_path}/weights.pth", "model.pretrained")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.pth", b"<!DOCTYPE html>", "cannot be read as a checkpoint .*complete file of torch.save"),
        ("c.pth", b"", "cannot be read as a checkpoint"),
        ("c.safetensors", b"none", "cannot be read as safetensors"),
        ("c.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS .*git lfs pull"),
    ],
)
def test_files_that_cannot_be_read_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_encoder(small_vit(), f"{tmp_path}/{name}", "model.pretrained")
    assert "\n" not in str(caught.value)


def test_torchscript_is_refused_with_a_way_out(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "c.pt")
    with pytest.raises(UserError, match=r"is a TorchScript program, .*torch.jit.load"):
        load_encoder(small_vit(), f"{tmp_path}/c.pt", "model.pretrained")


def test_options_choose_the_encoder_of_student_and_teacher(tmp_path: Path) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    weights, other = timm_vit(1, **sizes).state_dict(), timm_vit(2, **sizes).state_dict()
    torch.save({"image": weights, "depth": other}, tmp_path / "two.pth")
    name = "blocks.1.attn.qkv.weight"
    model = build_components(f"model.pretrained={tmp_path}/two.pth", "model.pretrained_key=depth").model
    assert torch.equal(model.student.state_dict()[name], other[name])
    config = checked_config(f"model.pretrained={tmp_path}/two.pth", "model.pretrained_key=depth")
    untrained = build_untrained(config, torch.device("cpu"))
    assert not torch.equal(untrained.state_dict()[name], other[name])
    model = build_components("teacher=frozen", f"teacher.weights={tmp_path}/two.pth", "teacher.weights_key=image").model
    assert torch.equal(model.teacher.state_dict()[name], weights[name])
    with pytest.raises(UserError, match=r"choose one of them, as in teacher.weights_key=depth"):
        build_components("teacher=frozen", f"teacher.weights={tmp_path}/two.pth")
    with pytest.raises(UserError, match=r"model.pretrained_key=depth .*set model.pretrained"):
        build_components("model.pretrained_key=depth")


def test_the_folder_of_a_model_hub_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = timm_vit().state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    encoder = loaded(small_vit(), tmp_path, caplog)
    assert torch.equal(encoder.blocks[1].attn.qkv.weight, weights["blocks.1.attn.qkv.weight"])
