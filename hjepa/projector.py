"""The projector: an MLP between the pooled features, which the probes see, and those that the regularizer sees."""

from itertools import pairwise

from torch import nn

from hjepa.errors import UserError


class Projector(nn.Sequential):
    """Linear, batch norm and ReLU `layers - 1` times, then a linear map (SimCLR, Chen et al. 2020; VICReg's expander):
    [M, dim] -> [M, out].

    Args:
        dim: width of its input; hidden, out: widths inside and of its output; layers: number of linear maps.
    """

    def __init__(self, dim: int, hidden: int, out: int, layers: int) -> None:
        if min(hidden, out, layers) < 1:
            raise UserError(f"projector.hidden={hidden}, out={out} and layers={layers} must be at least 1.")
        widths = [dim, *[hidden] * (layers - 1), out]
        modules: list[nn.Module] = []
        for before, after in pairwise(widths[:-1]):
            modules += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
        super().__init__(*modules, nn.Linear(widths[-2], out))
