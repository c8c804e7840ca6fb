"""HJEPA: the student sees the context, the predictor fills in the targets that the teacher computes from the whole image."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hjepa.encoder import Encoder
from hjepa.levels import Levels
from hjepa.masks import Masks
from hjepa.predictor import Predictor


@dataclass(frozen=True)
class LevelOutput:
    """One level's `prediction` and `target`, both [B, C, P, T, D], with the level's name and loss weight."""

    name: str
    weight: float
    prediction: Tensor
    target: Tensor


@dataclass(frozen=True)
class Output:
    """What an objective sees: every level, and the student's pooled features [B, C, D] (2D with summary tokens)."""

    levels: list[LevelOutput]
    features: Tensor


class HJEPA(nn.Module):
    """Student, teacher and predictor over a hierarchy of levels.

    Args:
        image_size, patch_size: in pixels.
        encoder, predictor: constructors that lack only what follows from the sizes and the levels.
        levels: the hierarchy.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        encoder: Callable[..., Encoder],
        predictor: Callable[..., Predictor],
        levels: Levels,
    ) -> None:
        super().__init__()
        self.student = encoder(image_size=image_size, patch_size=patch_size, summary_tokens=levels.summary_tokens)
        self.levels, self.grid = levels, self.student.grid
        levels.check_grid(self.grid)
        self.depths = sorted(set(levels.block_counts(self.student.depth)))
        self.predictor = predictor(encoder_dim=self.student.embed_dim, grid=self.grid, pools=levels.pool)
        self.teacher = deepcopy(self.student).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "HJEPA":
        """Training mode for student and predictor; the teacher always evaluates."""
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def targets(self, images: Tensor, masks: Masks) -> list[Tensor]:
        """Per level the targets [B, C, P, T_l, D]; one pass over all patches serves all contexts and blocks."""
        states = self.teacher(images, depths=self.depths)
        patches = {depth: state[:, self.teacher.summary_tokens :] for depth, state in zip(self.depths, states, strict=True)}
        return self.levels.targets(patches, masks.targets, self.grid, self.teacher.depth)

    def forward(self, images: Tensor, masks: Masks) -> Output:
        """images float [B, 3, H, W] and masks on the same device -> predictions beside targets."""
        targets = self.targets(images, masks)
        tokens = self.student(images, keep=masks.context)[-1]
        predictions = self.predictor(tokens, masks.context, masks.targets)
        rows = zip(self.levels.names(), self.levels.weight, predictions, targets, strict=True)
        outputs = [LevelOutput(*row) for row in rows]
        if self.levels.summary:
            summary = tokens[:, : self.student.summary_tokens]
            guess = self.predictor(summary, None, masks.targets[:1])[0]
            outputs.append(LevelOutput("summary", self.levels.summary, guess, targets[0]))
        return Output(outputs, self.student.pooled(tokens).unflatten(0, masks.context.shape[:2]))

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters: total, trainable, and of every part."""
        parts = {"student": self.student, "teacher": self.teacher, "predictor": self.predictor}
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return {"total": sum(counts.values()), "trainable": trainable, **counts}
