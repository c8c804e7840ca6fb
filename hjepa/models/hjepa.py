"""H-JEPA: a student encodes contexts of an image, and a predictor predicts targets that a teacher computes from whole views.

Data flow: images and masks -> stages of the student -> contexts -> predictions; images -> stages of the teacher -> targets.
The targets of a level are cells that are hidden from the context in its own view, or cells of other views of the image.
`hjepa.losses.Objective` compares both and regularizes the pooled features of the student.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hjepa.config.errors import UserError
from hjepa.config.types import PositiveInt
from hjepa.distributed.process_group import all_gather_with_grad
from hjepa.masking import Masks
from hjepa.models.encoder import Encoder, Stage
from hjepa.models.heads import build_heads
from hjepa.models.level_prediction import LevelPrediction
from hjepa.models.levels import Level, Levels
from hjepa.models.output import LevelOutput, Output
from hjepa.models.predictor import Fusion, Predictor
from hjepa.models.pretrained import load_initial_weights
from hjepa.models.stacked import StackedLevel


class HJEPA(LevelPrediction):
    """Student, teacher and predictor over a hierarchy of levels.

    Args:
        image_size: Side of the images in pixels.
        patch_size: Side of a patch in pixels.
        encoder: Callable that creates the encoder from `image_size`, `patch_size` and `num_summary_tokens`.
        predictor: Callable that creates the predictor from `encoder_dim` and `levels`.
        projector: Callable that creates a projector from `dim`, the width of its input; None for no projector.
        pretrained: Source of initial weights of student and teacher (see `load_initial_weights`); None for random weights.
        levels: The hierarchy. Without levels, nothing is predicted and the regularizer is the whole objective.
        regularized: Indices of the levels whose features the regularizer uses.
        features: Layers whose pooled tokens are the image features of probes and exports: "last" or "all".
        pretrained_key: Entry or prefix to take from the checkpoint of another trainer, such as "student"; None finds it.
        compares_images: Whether a prediction loss compares predictions with the targets of other images.
    """

    teacher_is_given = False

    def __init__(
        self,
        image_size: PositiveInt,
        patch_size: PositiveInt,
        encoder: Callable[..., Encoder],
        predictor: Callable[..., Predictor],
        projector: Callable[..., nn.Module] | None,
        pretrained: str | None,
        levels: Levels,
        regularized: Sequence[int],
        features: Literal["last", "all"] = "last",
        pretrained_key: str | None = None,
        compares_images: bool = False,
    ) -> None:
        super().__init__()
        self.compares_images = compares_images
        self.student = encoder(image_size=image_size, patch_size=patch_size, num_summary_tokens=levels.summary_tokens)
        self.student.pooled = features
        self.grid, self.last_layer = self.student.grid, self.student.num_layers
        self.summary_weight, self.levels = levels.summary, levels.resolve(self.student)
        self.level_layers = [level.layer for level in self.levels] or [self.last_layer]
        self.layers = sorted({*self.level_layers, self.last_layer})
        layer_dims = self.student.layer_dims
        self.fusion = Fusion(levels.fusion, [layer_dims[layer - 1] for layer in self.layers])
        dim = layer_dims[-1]
        matched, others = ([level for level in self.levels if level.match == kind] for kind in (True, False))
        self.predictor = predictor(encoder_dim=dim, levels=others) if others else None
        self.matching = levels.matching(levels=matched) if matched else None
        if levels.fusion != "none" and not others:
            raise UserError(
                f"levels.fusion={levels.fusion} has no effect without a level with levels.predictor=[attention]; use "
                "levels.fusion=none."
            )
        self.upper: StackedLevel | None = levels.upper(input_dim=dim, grid=self.grid) if levels.upper else None
        if (largest := max(regularized, default=-1)) >= len(self.level_layers):
            raise UserError(
                f"regularizer.levels has a factor for level {largest + 1}, but there are {len(self.level_layers)} levels; leave "
                "it out."
            )
        self.regularized_layers = [self.level_layers[i] for i in regularized]
        self.projectors = nn.ModuleDict()  # levels of one layer share their features and a projector
        for layer in sorted(set(self.regularized_layers)):
            width = self.student.feature_dims[layer - 1]
            self.projectors[str(layer)] = projector(dim=width) if projector else nn.Identity()
        self.student_heads = build_heads(self.levels, projector)
        load_initial_weights(self.student, pretrained, pretrained_key)
        self.teacher = deepcopy(self.student).requires_grad_(False).eval()
        self.teacher_heads = deepcopy(self.student_heads).requires_grad_(False).eval()

    def share_teacher(self) -> None:
        """Let the student be its own teacher: targets follow it immediately, and gradients flow through them."""
        self.teacher, self.teacher_heads = self.student, self.student_heads
        if self.upper:
            self.upper.share_teacher()

    def set_teacher_kind(self, given: bool) -> None:
        """Set whether the teacher is pretrained and frozen (`teacher=frozen`), also those of stacked levels."""
        self.teacher_is_given = given
        for level in self.upper.stacked_levels() if self.upper else []:
            level.teacher_is_given = given

    @property
    def encoder(self) -> Encoder:
        """The encoder that is probed, evaluated and exported: the teacher or, if that never changes, the student."""
        return self.student if self.teacher_is_given else self.teacher

    @property
    def masked_levels(self) -> list[Level]:
        """The levels whose targets are hidden cells of the context's own view; the masks name their targets in this order."""
        return [level for level in self.levels if not level.other]

    @property
    def mask_pools(self) -> list[int]:
        """Side of a target cell in patches of every masked level, for the mask sampler."""
        return [level.mask_pool for level in self.masked_levels]

    @property
    def needs_views(self) -> bool:
        """True if the targets of some level lie in other views."""
        return any(level.other for level in self.levels)

    def train(self, mode: bool = True) -> "HJEPA":
        """Set the training mode of all modules except teachers, which stay in evaluation mode unless they are students."""
        super().train(mode)
        for teacher, student in self.teacher_student_pairs():
            teacher.train(mode and teacher is student)
        return self

    def teacher_student_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return every teacher with its student, including those of stacked levels."""
        stacked_levels = self.upper.stacked_levels() if self.upper else []
        own = [(self.teacher, self.student), (self.teacher_heads, self.student_heads)]
        return [*own, *((level.teacher, level.student) for level in stacked_levels)]

    def forward(
        self,
        images: Float[Tensor, "bv 3 h w"],
        masks: Masks,
        crops: Float[Tensor, "bl 3 s s"] | None = None,
        boxes: Float[Tensor, "b n 2 3"] | None = None,
        num_crops: int = 1,
    ) -> Output:
        """Compute the predictions, the targets and the features of the student.

        Args:
            images: Global crops [B*V, 3, H, W]; the V crops of an image follow one another.
            masks: Masks of the B*V global crops, on the same device.
            crops: Local crops [B*L, 3, h, w], which only the student encodes; the L crops of an image follow one another.
            boxes: Boxes of the V + L crops of each image (see `hjepa.models.views`), for levels with targets in other views.
            num_crops: Number V of global crops per image.
        """
        stages = self.student(images, keep=None if self.sees_all(masks) else masks.context, layers=self.layers)
        local_stages = [] if crops is None else self.student(crops, layers=self.layers)
        levels = self.predict(images, masks, stages, local_stages, boxes, num_crops) if self.levels else []
        num_global = num_crops * masks.context.shape[1]
        features = self.features(stages, num_global)
        if crops is not None:
            local = self.features(local_stages, len(crops) * num_crops // len(images))
            features = [torch.cat(pair, dim=1) for pair in zip(features, local, strict=True)]
        return Output(levels, features, num_global)

    def teacher_stages(self, images: Float[Tensor, "b 3 h w"], by_student: list[Stage] | None = None) -> dict[int, Stage]:
        """Encode whole images by the teacher, in one pass for all levels, contexts and target blocks.

        Args:
            images: The images.
            by_student: Stages of the student for the same images, at `self.layers`, if it has encoded them completely.

        Returns:
            Stages by layer.
        """
        layers = self.layers if self.upper else sorted(set(self.level_layers))
        if by_student is not None and self.teacher_is_student:
            return self.by_layer(by_student)
        with torch.set_grad_enabled(self.teacher_is_student and torch.is_grad_enabled()):
            stages = self.teacher(images, layers=layers)
        return dict(zip(layers, stages, strict=True))

    def predict(
        self,
        images: Float[Tensor, "bv 3 h w"],
        masks: Masks,
        stages: list[Stage],
        local_stages: list[Stage],
        boxes: Float[Tensor, "b n 2 3"] | None,
        num_crops: int,
    ) -> list[LevelOutput]:
        """Compute the predictions and the targets of all levels.

        Args:
            images: Global crops, which the teacher encodes.
            masks: Their masks.
            stages: Stages of the student at `self.layers` for all contexts of the global crops.
            local_stages: The same for the local crops; empty if there are none.
            boxes: See `forward`.
            num_crops: Number of global crops per image.
        """
        teacher_stages = self.teacher_stages(images, stages if self.sees_all(masks) else None)
        outputs: dict[str, LevelOutput] = {}
        if self.masked_levels:
            outputs |= self.predict_masked(masks, stages, teacher_stages)
        if self.needs_views and boxes is not None:
            outputs |= self.predict_other_views(masks, stages, local_stages, teacher_stages, boxes, num_crops)
        levels = [outputs[level.name] for level in self.levels if level.name in outputs]
        levels += [outputs["summary"]] if "summary" in outputs else []
        if self.upper:
            below = teacher_stages[self.last_layer].cells
            stacked = self.upper(below, lambda: self.student(images)[-1].cells, masks.stacked)
            rows = [(weight, *(x.flatten(1, 3).unsqueeze(1) for x in pair)) for weight, *pair in stacked]
            levels += [self.gather(LevelOutput(f"stacked{i}", *row)) for i, row in enumerate(rows, start=1)]
        return levels

    def features(self, stages: list[Stage], num_views: int) -> list[Float[Tensor, "b v _"]]:
        """Pool and project the stages of the student for every regularized level.

        In training, B counts the images of all processes.

        Args:
            stages: Stages at `self.layers` for B*V views.
            num_views: Number V of views per image.
        """
        projected = {}
        for layer, stage in zip(self.layers, stages, strict=True):
            if layer in self.regularized_layers:
                own = self.projectors[str(layer)](self.student.pool_tokens(stage))
                projected[layer] = all_gather_with_grad(own) if self.training else own
        return [projected[layer].unflatten(0, (-1, num_views)) for layer in self.regularized_layers]

    def blocks(self) -> list[nn.Module]:
        """Return the repeated modules of all networks, which are compiled, sharded and recomputed one by one."""
        return [block for module in self.modules() if module is not self for block in getattr(module, "blocks", ())]

    def parameter_counts(self) -> dict[str, int]:
        """Return the numbers of parameters: total, trainable, and of every child module."""
        counts = {name: n for name, child in self.named_children() if (n := sum(p.numel() for p in child.parameters()))}
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return {"total": sum(counts.values()), "trainable": trainable, **counts}
