"""HJEPA: the student sees the context, the predictor fills in the targets that the teacher computes from the whole image."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hjepa.distributed.process_group import all_gather_with_grad
from hjepa.masking import Masks
from hjepa.models.levels import Levels
from hjepa.models.predictor import Fusion, Predictor
from hjepa.models.pretrained import load_encoder
from hjepa.models.stacked import StackedLevel
from hjepa.models.vit import ViTEncoder


@dataclass(frozen=True)
class LevelOutput:
    """One level's `prediction` and `target`, both [B, C, P, T, D], with the level's name and loss weight."""

    name: str
    weight: float
    prediction: Tensor
    target: Tensor


@dataclass(frozen=True)
class Output:
    """What an objective sees: every level, and the student's pooled features for the regularizer.

    `features`: per level that the regularizer reads, at the level's depth, [B, V, F] of the V views of each image: all contexts
    of its whole views (there are `whole` of them), then its local crops. F is D, 2D with summary tokens, or the projector's
    width.
    """

    levels: list[LevelOutput]
    features: list[Tensor]
    num_global: int = 1

    def zero(self) -> Tensor:
        """A 0-d zero to sum on, float32 on the output's device."""
        some = self.features[0] if self.features else self.levels[0].target
        return some.new_zeros((), dtype=torch.float32)


class HJEPA(nn.Module):
    """Student, teacher and predictor over a hierarchy of levels.

    Args:
        image_size, patch_size: in pixels.
        encoder, predictor: constructors that lack only what follows from the sizes and the levels.
        projector: constructor of the map from pooled features to those that the regularizer sees, None for none.
        pretrained: weights that student and teacher start from (see `load_encoder`), None for random ones.
        levels: the hierarchy; without any level nothing is predicted, and the regularizer is the whole objective.
        read: how many of the levels, the first ones, the regularizer reads the features of.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        encoder: Callable[..., ViTEncoder],
        predictor: Callable[..., Predictor],
        projector: Callable[..., nn.Module] | None,
        pretrained: str | None,
        levels: Levels,
        num_regularized: int,
    ) -> None:
        super().__init__()
        self.student = encoder(image_size=image_size, patch_size=patch_size, summary_tokens=levels.summary_tokens)
        self.levels, self.grid = levels, self.student.grid
        levels.check_grid(self.grid)
        self.level_layers = levels.block_counts(self.student.depth) or [self.student.depth]
        self.depths = sorted({*self.level_layers, self.student.depth})
        dim = self.student.embed_dim
        self.fusion = Fusion(levels.fusion, dim, len(self.depths))
        self.predictor = predictor(encoder_dim=dim, grid=self.grid, pools=levels.pool) if levels.pool else None
        self.upper: StackedLevel | None = levels.upper(input_dim=dim, grid=self.grid) if levels.upper else None
        width = self.student.feature_dim
        self.regularized_layers = self.level_layers[:num_regularized]
        depths = sorted(set(self.regularized_layers))  # levels of one depth share features and projector
        self.projectors = nn.ModuleDict({str(d): projector(dim=width) if projector else nn.Identity() for d in depths})
        if pretrained:
            load_encoder(self.student, pretrained, "model.pretrained")
        self.teacher = deepcopy(self.student).requires_grad_(False).eval()

    def share_teacher(self) -> None:
        """Let the student be its own teacher: targets follow it at once, and gradients flow through them."""
        self.teacher = self.student
        if self.upper:
            self.upper.share_teacher()

    @property
    def teacher_is_student(self) -> bool:
        """Whether the student is its own teacher."""
        return self.teacher is self.student

    def train(self, mode: bool = True) -> "HJEPA":
        """Training mode for student and predictor; a teacher that is not the student always evaluates."""
        super().train(mode)
        for teacher, student in self.teacher_student_pairs():
            teacher.train(mode and teacher is student)
        return self

    def teacher_student_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Every teacher and its student."""
        return [
            (self.teacher, self.student),
            *((s.teacher, s.student) for s in (self.upper.stacked_levels() if self.upper else [])),
        ]

    def forward(self, images: Tensor, masks: Masks, crops: Tensor | None = None, views: int = 1) -> Output:
        """Predictions beside targets, and the student's features.

        Args:
            images: float [B*V, 3, H, W], the V whole views of each image in a row, on the masks' device.
            masks: for the B*V whole views.
            crops: float [B*L, 3, h, w], the L local crops of each image in a row, which the student alone sees.
            views: V.
        """
        states = self.student(images, keep=masks.context, depths=self.depths)
        levels = self.predict(images, masks, states) if self.predictor else []
        whole = views * masks.context.shape[1]
        features = self.features(states, whole)
        if crops is not None:
            local = self.features(self.student(crops, depths=self.depths), len(crops) * views // len(images))
            features = [torch.cat(pair, dim=1) for pair in zip(features, local, strict=True)]
        return Output(levels, features, whole)

    def teacher_states(self, images: Tensor) -> dict[int, Tensor]:
        """The teacher's hidden states [B, N, D] of all patches, by depth; one pass serves all levels, contexts and blocks."""
        depths = sorted({*self.level_layers, self.student.depth} if self.upper else set(self.level_layers))
        with torch.set_grad_enabled(self.teacher_is_student and torch.is_grad_enabled()):
            states = self.teacher(images, depths=depths)
        return {depth: state[:, self.teacher.summary_tokens :] for depth, state in zip(depths, states, strict=True)}

    def predict(self, images: Tensor, masks: Masks, states: list[Tensor]) -> list[LevelOutput]:
        """Every level's targets beside what the predictor makes of the student's hidden states [B*C, S+K, D]."""
        assert self.predictor is not None
        seen, tokens = self.teacher_states(images), self.fusion(states)
        targets = self.levels.targets(seen, masks.targets, self.grid, self.student.depth)
        predictions = self.predictor(tokens, masks.context, masks.targets)
        rows = zip(self.levels.names(), self.levels.weight, predictions, targets, strict=True)
        outputs = [LevelOutput(*row) for row in rows]
        if self.levels.summary:
            guess = self.predictor(tokens[:, : self.student.summary_tokens], None, masks.targets[:1])[0]
            outputs.append(LevelOutput("summary", self.levels.summary, guess, targets[0]))
        if self.upper:
            stacked = self.upper(
                seen[self.student.depth], lambda: self.student(images)[-1][:, self.student.summary_tokens :], masks.stacked
            )
            outputs += [LevelOutput(f"stacked{i}", *level) for i, level in enumerate(stacked, start=1)]
        return outputs

    def features(self, states: list[Tensor], views: int) -> list[Tensor]:
        """Per level that is read the projected, pooled hidden states [B, V, F] at the level's depth; `views` is V.

        In training B counts the images of all processes: the projector normalizes over the batch.
        """
        projected = {}
        for depth, state in zip(self.depths, states, strict=True):
            if depth in self.regularized_layers:
                pooled = self.student.pooled(state)
                projected[depth] = self.projectors[str(depth)](all_gather_with_grad(pooled) if self.training else pooled)
        return [projected[count].unflatten(0, (-1, views)) for count in self.regularized_layers]

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks of all parts."""
        return [block for part in self.modules() if part is not self for block in getattr(part, "blocks", ())]

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters: total, trainable, and of every part."""
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in self.named_children()}
        counts = {name: count for name, count in counts.items() if count}
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return {"total": sum(counts.values()), "trainable": trainable, **counts}
