"""README.md of an export: how to load what is in the folder, as code that runs as it stands."""

import json
from pathlib import Path
from typing import Any

TIMM = """## timm

```python
{imports}import timm

model = timm.create_model(
    {arguments}
).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

`model(images)` is the mean patch token [B, {dim}]; `model.forward_features(images)` are all tokens [B, {count}, {dim}]{first}.
"""

CONV_IMPORTS = """from functools import partial

from timm.layers import HybridEmbed, GroupNorm1
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn
"""

CONV = """partial(
        HybridEmbed,
        backbone=ConvStem(3, {depth}, {channels}, {kernel_size}, {stride}, norm_layer=GroupNorm1, act_layer=nn.GELU),
        proj=False,
    )"""

OTHERS = {
    "onnx": """## ONNX

```python
import onnxruntime

session = onnxruntime.InferenceSession("encoder.onnx")
features, tokens = session.run(["features", "tokens"], {"images": images.numpy()})
```
""",
    "torch_export": """## torch.export

```python
import torch

features, tokens = torch.export.load("encoder.pt2").module()(images)
```
""",
    "torchscript": """## TorchScript

```python
import torch

features, tokens = torch.jit.load("encoder.torchscript.pt")(images)
```
""",
}


def render_readme(summary: dict[str, Any], preprocess: dict[str, Any], folder: Path) -> str:
    """The text.

    Args:
        summary: of the export; preprocess: what is in preprocess.json; folder: with timm.json, if it was exported.
    """
    size, (extra, patches) = preprocess["image_size"], summary["tokens"].values()
    dim = summary["feature_dim"] // (2 if extra else 1)
    mean, first = (", then the mean summary token", f", the {extra} summary tokens first") if extra else ("", "")
    parts = [
        f"# The encoder of {summary['run']}\n\n"
        f"From its checkpoint {summary['checkpoint']} (step {summary['step']}, sha256 {summary['checkpoint_hash']}...). It takes "
        f"RGB images float32 [B, 3, {size}, {size}], B as you like: shorter side resized to {size} (bilinear, antialiased), "
        f"center crop, pixels in [0, 1], minus mean {preprocess['mean']}, divided by std {preprocess['std']} "
        "(also in `preprocess.json`).\n\n"
        f"It gives `features` [B, {summary['feature_dim']}] (the mean patch token{mean}) and `tokens` "
        f"[B, {extra + patches}, {dim}]{first}. Paths below are relative to this folder.\n"
    ]
    for name, far in summary["difference"].items():
        text = timm_section(folder, dim, extra + patches, first) if name == "timm" else OTHERS[name]
        parts.append(f"{text}\nDiffers from the run's own outputs by {far:.1e} of the largest ({summary['compared_on']}).\n")
    return "\n".join(parts)


def timm_section(folder: Path, dim: int, count: int, first: str) -> str:
    """How to make timm's model, by the very call of timm.json."""
    call, imports = json.loads((folder / "timm.json").read_text()), ""
    written = {key: repr(value) for key, value in call.items()}
    if "embed_layer" in call:
        imports, written["embed_layer"] = CONV_IMPORTS, CONV.format(**call["embed_layer"])
    arguments = "\n    ".join(f"{key}={value}," for key, value in written.items())
    return TIMM.format(imports=imports, arguments=arguments, dim=dim, count=count, first=first)
