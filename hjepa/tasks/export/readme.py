"""The README.md of an export, with runnable code that loads every exported file."""

import json
from pathlib import Path
from typing import Any

TIMM_SECTION = """## timm

```python
{imports}import timm

model = timm.create_model(
    {arguments}
).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

`model(images)` is the mean patch token [B, {dim}]; `model.forward_features(images)` are all tokens [B, {count}, {dim}]{order}.
"""

CONV_STEM_IMPORTS = """from functools import partial

from timm.layers import HybridEmbed, GroupNorm1
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn
"""

CONV_STEM = """partial(
        HybridEmbed,
        backbone=ConvStem(3, {depth}, {channels}, {kernel_size}, {stride}, norm_layer=GroupNorm1, act_layer=nn.GELU),
        proj=False,
    )"""

SECTIONS = {
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
}


def render_readme(summary: dict[str, Any], preprocess: dict[str, Any], folder: Path) -> str:
    """Return the text of README.md.

    Args:
        summary: Content of the summary.json of the export.
        preprocess: Content of preprocess.json.
        folder: Folder of the export, which contains timm.json if that format was exported.
    """
    size, (num_summary, num_patches) = preprocess["image_size"], summary["tokens"].values()
    dim = summary["feature_dim"] // (2 if num_summary else 1)
    count = num_summary + num_patches
    mean_summary = ", then the mean summary token" if num_summary else ""
    order = f", the {num_summary} summary tokens first" if num_summary else ""
    sections = [
        f"# The encoder of {summary['run']}\n\n"
        f"Exported from checkpoint {summary['checkpoint']} (step {summary['step']}, sha256 {summary['checkpoint_hash']}...). The "
        f"input is a batch of RGB images, float32 [B, 3, {size}, {size}], for any B: shorter side resized to {size} (bilinear, "
        f"antialiased), center crop, pixels in [0, 1], minus mean {preprocess['mean']}, divided by std {preprocess['std']} "
        "(also in `preprocess.json`).\n\n"
        f"The outputs are `features` [B, {summary['feature_dim']}] (the mean patch token{mean_summary}) and `tokens` "
        f"[B, {count}, {dim}]{order}. Paths below are relative to this folder.\n"
    ]
    for name, difference in summary["difference"].items():
        text = timm_section(folder, dim, count, order) if name == "timm" else SECTIONS[name]
        sections.append(
            f"{text}\nIts outputs differ from those of the run by {difference:.1e} of the largest value "
            f"({summary['compared_on']}).\n"
        )
    return "\n".join(sections)


def timm_section(folder: Path, dim: int, count: int, order: str) -> str:
    """Return the section about timm, whose code makes the call that timm.json describes."""
    call, imports = json.loads((folder / "timm.json").read_text()), ""
    arguments = {key: repr(value) for key, value in call.items()}
    if "embed_layer" in call:
        imports, arguments["embed_layer"] = CONV_STEM_IMPORTS, CONV_STEM.format(**call["embed_layer"])
    lines = "\n    ".join(f"{key}={value}," for key, value in arguments.items())
    return TIMM_SECTION.format(imports=imports, arguments=lines, dim=dim, count=count, order=order)
