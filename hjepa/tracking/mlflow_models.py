"""Exported encoders as models of MLflow, which are loaded with `mlflow.pyfunc.load_model`, without hjepa."""

import json
from pathlib import Path
from typing import Any


def onnx_options(folder: Path) -> dict[str, Any]:
    """Return what MLflow needs to know of an exported ONNX encoder; its signature names inputs and outputs and their shapes."""
    import numpy as np
    import onnx
    import onnxruntime
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    model = onnx.load(folder / "encoder.onnx")

    def schema(values: Any) -> Schema:
        shapes = [[d.dim_value or -1 for d in value.type.tensor_type.shape.dim] for value in values]
        return Schema([TensorSpec(np.dtype("float32"), tuple(s), v.name) for v, s in zip(values, shapes, strict=True)])

    return {
        "onnx_model": model,
        "signature": ModelSignature(inputs=schema(model.graph.input), outputs=schema(model.graph.output)),
        "pip_requirements": [f"onnxruntime=={onnxruntime.__version__}", f"onnx=={onnx.__version__}", f"numpy=={np.__version__}"],
        "metadata": {"preprocess": json.loads((folder / "preprocess.json").read_text())},
    }
