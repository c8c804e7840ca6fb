"""The README.md of an export, with runnable code that loads every exported file."""

from pathlib import Path
from typing import Any

import torch
from timm.layers.norm import LayerNorm2d
from torch import nn

from hjepa.distributed.seeding import generator
from hjepa.models.encoder import Encoder
from hjepa.models.timm_encoder import final_norm
from hjepa.tasks.export.timm_model import has_timm_model, load_timm_model, read_call

TIMM_SECTION = """## timm

```python
{imports}
model = timm.create_model({arguments}).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{function}```

{text}
"""

TIMM_TEXT = """`model(images)` is the mean patch token [B, {dim}]; `model.forward_features(images)` are all tokens
[B, {count}, {dim}]{order}."""

ENCODE_TEXT = {  # whether the model itself computes the features
    True: "`encode(images)` returns features and tokens; `model(images)` are the same features.",
    False: "`encode(images)` returns features and tokens. `model(images)` are not the features, because timm ends this\n"
    "architecture differently, such as with a norm after the pooling.",
}

LAST_TEXT = "`encode(images)` returns features and tokens. `model(images)` pools the last layer alone."

HUB = """
`timm.create_model("local-dir:PATH", pretrained=True)` loads the model from anywhere; `num_classes=10` gives it a new classifier.
This folder can be uploaded to the Hugging Face Hub as it is, by `hf upload USER/NAME .` of the package huggingface_hub (first add
a license to the head of this file). The name of the model is then `hf-hub:USER/NAME`.
"""

HUB_HEAD = """---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- timm
- image-feature-extraction
---

"""

NO_JSON = """
The convolutional stem of this encoder cannot be described in the `config.json` of a model hub, so that timm needs this code.
"""

NO_TIMM = """## timm

timm has no model of this architecture, {architecture}: use {file} below, which {needs}.
"""

NEEDS = {"torch_export": "needs nothing but PyTorch", "onnx": "needs ONNX Runtime"}

# The computations of `hjepa.tasks.export.timm_model.OUTPUTS` that take more than a call of the model.
TIMM_FUNCTIONS = {
    "blocks": """

def encode(images):
    tokens, blocks = model.forward_intermediates(images, output_fmt="NLC", return_prefix_tokens=True)
    parts = [{parts}]
    return torch.cat([part.mean(1) for part in parts], dim=1), tokens
""",
    "map": """

def encode(images):
    last = model.forward_intermediates(images, intermediates_only=True)[-1]{norm}
    return last.mean((2, 3)), last.flatten(2).mT
""",
    "maps": """

def encode(images):
    maps = model.forward_intermediates(images, intermediates_only=True){norm}
    return torch.cat([stage.mean((2, 3)) for stage in maps], dim=1), maps[-1].flatten(2).mT
""",
}

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


def render_readme(summary: dict[str, Any], preprocess: dict[str, Any], folder: Path, encoder: Encoder) -> str:
    """Return the text of README.md.

    Args:
        summary: Content of the summary.json of the export.
        preprocess: Content of preprocess.json.
        folder: Folder of the export, which contains a model of timm if that format was exported.
        encoder: Exported encoder.
    """
    size, (num_summary, num_patches, dim) = preprocess["image_size"], summary["tokens"].values()
    count, (*earlier, last) = num_summary + num_patches, summary["feature_layers"]
    background = "ignored" if preprocess["background"] is None else f"composited onto the color {preprocess['background']}"
    pooled = "the mean patch token" + (", then the mean summary token" if num_summary else "")
    if earlier:
        pooled = f"for each of {', '.join(earlier)} and {last} in turn: {pooled}"
    sections = [
        f"# The encoder of {summary['run']}\n\n"
        f"Exported from checkpoint {summary['checkpoint']} (step {summary['step']}, sha256 {summary['checkpoint_hash']}...). The "
        f"input is a batch of RGB images, float32 [B, 3, {size}, {size}], for any B: "
        f"upright by its EXIF orientation, transparency {background}, "
        f"shorter side resized to {size} (bilinear, antialiased), center crop, pixels in [0, 1], "
        f"minus mean {preprocess['mean']}, divided by std {preprocess['std']} (also in `preprocess.json`).\n\n"
        f"The outputs are `features` [B, {summary['feature_dim']}] ({pooled}) and `tokens` "
        f"[B, {count}, {dim}] of {last}{summary_first(num_summary)}. Paths below are relative to this folder.\n"
    ]
    if not has_timm_model(encoder):
        name = next(iter(summary["difference"]))
        file = "`encoder.pt2`" if name == "torch_export" else "`encoder.onnx`"
        sections.append(NO_TIMM.format(architecture=type(encoder).__name__, file=file, needs=NEEDS[name]))
    for name, difference in summary["difference"].items():
        text = timm_section(folder, summary["tokens"], size) if name == "timm" else SECTIONS[name]
        sections.append(
            f"{text}\nIts outputs differ from those of the run by {difference:.1e} of the largest value "
            f"({summary['compared_on']}).\n"
        )
    return (HUB_HEAD if (folder / "config.json").exists() else "") + "\n".join(sections)


def timm_section(folder: Path, tokens: dict[str, int], size: int) -> str:
    """Return the section about timm, whose code makes the call that `load_timm_model` makes.

    Args:
        folder: Folder of the export.
        tokens: Numbers of summary and patch tokens, and their width.
        size: Side of the images in pixels.
    """
    (call, outputs), num_summary = read_call(folder), tokens["summary"]
    imports, arguments = "import timm\n", {key: repr(value) for key, value in call.items()}
    if stem := call.get("embed_layer"):
        imports, arguments["embed_layer"] = CONV_STEM_IMPORTS + imports, CONV_STEM.format(**stem)
    if outputs == "tokens":
        order = summary_first(num_summary)
        function, text = "", TIMM_TEXT.format(dim=tokens["dim"], count=tokens["patches"] + num_summary, order=order)
    else:
        parts = "*blocks[:-1], tokens"
        if num_summary:
            parts = "*(part for block in blocks[:-1] for part in block), "
            parts += f"tokens[:, {num_summary}:], tokens[:, :{num_summary}]"
        norm = "" if outputs == "blocks" else norm_code(folder, "last" if outputs == "map" else "maps[-1]")
        function = TIMM_FUNCTIONS[outputs].format(parts=parts, norm=norm)
        text = ENCODE_TEXT[computes_features(folder, size)] if outputs == "map" else LAST_TEXT
        imports += "import torch\n"
    code = TIMM_SECTION.format(imports=imports, arguments=format_call(arguments, hub=not stem), function=function, text=text)
    return code + (NO_JSON if stem else HUB)


def format_call(arguments: dict[str, str], hub: bool) -> str:
    """Return the code of the arguments of `timm.create_model`, on one line if the folder is one of a model hub."""
    if hub:
        return f"{arguments['model_name']}, pretrained=True".replace("'", '"')
    return "\n    " + "\n    ".join(f"{key}={value}," for key, value in arguments.items()) + "\n"


@torch.no_grad()
def computes_features(folder: Path, size: int) -> bool:
    """Return whether the output of the exported model itself is the features."""
    module, encode = load_timm_model(folder)
    images = torch.randn(2, 3, size, size, generator=generator(0, "export"))
    output, features = module(images), encode(module, images)[0]
    return output.shape == features.shape and bool((output - features).abs().max() <= 1e-4 * features.abs().max())


def norm_code(folder: Path, variable: str) -> str:
    """Return the line of code that normalizes the last map [B, D, H, W] of an exported model, empty if it has no final norm."""
    module = load_timm_model(folder).module
    norm = final_norm(module)
    name = next((name for name, child in module.named_modules() if child is norm), None)
    if norm is None or name is None:
        return ""
    if isinstance(norm, nn.LayerNorm) and not isinstance(norm, LayerNorm2d):
        return f"\n    {variable} = model.{name}({variable}.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)"
    return f"\n    {variable} = model.{name}({variable})"


def summary_first(num_summary: int) -> str:
    """Return the order of the tokens in words, empty without summary tokens."""
    return f", the {num_summary} summary tokens first" if num_summary else ""
