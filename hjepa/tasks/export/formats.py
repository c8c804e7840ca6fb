"""Export formats: each one writes an encoder to files and loads it from them in the way its users will.

A loaded encoder is a function that maps normalized images [B, 3, S, S], for any batch size, to features and tokens as
`ExportedEncoder` does. To add a format, implement `Format`, add it to `FORMATS` and to the signature of
`hjepa.tasks.export_encoder`, and explain in `readme.py` how to load it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.export import Dim

from hjepa.config.errors import import_optional
from hjepa.models.encoder import Encoder
from hjepa.tasks.export.timm_model import FeaturesAndTokens, has_timm_model, load_timm_model, write_timm_model
from hjepa.tasks.trained_run import TrainedRun

EncoderFunction = Callable[[Tensor], FeaturesAndTokens]

MAX_PROTOBUF_BYTES = 1.9e9  # an ONNX file is smaller than 2 GB; the weights of larger models are stored in a file beside it


class ExportedEncoder(nn.Module):
    """The exported function: normalized images float32 [B, 3, S, S] to features [B, F] and tokens [B, T + N, D].

    The features are those of the probes, of the last layer or of all layers side by side: the mean patch token, followed by the
    mean summary token if the encoder has any. The tokens are those of the last layer; its T summary tokens precede the N patch
    tokens.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.eval()

    def forward(self, images: Tensor) -> FeaturesAndTokens:
        stages = self.encoder(images, layers=self.encoder.feature_layers)
        return self.encoder.pool_stages(stages), stages[-1].tokens


class Format(Protocol):
    """An export format.

    Attributes:
        packages: Optional packages that the format requires.
    """

    packages: tuple[str, ...] = ()

    def export(self, run: TrainedRun, images: Tensor, folder: Path) -> None:
        """Write the encoder of a run to a folder; `images` [B, 3, S, S] are example inputs for tracing."""

    def load(self, folder: Path) -> EncoderFunction:
        """Load the exported encoder from the folder alone."""


class Timm(Format):
    """A folder of timm's model hub: the weights as safetensors, and the config with which timm loads them."""

    def export(self, run: TrainedRun, images: Tensor, folder: Path) -> None:
        write_timm_model(run, folder)

    def load(self, folder: Path) -> EncoderFunction:
        module, encode = load_timm_model(folder)
        return lambda images: encode(module, images)


class Onnx(Format):
    """ONNX, written by the exporter of PyTorch and loaded by ONNX Runtime."""

    packages = ("onnx", "onnxscript", "onnxruntime")

    def export(self, run: TrainedRun, images: Tensor, folder: Path) -> None:
        module = ExportedEncoder(run.encoder)
        torch.onnx.export(
            module,
            (images,),
            folder / "encoder.onnx",
            dynamo=True,
            dynamic_shapes={"images": {0: Dim("batch")}},
            input_names=["images"],
            output_names=["features", "tokens"],
            external_data=sum(p.nbytes for p in module.parameters()) > MAX_PROTOBUF_BYTES,
            verbose=False,
        )

    def load(self, folder: Path) -> EncoderFunction:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(folder / "encoder.onnx", options, providers=["CPUExecutionProvider"])

        def encode(images: Tensor) -> FeaturesAndTokens:
            features, tokens = session.run(["features", "tokens"], {"images": images.numpy()})
            return torch.from_numpy(features), torch.from_numpy(tokens)

        return encode


class TorchExport(Format):
    """A program of torch.export."""

    def export(self, run: TrainedRun, images: Tensor, folder: Path) -> None:
        program = torch.export.export(ExportedEncoder(run.encoder), (images,), dynamic_shapes={"images": {0: Dim("batch")}})
        torch.export.save(program, folder / "encoder.pt2")

    def load(self, folder: Path) -> EncoderFunction:
        return torch.export.load(folder / "encoder.pt2").module()


FORMATS: dict[str, Format] = {"timm": Timm(), "onnx": Onnx(), "torch_export": TorchExport()}


def default_formats(encoder: Encoder) -> list[str]:
    """Return the format that an encoder is exported in if none is chosen: timm, or else one that PyTorch alone can load."""
    return ["timm"] if has_timm_model(encoder) else ["torch_export"]


def check_packages(formats: Sequence[str]) -> None:
    """Raise `UserError` if a format requires a package that is not installed."""
    for name in formats:
        for package in FORMATS[name].packages:
            import_optional(
                package, f"task.formats=[{name}]", "omit this format; pip install -e '.[export]' installs all of them"
            )
