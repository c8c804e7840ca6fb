"""H-JEPA: a student encodes contexts of an image, and a predictor predicts targets that a teacher computes from the whole image.

Data flow: images and masks -> stages of the student -> context tokens -> predictions; images -> stages of the teacher -> targets.
`hjepa.losses.Objective` compares both and regularizes the pooled features of the student.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hjepa.config.errors import UserError
from hjepa.config.types import PositiveInt
from hjepa.distributed.process_group import all_gather_with_grad
from hjepa.masking import Masks
from hjepa.models.encoder import Encoder, Stage
from hjepa.models.levels import Levels
from hjepa.models.predictor import Fusion, Predictor
from hjepa.models.pretrained import load_encoder
from hjepa.models.stacked import StackedLevel


@dataclass(frozen=True)
class LevelOutput:
    """The prediction and the target of one level.

    Attributes:
        name: Name of the level in metrics.
        weight: Factor of the loss of the level.
        prediction: [B, C, P, T, D] for C contexts, P target blocks and T cells per block.
        target: The same shape.
    """

    name: str
    weight: float
    prediction: Float[Tensor, "b c p t d"]
    target: Float[Tensor, "b c p t d"]


@dataclass(frozen=True)
class Output:
    """The output of `HJEPA`, from which an objective computes its loss.

    Attributes:
        levels: Predictions and targets of all levels.
        features: Pooled features of the student [B, V, F], one tensor per regularized level. The V views of an image are the
            contexts of its global crops, followed by its local crops. F is the width of the projector or, without one, of the
            pooled features.
        num_global: Number of views that are contexts of global crops.
    """

    levels: list[LevelOutput]
    features: list[Float[Tensor, "b v _"]]
    num_global: int = 1

    def zero(self) -> Float[Tensor, ""]:
        """Return a float32 zero on the device of the output, to which losses can be added."""
        some = self.features[0] if self.features else self.levels[0].target
        return some.new_zeros((), dtype=torch.float32)


class HJEPA(nn.Module):
    """Student, teacher and predictor over a hierarchy of levels.

    Args:
        image_size: Side of the images in pixels.
        patch_size: Side of a patch in pixels.
        encoder: Constructor of student and teacher (see `hjepa.models.encoder`).
        predictor: Constructor of the predictor that takes the sizes as further arguments.
        projector: Constructor of the map from pooled features to the features that the regularizer uses, or None.
        pretrained: Source of initial weights of student and teacher (see `load_encoder`); None for random weights.
        levels: The hierarchy. Without levels, nothing is predicted and the regularizer is the whole objective.
        num_regularized: Number of levels, starting with the first, of which the regularizer uses the features.
    """

    def __init__(
        self,
        image_size: PositiveInt,
        patch_size: PositiveInt,
        encoder: Callable[..., Encoder],
        predictor: Callable[..., Predictor],
        projector: Callable[..., nn.Module] | None,
        pretrained: str | None,
        levels: Levels,
        num_regularized: int,
    ) -> None:
        super().__init__()
        self.student = encoder(image_size=image_size, patch_size=patch_size, num_summary_tokens=levels.summary_tokens)
        check_summary_tokens(self.student, levels.summary_tokens)
        self.levels, self.grid = levels, self.student.grid
        levels.check_grid(self.grid)
        self.last_layer, layer_dims = self.student.num_layers, self.student.layer_dims
        self.level_layers = levels.layers(self.last_layer) or [self.last_layer]
        self.layers = sorted({*self.level_layers, self.last_layer})
        dim = layer_dims[-1]
        self.fusion = Fusion(levels.fusion, [layer_dims[layer - 1] for layer in self.layers])
        target_dims = [layer_dims[layer - 1] for layer in self.level_layers]
        sizes = {"encoder_dim": dim, "grid": self.grid, "pools": levels.pool, "target_dims": target_dims}
        self.predictor = predictor(**sizes) if levels.pool else None
        self.upper: StackedLevel | None = levels.upper(input_dim=dim, grid=self.grid) if levels.upper else None
        self.regularized_layers = self.level_layers[:num_regularized]
        self.projectors = nn.ModuleDict()  # levels of one layer share their features and a projector
        for layer in sorted(set(self.regularized_layers)):
            width = self.student.feature_dims[layer - 1]
            self.projectors[str(layer)] = projector(dim=width) if projector else nn.Identity()
        if pretrained:
            load_encoder(self.student, pretrained, "model.pretrained")
        self.teacher = deepcopy(self.student).requires_grad_(False).eval()

    def share_teacher(self) -> None:
        """Let the student be its own teacher: targets follow it immediately, and gradients flow through them."""
        self.teacher = self.student
        if self.upper:
            self.upper.share_teacher()

    @property
    def teacher_is_student(self) -> bool:
        """True if the student is its own teacher."""
        return self.teacher is self.student

    def train(self, mode: bool = True) -> "HJEPA":
        """Set the training mode of all modules except teachers, which stay in evaluation mode unless they are students."""
        super().train(mode)
        for teacher, student in self.teacher_student_pairs():
            teacher.train(mode and teacher is student)
        return self

    def teacher_student_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return every teacher with its student, including those of stacked levels."""
        stacked_levels = self.upper.stacked_levels() if self.upper else []
        return [(self.teacher, self.student), *((level.teacher, level.student) for level in stacked_levels)]

    def forward(
        self,
        images: Float[Tensor, "bv 3 h w"],
        masks: Masks,
        crops: Float[Tensor, "bl 3 s s"] | None = None,
        num_crops: int = 1,
    ) -> Output:
        """Compute the predictions, the targets and the features of the student.

        Args:
            images: Global crops [B*V, 3, H, W]; the V crops of an image follow one another.
            masks: Masks of the B*V global crops, on the same device.
            crops: Local crops [B*L, 3, h, w], which only the student encodes; the L crops of an image follow one another.
            num_crops: Number V of global crops per image.
        """
        stages = self.student(images, keep=masks.context, layers=self.layers)
        levels = self.predict(images, masks, stages) if self.predictor else []
        num_global = num_crops * masks.context.shape[1]
        features = self.features(stages, num_global)
        if crops is not None:
            local = self.features(self.student(crops, layers=self.layers), len(crops) * num_crops // len(images))
            features = [torch.cat(pair, dim=1) for pair in zip(features, local, strict=True)]
        return Output(levels, features, num_global)

    def teacher_stages(self, images: Float[Tensor, "b 3 h w"]) -> dict[int, Stage]:
        """Encode whole images by the teacher, in one pass for all levels, contexts and target blocks.

        Returns:
            Stages by layer.
        """
        layers = self.layers if self.upper else sorted(set(self.level_layers))
        with torch.set_grad_enabled(self.teacher_is_student and torch.is_grad_enabled()):
            stages = self.teacher(images, layers=layers)
        return dict(zip(layers, stages, strict=True))

    def predict(self, images: Float[Tensor, "b 3 h w"], masks: Masks, stages: list[Stage]) -> list[LevelOutput]:
        """Compute the predictions and the targets of all levels.

        Args:
            images: Global crops, which the teacher encodes.
            masks: Their masks.
            stages: Stages of the student at `self.layers` for all contexts.
        """
        assert self.predictor is not None
        teacher_stages, tokens = self.teacher_stages(images), self.fusion(stages)
        targets = self.levels.targets(teacher_stages, masks.targets, self.grid, self.last_layer)
        predictions = self.predictor(tokens, masks.context, masks.targets)
        rows = zip(self.levels.names(), self.levels.weight, predictions, targets, strict=True)
        outputs = [LevelOutput(*row) for row in rows]
        if self.levels.summary:
            prediction = self.predictor(tokens[:, : self.student.num_summary_tokens], None, masks.targets[:1])[0]
            outputs.append(LevelOutput("summary", self.levels.summary, prediction, targets[0]))
        if self.upper:
            cells = teacher_stages[self.last_layer].cells
            stacked = self.upper(cells, lambda: self.student(images)[-1].cells, masks.stacked)
            outputs += [LevelOutput(f"stacked{i}", *level) for i, level in enumerate(stacked, start=1)]
        return outputs

    def features(self, stages: list[Stage], num_views: int) -> list[Float[Tensor, "b v _"]]:
        """Pool and project the stages of the student for every regularized level.

        In training, B counts the images of all processes, because the projector normalizes over the batch.

        Args:
            stages: Stages at `self.layers` for B*V views.
            num_views: Number V of views per image.
        """
        projected = {}
        for layer, stage in zip(self.layers, stages, strict=True):
            if layer in self.regularized_layers:
                pooled = self.student.pool_tokens(stage)
                projected[layer] = self.projectors[str(layer)](all_gather_with_grad(pooled) if self.training else pooled)
        return [projected[layer].unflatten(0, (-1, num_views)) for layer in self.regularized_layers]

    def blocks(self) -> list[nn.Module]:
        """Return the repeated modules of all networks, which are compiled, sharded and recomputed one by one."""
        return [block for module in self.modules() if module is not self for block in getattr(module, "blocks", ())]

    def parameter_counts(self) -> dict[str, int]:
        """Return the numbers of parameters: total, trainable, and of every child module."""
        counts = {name: sum(p.numel() for p in child.parameters()) for name, child in self.named_children()}
        counts = {name: count for name, count in counts.items() if count}
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return {"total": sum(counts.values()), "trainable": trainable, **counts}


def check_summary_tokens(encoder: Encoder, wanted: int) -> None:
    """Raise `UserError` if an encoder has no summary tokens although the levels require some."""
    if encoder.num_summary_tokens != wanted:
        raise UserError(
            f"levels.summary_tokens={wanted}: {type(encoder).__name__} has no summary tokens; choose levels without "
            "them, such as levels=flat or levels=pyramid."
        )
