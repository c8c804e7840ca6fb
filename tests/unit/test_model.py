"""ViT encoder, predictor and H-JEPA: equality with full attention, with timm, and with I-JEPA written out."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from hjepa.config.errors import UserError
from hjepa.masking import PartitionMasking
from hjepa.models.encoder import Stage
from hjepa.models.layers import CrossBlock, LeanMlp, grid_centers, patchify, sincos_positions
from hjepa.models.levels import cell_centers
from hjepa.models.predictor import Context, Fusion
from hjepa.models.views import Queries
from hjepa.models.vit import ViTEncoder
from tests.helpers.runs import VIEWS, build_components


def small_encoder(**options) -> ViTEncoder:
    torch.manual_seed(0)
    return ViTEncoder(**({"image_size": 32, "patch_size": 4, "dim": 32, "depth": 3, "heads": 2} | options)).eval()


@pytest.mark.parametrize("num_summary_tokens", [0, 3])
def test_dropping_tokens_equals_full_attention_with_masked_keys(num_summary_tokens: int) -> None:
    encoder = small_encoder(num_summary_tokens=num_summary_tokens)
    images = torch.randn(2, 3, 32, 32)
    keep = torch.stack([torch.randperm(64)[:20].sort().values for _ in range(4)]).view(2, 2, 20)
    dropped = encoder(images, keep=keep)[-1].tokens.view(2, 2, num_summary_tokens + 20, 32)
    for context in range(2):
        visible = torch.zeros(2, num_summary_tokens + 64, dtype=torch.bool)
        visible[:, :num_summary_tokens] = True
        visible.scatter_(1, keep[:, context] + num_summary_tokens, True)
        x = encoder.embed(images, None)
        for block in encoder.blocks:
            x = block(x, attn_mask=visible[:, None, None, :])
        full = encoder.norm(x)
        index = torch.cat([torch.arange(num_summary_tokens).expand(2, -1), keep[:, context] + num_summary_tokens], dim=1)
        expected = full.gather(1, index.unsqueeze(-1).expand(-1, -1, 32))
        assert torch.allclose(dropped[:, context], expected, atol=1e-5)


def test_dropped_patches_are_never_computed() -> None:
    encoder, images = small_encoder(), torch.randn(2, 3, 32, 32)

    def flops(keep: torch.Tensor | None) -> int:
        with FlopCounterMode(display=False) as counter:
            encoder(images, keep=keep)
        return counter.get_total_flops()

    assert flops(torch.arange(16).expand(2, 1, 16)) <= flops(None) / 4


@pytest.mark.parametrize("options", [{}, {"num_summary_tokens": 4}, {"layer_scale": 0.1, "positions": "learned"}])
def test_state_dict_and_features_are_timms(options: dict) -> None:
    encoder, images = small_encoder(**options), torch.randn(2, 3, 32, 32)
    other = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=4,
        embed_dim=32,
        depth=3,
        num_heads=2,
        class_token=False,
        reg_tokens=options.get("num_summary_tokens", 0),
        init_values=options.get("layer_scale"),
        no_embed_class=True,
        global_pool="avg",
        fc_norm=False,
        num_classes=0,
    ).eval()
    other.load_state_dict(encoder.state_dict())
    assert torch.allclose(other.forward_features(images), encoder(images)[-1].tokens, atol=1e-5)


def test_stages_are_hidden_states_of_the_layers() -> None:
    encoder, images = small_encoder(), torch.randn(2, 3, 32, 32)
    middle, last = encoder(images, layers=[1, 3])
    assert torch.equal(middle.tokens, encoder.blocks[0](encoder.embed(images, None)))
    assert torch.equal(last.tokens, encoder(images)[-1].tokens)


def test_patchify_matches_the_convolution() -> None:
    encoder, images = small_encoder(), torch.randn(2, 3, 32, 32)
    projection = encoder.patch_embed.proj
    ours = F.linear(patchify(images, 4), projection.weight.flatten(1), projection.bias)
    assert torch.allclose(ours, encoder.patch_embed(images), atol=1e-5)


# -- the convolutional stem --------------------------------------------------------------------------------------------


def test_the_convolutional_stem_does_not_see_dropped_patches() -> None:
    encoder, images = small_encoder(stem="conv"), torch.randn(2, 3, 32, 32)
    keep = torch.stack([torch.randperm(64)[:20] for _ in range(4)]).view(2, 2, 20)
    before = encoder(images, keep=keep)[-1].tokens.view(2, 2, 20, 32)
    dropped = torch.ones(64).scatter(0, keep[0, 1], 0).view(1, 8, 8)  # patches that image 0 drops in context 1
    pixels = dropped.repeat_interleave(4, 1).repeat_interleave(4, 2)
    after = encoder(images + 10 * torch.randn(2, 3, 32, 32) * pixels, keep=keep)[-1].tokens.view(2, 2, 20, 32)
    assert torch.equal(before[0, 1], after[0, 1])
    assert not torch.allclose(before[0, 0], after[0, 0], atol=0.1)


def test_the_convolutional_stem_with_all_patches_kept_equals_the_one_without_a_mask() -> None:
    encoder, images = small_encoder(stem="conv", num_summary_tokens=2), torch.randn(3, 3, 32, 32)
    everything = torch.arange(64).expand(3, 1, 64)
    assert torch.allclose(encoder(images, keep=everything)[-1].tokens, encoder(images)[-1].tokens, atol=1e-5)
    assert encoder(images[:, :, :16, :16])[-1].tokens.shape == (3, 2 + 16, 32), "smaller crops are encoded, too"


def test_a_convolutional_stem_needs_a_patch_size_that_is_a_power_of_two() -> None:
    with pytest.raises(UserError, match=r"model\.patch_size=6 must be a power of two"):
        small_encoder(stem="conv", image_size=36, patch_size=6)


@pytest.mark.parametrize("option", ["flat", "pyramid", "summary"])
def test_teacher_equals_student_at_start_bit_for_bit(option: str) -> None:
    model = build_components(f"levels={option}").model
    student, teacher = model.student.state_dict(), model.teacher.state_dict()
    assert student.keys() == teacher.keys()
    assert all(torch.equal(student[k], teacher[k]) for k in student)


def test_blocks_of_all_networks_are_listed_once() -> None:
    model = build_components("levels=stacked", "model.encoder.depth=3").model
    assert len(model.blocks()) == len(set(model.blocks())) == 2 * 3 + 1 + 2 * 2 + 2, "encoders, predictor, stacked level"


@pytest.mark.parametrize("joint", ["false", "true"])
def test_flat_is_ijepa_written_out(joint: str) -> None:
    """The loss of Assran et al. 2023, section 3: mean over target blocks of the distance to the patches of the EMA encoder.

    With one target block, the joint pass has the same objective.
    """
    parts = build_components(
        "levels=flat",
        "masking=multiblock",
        "regularizer=none",
        "model.predictor.attention=self",
        f"model.predictor.joint={joint}",
        f"masking.blocks={4 if joint == 'false' else 1}",
    )
    model = parts.model.eval()
    images, masks = torch.randn(3, 3, 32, 32), parts.sampler(3, torch.Generator().manual_seed(0))
    loss, _ = parts.objective(model(images, masks))

    def encode(vit, pixels, keep):
        x = vit.patch_embed(pixels) + vit.pos_embed
        x = x if keep is None else torch.stack([x[i, keep[i]] for i in range(len(x))])
        return vit.norm(vit.blocks(x))

    with torch.no_grad():
        encoded = F.layer_norm(encode(model.teacher, images, None), (32,))
    context = encode(model.student, images, masks.context[:, 0])
    p, positions = model.predictor, sincos_positions(grid_centers(8), 32)
    terms = []
    for block in range(masks.targets[0].shape[2]):
        index = masks.targets[0][:, 0, block]
        visible = p.embed(context) + positions[masks.context[:, 0]]
        queries = p.mask_tokens[0] + positions[index]
        x = torch.cat([visible, queries], dim=1)
        for layer in p.blocks:
            x = layer(x)
        answer = p.norm(x)[:, visible.shape[1] :]
        target = torch.stack([encoded[i, index[i]] for i in range(len(index))])
        terms.append(F.smooth_l1_loss(p.heads[0](answer), target))
    assert torch.allclose(loss, torch.stack(terms).mean(), atol=1e-6)


def test_cross_attention_answers_each_query_from_the_context_alone() -> None:
    parts = build_components("levels=pyramid", "model.predictor.attention=cross", "masking=multiblock")
    model, images = parts.model.eval(), torch.randn(2, 3, 32, 32)
    masks = parts.sampler(2, torch.Generator().manual_seed(0))
    tokens = model.student(images, keep=masks.context)[-1].tokens
    context = Context(tokens, cell_centers(8)[masks.context[:, 0]], 8)
    queries = [Queries(level, cell_centers(level.grid)[index]) for level, index in zip(model.levels, masks.targets, strict=True)]
    together = model.predictor(context, queries)
    alone = model.predictor(context, [query._replace(places=query.places[:, :, :1, :1]) for query in queries])
    assert all(torch.allclose(a, b[:, :, :1, :1], atol=1e-5) for a, b in zip(alone, together, strict=True))
    other = model.predictor(context._replace(tokens=tokens + 0.1), queries)
    assert not torch.allclose(together[0], other[0], atol=1e-3)


def test_cross_block_is_attention_written_out() -> None:
    torch.manual_seed(0)
    block, queries, context = CrossBlock(8, 2), torch.randn(3, 4, 8), torch.randn(3, 5, 8)
    q, (k, v) = block.q(block.norm1(queries)), block.kv(block.norm_context(context)).chunk(2, dim=-1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = (q[..., head] @ k[..., head].mT / 2).softmax(-1)
        heads.append(weights @ v[..., head])
    x = queries + block.proj(torch.cat(heads, dim=-1))
    assert torch.allclose(block(queries, context), x + block.mlp(block.norm2(x)), atol=1e-5)


def test_contexts_in_the_batch_dimension_equal_block_diagonal_attention() -> None:
    """Contexts encoded as a longer batch equal one pass with a block-diagonal attention mask, at a fraction of its cost."""
    encoder, images = small_encoder(), torch.randn(2, 3, 32, 32)
    masks = PartitionMasking(8, [1], num_parts=4)(2, torch.Generator().manual_seed(0))
    reshaped = encoder(images, keep=masks.context)[-1].tokens.unflatten(0, (2, 4)).flatten(1, 2)
    order = masks.context.flatten(1)
    x = encoder.embed(images, order.unsqueeze(1))
    context = torch.arange(64) // 16
    diagonal = context[:, None] == context[None, :]
    for block in encoder.blocks:
        x = block(x, attn_mask=diagonal)
    assert torch.allclose(reshaped, encoder.norm(x), atol=1e-5)


def test_loss_is_on_targets_only() -> None:
    """Changing the output of the teacher at visible patches does not change the loss."""
    parts = build_components("levels=flat")
    model = parts.model.eval()
    images, masks = torch.randn(2, 3, 32, 32), parts.sampler(2, torch.Generator().manual_seed(0))
    before, _ = parts.objective(model(images, masks))
    original = model.teacher.forward

    def disturbed(*args, **kwargs):
        stages = original(*args, **kwargs)
        flags = torch.zeros(2, 64, 1).scatter_(1, masks.context[:, 0].unsqueeze(-1), 1.0)
        return [stage._replace(tokens=stage.tokens + 100 * flags) for stage in stages]

    model.teacher.forward = disturbed
    after, _ = parts.objective(model(images, masks))
    assert torch.equal(before, after)


def test_contexts_share_one_teacher_pass() -> None:
    parts = build_components("masking=block", "masking.contexts=3")
    calls = []
    parts.model.teacher.register_forward_hook(lambda *args: calls.append(1))
    parts.model(torch.randn(2, 3, 32, 32), parts.sampler(2, torch.Generator().manual_seed(0)))
    assert len(calls) == 1


def test_several_contexts_equal_separate_ones() -> None:
    parts = build_components("masking=block", "masking.contexts=2", "levels=pyramid")
    model, images = parts.model.eval(), torch.randn(2, 3, 32, 32)
    masks = parts.sampler(2, torch.Generator().manual_seed(0))
    together = model(images, masks)
    for context in range(2):
        single = copy.replace(masks) if hasattr(copy, "replace") else masks
        single = type(masks)(masks.context[:, [context]], tuple(t[:, [context]] for t in masks.targets))
        alone = model(images, single)
        for a, b in zip(alone.levels, together.levels, strict=True):
            assert torch.allclose(a.prediction[:, 0], b.prediction[:, 0].unflatten(1, (2, -1))[:, context], atol=1e-5)


@pytest.mark.parametrize(("model", "precision"), [("vit_nano", "float32"), ("vit_nano", "bfloat16"), ("conv_nano", "float32")])
def test_activation_checkpointing_changes_nothing(model: str, precision: str) -> None:
    grads, buffers = [], []
    for switch in ("false", "true"):
        levels = "stacked" if model == "vit_nano" else "flat"
        options = (f"model={model}", f"levels={levels}", "hardware.precision=" + precision)
        options = (*options, f"hardware.activation_checkpointing={switch}")
        parts = build_components(*options)
        assert not any("checkpoint" in name for name in parts.model.state_dict())
        images, masks = (
            torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
            parts.sampler(2, torch.Generator().manual_seed(0)),
        )
        with parts.hardware.autocast():
            loss, _ = parts.objective(parts.model(images, masks))
        loss.backward()
        grads.append([p.grad for p in parts.model.parameters() if p.grad is not None])
        buffers.append([b.double() for b in parts.model.student.buffers()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*buffers, strict=True)), "such as the statistics of batch norms"


def test_lean_mlp_equals_timms_and_saves_less_for_the_backward_pass() -> None:
    torch.manual_seed(0)
    lean, plain = LeanMlp(8, 32), timm.layers.Mlp(8, 32)
    plain.load_state_dict(lean.state_dict())
    x, grads, kept = torch.randn(5, 8), [], []
    for mlp in (lean, plain):
        leaf, sizes = x.clone().requires_grad_(), {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = mlp(leaf)
        out.square().sum().backward()
        grads.append([out, leaf.grad, *(p.grad for p in mlp.parameters())])
        kept.append(sum(sizes.values()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert kept[0] <= kept[1] - 5 * 32, "the output of the activation function is not saved"


def test_fusion_add_starts_as_no_fusion_and_concat_uses_every_layer() -> None:
    g = torch.Generator().manual_seed(0)
    stages = [Stage(torch.randn(2, 5, 8, generator=g), grid=4, num_summary=1) for _ in range(3)]
    assert torch.equal(Fusion("none", [8, 8, 8])(stages), stages[-1].tokens)
    assert torch.equal(Fusion("add", [8, 8, 8])(stages), stages[-1].tokens)
    concat = Fusion("concat", [8, 8, 8])
    before = concat(stages)
    for position in range(3):
        changed = list(stages)
        changed[position] = stages[position]._replace(tokens=torch.randn(2, 5, 8, generator=g))
        assert not torch.allclose(concat(changed), before)


@pytest.mark.parametrize("mode", ["add", "concat"])
def test_fusion_does_not_change_targets(mode: str) -> None:
    model = build_components("levels=depth", f"levels.fusion={mode}").model
    plain = build_components("levels=depth").model
    model.student.load_state_dict(plain.student.state_dict())
    model.teacher.load_state_dict(plain.teacher.state_dict())
    images, masks = torch.randn(2, 3, 32, 32), build_components("levels=depth").sampler(2, torch.Generator().manual_seed(0))
    rows = zip(model(images, masks).levels, plain(images, masks).levels, strict=True)
    assert all(torch.equal(a.target, b.target) for a, b in rows)
    with pytest.raises(UserError, match=f"levels.fusion={mode} needs a level at a layer before the last"):
        build_components("levels=flat", f"levels.fusion={mode}")
    with pytest.raises(UserError, match=f"levels.fusion={mode} has no effect without a level with levels.predictor"):
        build_components(*VIEWS, "dataset.views=2", "levels.stage=[1,-1]", f"levels.fusion={mode}")


def test_positions_are_resampled_for_other_image_sizes() -> None:
    encoder = small_encoder()
    assert encoder(torch.randn(2, 3, 16, 16))[-1].tokens.shape == (2, 16, 32)
    center = encoder.positions(4).view(4, 4, 32)
    own = encoder.positions(8).view(4, 2, 4, 2, 32).mean((1, 3))
    assert F.cosine_similarity(center, own, dim=-1)[1:-1, 1:-1].min() > 0.98, "centers of the crop lie between those of the image"


def test_parameter_counts_add_up() -> None:
    counts = build_components().model.parameter_counts()
    assert counts["total"] == counts["student"] + counts["teacher"] + counts["predictor"]
    assert counts["trainable"] < counts["student"] + counts["predictor"], "sine-cosine positions are not trained"


def test_patch_size_must_divide_the_image_size() -> None:
    with pytest.raises(UserError, match=r"patch_size=5 does not divide .*32"):
        small_encoder(patch_size=5)
