"""Histograms of the trainable weights of a model and of their gradients."""

from torch import Tensor, nn

from hjepa.tracking.histograms import Histogram, count_values


def count_weights_and_gradients(model: nn.Module) -> dict[str, Histogram]:
    """Return the histograms of all trainable parameters, and of their gradients as far as they have any."""
    named: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            named[f"weights/{name}"] = parameter
            if parameter.grad is not None:
                named[f"gradients/{name}"] = parameter.grad
    return {name: count_values(values.detach().float().cpu().numpy().ravel()) for name, values in named.items()}
