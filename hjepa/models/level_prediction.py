"""The outputs of the levels: predictions from the contexts of the student, and targets from the teacher."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hjepa.distributed.process_group import all_gather, all_gather_with_grad
from hjepa.masking import Masks
from hjepa.models.encoder import Encoder, Stage
from hjepa.models.heads import normalize_targets, project
from hjepa.models.layers import gather_tokens
from hjepa.models.levels import Level, cell_centers
from hjepa.models.output import LevelOutput
from hjepa.models.predictor import Context, Fusion, MatchingPredictor, Predictor
from hjepa.models.views import Queries, match_levels, target_views


class LevelPrediction(nn.Module):
    """The part of `HJEPA` that predicts the targets of its levels.

    Attributes:
        student: The encoder of the contexts.
        teacher: The encoder of the targets, which may be the student itself.
        grid: Side of the grid of patches of an image of the encoder's own size.
        layers: Layers of the encoder of which the student returns the stages.
        levels: The levels.
        fusion: Combines the stages into the tokens of a context.
        predictor: Predicts the levels without `match`; None if there are none.
        matching: Predicts the levels with `match`; None if there are none.
        student_heads: Projectors of predictions by level.
        teacher_heads: Projectors of targets by level.
        summary_weight: Factor of the loss of the summary pass.
        compares_images: Whether a prediction loss compares predictions with the targets of other images.
    """

    student: Encoder
    teacher: Encoder
    grid: int
    layers: list[int]
    levels: list[Level]
    fusion: Fusion
    predictor: Predictor | None
    matching: MatchingPredictor | None
    student_heads: nn.ModuleDict
    teacher_heads: nn.ModuleDict
    summary_weight: float
    compares_images: bool

    @property
    def teacher_is_student(self) -> bool:
        """True if the student is its own teacher."""
        return self.teacher is self.student

    def sees_all(self, masks: Masks) -> bool:
        """Return True if the masks hide nothing."""
        return masks.context.shape[1:] == (1, self.grid**2)

    def predict_masked(self, masks: Masks, stages: list[Stage], teacher_stages: Mapping[int, Stage]) -> dict[str, LevelOutput]:
        """Predict the cells that are hidden from the contexts in their own views.

        Args:
            masks: Masks of the global crops.
            stages: Stages of the student at `self.layers` for all contexts.
            teacher_stages: Stages of the teacher by layer.

        Returns:
            The outputs by level; with the summary pass, also that of "summary".
        """
        context, queries, targets, sampled = self.masked_context(stages, masks), [], [], iter(masks.targets)
        for level in self.levels:
            if not level.other:
                index = level.target_cells(next(sampled))
                queries.append(Queries(level, cell_centers(level.grid, index.device)[index]))
                cells = gather_tokens(level.cells(teacher_stages[level.layer]), index)
                targets.append(self.to_targets(level, cells.flatten(1, 3).unsqueeze(1)))
        outputs = {}
        for query, prediction, target in zip(queries, self.answer(context, queries), targets, strict=True):
            outputs[query.level.name] = self.compare(query.level, prediction.flatten(1, 3).unsqueeze(1), target)
        if self.summary_weight:
            context = Context(context.tokens[:, : self.student.num_summary_tokens], None, self.grid)
            prediction = self.answer(context, queries[:1])[0].flatten(1, 3).unsqueeze(1)
            first = self.compare(self.levels[0], prediction, targets[0])
            outputs["summary"] = replace(first, name="summary", weight=self.summary_weight)
        return outputs

    def answer(self, context: Context, queries: list[Queries]) -> list[Float[Tensor, "b c p t _"]]:
        """Return the predictions of all queries, each by the predictor of its level, after the projector of levels with one."""
        answers: dict[str, Tensor] = {}
        if self.matching is not None and (own := [query for query in queries if query.level.match]):
            answers |= zip((query.level.name for query in own), self.matching(context, own), strict=True)
        if self.predictor is not None and (own := [query for query in queries if not query.level.match]):
            for query, prediction in zip(own, self.predictor(context, own), strict=True):
                answers[query.level.name] = self.project_queries(query.level, prediction)
        return [answers[query.level.name] for query in queries]

    def project_queries(self, level: Level, prediction: Float[Tensor, "b c p t _"]) -> Float[Tensor, "b c p t _"]:
        """Apply the projector of a level, if it has one, to predictions."""
        if not level.project:
            return prediction
        return project(self.student_heads[level.name], prediction.flatten(1, 3)).unflatten(1, prediction.shape[1:4])

    def predict_other_views(
        self,
        masks: Masks,
        stages: list[Stage],
        local_stages: list[Stage],
        teacher_stages: Mapping[int, Stage],
        boxes: Float[Tensor, "b n 2 3"],
        num_crops: int,
    ) -> dict[str, LevelOutput]:
        """Predict the cells of the other global crops of an image from each of its global and local crops.

        Args:
            masks: Masks of the global crops.
            stages: Stages of the student at `self.layers` for all contexts of the global crops.
            local_stages: The same for the local crops; empty if there are none.
            teacher_stages: Stages of the teacher by layer, for all global crops.
            boxes: See `forward`.
            num_crops: Number V of global crops per image.

        Returns:
            The outputs by level.
        """
        global_boxes, local_boxes = boxes[:, :num_crops], boxes[:, num_crops:]
        grid, num_contexts, complete = stages[-1].grid, masks.context.shape[1], self.sees_all(masks)
        matched = self.matched_cells([own for own in (stages, local_stages) if own], len(boxes)) if complete else [{}]
        contexts = []
        if num_crops > 1:
            context = self.whole_context(stages, matched[0]) if complete else self.masked_context(stages, masks)
            views = target_views(num_crops, num_contexts, False, boxes.device)
            contexts.append((context, global_boxes.repeat_interleave(num_contexts, dim=1), views))
        if local_stages:
            views = target_views(num_crops, local_boxes.shape[1], True, boxes.device)
            contexts.append((self.whole_context(local_stages, matched[-1]), local_boxes, views))
        parts: dict[str, list[list[Tensor]]] = {level.name: [] for level in self.levels}
        for context, own_boxes, views in contexts:
            matches = match_levels(self.levels, own_boxes, global_boxes, views, (context.grid, grid, self.grid))
            predictions = self.answer(context, [match.queries for match in matches])
            for match, prediction in zip(matches, predictions, strict=True):
                rows = [match.by_target_view(x) for x in (prediction, match.cell, match.inside)]
                parts[match.queries.level.name].append(rows)
        outputs = {}
        for level in self.levels:
            if parts[level.name]:
                prediction, index, valid = (torch.cat(values, dim=2) for values in zip(*parts[level.name], strict=True))
                if self.reads_targets(level):
                    targets = matched[0][level.name]
                else:
                    cells = level.cells(teacher_stages[level.layer])
                    targets = self.to_targets(level, cells.unflatten(0, (-1, num_crops)))
                outputs[level.name] = self.compare(level, prediction, targets, index, valid)
        return outputs

    def masked_context(self, stages: list[Stage], masks: Masks) -> Context:
        """Build the `Context` of masked views."""
        tokens = self.fusion(stages)
        return Context(tokens, cell_centers(self.grid, tokens.device)[masks.context.flatten(0, 1)], self.grid)

    def whole_context(self, stages: list[Stage], matched: dict[str, Tensor]) -> Context:
        """Build the `Context` of complete views of any size, with their `matched_cells`."""
        tokens, grid = self.fusion(stages), stages[-1].grid
        places = cell_centers(grid, tokens.device).expand(len(tokens), -1, -1)
        return Context(tokens, places, grid, matched)

    def matched_cells(self, contexts: list[list[Stage]], num_images: int) -> list[dict[str, Float[Tensor, "b c n _"]]]:
        """Return the cells by level that `MatchingPredictor` reads, after its MLP and the projector of levels with one.

        Args:
            contexts: Stages at `self.layers` over complete views, one list for every size of views.
            num_images: Number B of images.
        """
        result: list[dict[str, Tensor]] = [{} for _ in contexts]
        for level in self.levels:
            if level.match and self.matching is not None:
                maps = [level.cells(self.by_layer(stages)[level.layer]).unflatten(0, (num_images, -1)) for stages in contexts]
                cells = self.matching.map(level, torch.cat([own.flatten(1, 2) for own in maps], dim=1))
                if level.project:
                    cells = project(self.student_heads[level.name], cells)
                parts = cells.split([own.shape[1] * own.shape[2] for own in maps], dim=1)
                for matched, own, part in zip(result, maps, parts, strict=True):
                    matched[level.name] = part.unflatten(1, own.shape[1:3])
        return result

    def reads_targets(self, level: Level) -> bool:
        """Return whether the targets of a level are the tensors that `MatchingPredictor` interpolates."""
        return level.match and level.project and self.teacher_is_student and self.matching is not None and not self.matching.depth

    def by_layer(self, stages: list[Stage]) -> dict[int, Stage]:
        """Return the stages at `self.layers` by layer."""
        return dict(zip(self.layers, stages, strict=True))

    def to_targets(self, level: Level, cells: Float[Tensor, "b g k _"]) -> Float[Tensor, "b g k _"]:
        """Bring the teacher's cells into the space in which a level is compared: after its projector, or normalized."""
        if not level.project:
            return normalize_targets(cells)
        return project(self.teacher_heads[level.name], cells.flatten(1, 2)).unflatten(1, cells.shape[1:3])

    def compare(
        self,
        level: Level,
        prediction: Float[Tensor, "b g q _"],
        cells: Float[Tensor, "b g k _"],
        index: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> LevelOutput:
        """Return the output of a level from its predictions and its target cells, both in the space of `to_targets`."""
        return self.gather(LevelOutput(level.name, level.weight, prediction, cells, index, valid))

    def gather(self, output: LevelOutput) -> LevelOutput:
        """In training, add the images of all processes to the output of a level if its loss is not a mean over images.

        This is the case if a loss compares images, or if the number of valid targets differs between processes.
        """
        if not self.training or (output.valid is None and not self.compares_images):
            return output
        prediction, cells = all_gather_with_grad(output.prediction), all_gather_with_grad(output.cells)
        index, valid = (None if x is None else all_gather(x) for x in (output.index, output.valid))
        return replace(output, prediction=prediction, cells=cells, index=index, valid=valid)
