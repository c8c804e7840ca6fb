"""The formats that an encoder is exported to: each writes its file, and reads it again as those who get it will.

Read again, every format is a function from normalized images [B, 3, S, S], for any B, to the `Outputs` of them.
"""

import contextlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.export import Dim

from hjepa.config.errors import import_optional
from hjepa.models.conv_stem import conv_arguments, conv_embed
from hjepa.models.vit import ViTEncoder
from hjepa.tasks.trained_run import TrainedRun

Result = tuple[Tensor, Tensor]

Function = Callable[[Tensor], Result]

PROTOBUF_BYTES = 1.9e9  # an ONNX file holds less than 2 GB; the weights of larger ones lie beside it


class Outputs(nn.Module):
    """What is exported: normalized images float32 [B, 3, S, S] -> features [B, F], those of the probes (mean patch token, then
    mean summary token if any), and tokens [B, T + N, D], the T summary tokens first.
    """

    def __init__(self, encoder: ViTEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.eval()

    def forward(self, images: Tensor) -> Result:
        tokens = self.encoder(images)[-1]
        return self.encoder.pooled(tokens), tokens


class Format(Protocol):
    """One of them."""

    packages: tuple[str, ...] = ()  # that it needs and hjepa does not

    def write(self, run: TrainedRun, images: Tensor, folder: Path) -> None:
        """Write the run's encoder; `images` are there to trace it with."""

    def read(self, folder: Path) -> Function:
        """What was written, from the files alone."""


class Timm(Format):
    """Weights, and the call that makes timm's model of them."""

    def write(self, run: TrainedRun, images: Tensor, folder: Path) -> None:
        (folder / "encoder.safetensors").write_bytes(
            save({name: value.contiguous() for name, value in run.encoder.state_dict().items()}, {"format": "pt"})
        )
        (folder / "timm.json").write_text(json.dumps(timm_call(run), indent=2) + "\n")

    def read(self, folder: Path) -> Function:
        with contextlib.chdir(folder):  # the call names its file relative to itself
            call = json.loads(Path("timm.json").read_text())
            if "embed_layer" in call:
                call["embed_layer"] = conv_embed(**call["embed_layer"])
            model = timm.create_model(**call).eval()
        return lambda images: timm_outputs(model, images)


def timm_call(run: TrainedRun) -> dict[str, Any]:
    """The arguments of `timm.create_model` that make the encoder of a run from encoder.safetensors; of `embed_layer`, those of
    `conv_embed`.
    """
    encoder, options, data = run.encoder, run.config["model"]["encoder"], run.config["dataset"]
    return {
        "model_name": "vit_base_patch16_224",  # a plain ViT, which the arguments make the run's
        "pretrained": True,
        "pretrained_cfg_overlay": {
            "file": "encoder.safetensors",
            "custom_load": False,
            "num_classes": 0,
            "input_size": [3, encoder.image_size, encoder.image_size],
            "mean": data["mean"],
            "std": data["std"],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        },
        "img_size": encoder.image_size,
        **stem_call(encoder),
        "embed_dim": options["dim"],
        "depth": options["depth"],
        "num_heads": options["heads"],
        "mlp_ratio": options["mlp_ratio"],
        "init_values": options["layer_scale"],
        "class_token": False,
        "reg_tokens": encoder.summary_tokens,
        "no_embed_class": True,
        "global_pool": "avg",
        "fc_norm": False,
        "num_classes": 0,
    }


def stem_call(encoder: ViTEncoder) -> dict[str, Any]:
    """Those arguments that make its stem."""
    if encoder.stem == "patch":
        return {"patch_size": encoder.patch_size}
    return {"patch_size": 1, "embed_layer": conv_arguments(encoder.patch_size, encoder.embed_dim)}


def timm_outputs(model: Any, images: Tensor) -> Result:
    """`Outputs` of timm's model, whose own output is the mean patch token."""
    tokens, patches = model.forward_features(images), model(images)
    summary = tokens[:, : model.num_prefix_tokens]
    return torch.cat([patches, summary.mean(1)], dim=1) if model.num_prefix_tokens else patches, tokens


class Onnx(Format):
    """ONNX, by torch's exporter; read by ONNX Runtime."""

    packages = ("onnx", "onnxscript", "onnxruntime")

    def write(self, run: TrainedRun, images: Tensor, folder: Path) -> None:
        module = Outputs(run.encoder)
        torch.onnx.export(
            module,
            (images,),
            folder / "encoder.onnx",
            dynamo=True,
            dynamic_shapes={"images": {0: Dim("batch")}},
            input_names=["images"],
            output_names=["features", "tokens"],
            external_data=sum(p.nbytes for p in module.parameters()) > PROTOBUF_BYTES,
            verbose=False,
        )

    def read(self, folder: Path) -> Function:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(folder / "encoder.onnx", options, providers=["CPUExecutionProvider"])

        def call(images: Tensor) -> Result:
            features, tokens = session.run(["features", "tokens"], {"images": images.numpy()})
            return torch.from_numpy(features), torch.from_numpy(tokens)

        return call


class TorchExport(Format):
    """A torch.export program."""

    def write(self, run: TrainedRun, images: Tensor, folder: Path) -> None:
        program = torch.export.export(Outputs(run.encoder), (images,), dynamic_shapes={"images": {0: Dim("batch")}})
        torch.export.save(program, folder / "encoder.pt2")

    def read(self, folder: Path) -> Function:
        return torch.export.load(folder / "encoder.pt2").module()


class TorchScript(Format):
    """TorchScript, which needs no Python to run; traced."""

    def write(self, run: TrainedRun, images: Tensor, folder: Path) -> None:
        with warnings.catch_warnings(action="ignore"):  # that it is old, and that the size of the images is fixed
            torch.jit.trace(Outputs(run.encoder), (images,)).save(str(folder / "encoder.torchscript.pt"))

    def read(self, folder: Path) -> Function:
        with warnings.catch_warnings(action="ignore"):
            return torch.jit.load(str(folder / "encoder.torchscript.pt"))


FORMATS: dict[str, Format] = {"timm": Timm(), "onnx": Onnx(), "torch_export": TorchExport(), "torchscript": TorchScript()}


def check_packages(formats: Sequence[str]) -> None:
    """Refuse formats whose packages are not installed."""
    for name in formats:
        for package in FORMATS[name].packages:
            import_optional(package, f"task.formats=[{name}]", "leave it out; pip install -e '.[export]' has all of them")
