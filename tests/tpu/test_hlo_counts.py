"""FLOPs, collectives and memory traffic read from HLO, against sums done by hand; programs compiled on the CPU, or
written down as TPU's compiler prints them."""

# ruff: noqa: E501

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pivotjax.models import vision
from pivotjax.models.abstract import abstract
from pivotjax.models.language import DecoderConfig
from pivotjax.models.processors import Normalisation
from pivotjax.models.vision import VisionConfig, efficientnet_lite
from pivotjax.tpu import collectives, flops, hlo, traffic

LAYERS, ROWS, DIM, WIDE = 5, 16, 8, 32
FORWARD = 2 * 2 * ROWS * DIM * WIDE  # of one layer: two products


def layer(x, weights):
    return x + jnp.tanh(x @ weights[0]) @ weights[1], None


def program(function, *shapes):
    arguments = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes,
                             is_leaf=lambda s: isinstance(s, tuple) and isinstance(s[0], int))  # fmt: skip
    return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text()), arguments


WEIGHTS = ((LAYERS, DIM, WIDE), (LAYERS, WIDE, DIM))


def test_products_in_a_loop_count_as_often_as_it_runs():
    def scanned(x, weights):
        return jax.lax.scan(layer, x, weights)[0]

    found, arguments = program(scanned, (ROWS, DIM), WEIGHTS)
    assert flops.executed(found) == (LAYERS * FORWARD, 0, 0)
    assert not found.unknown_loops
    assert flops.asked(jax.make_jaxpr(scanned)(*arguments)) == LAYERS * FORWARD


def test_a_loop_in_a_loop():
    def twice(x, weights):
        return jax.lax.scan(lambda x, _: (jax.lax.scan(layer, x, weights)[0], None), x, None, length=3)[0]

    found, _ = program(twice, (ROWS, DIM), WEIGHTS)
    assert flops.executed(found).total == 3 * LAYERS * FORWARD and not found.unknown_loops


def test_trip_counts_from_conditions_alone():
    """As on TPU, where loops carry no `known_trip_count`."""

    def twice(x, weights):
        return jax.lax.scan(lambda x, _: (jax.lax.scan(layer, x, weights)[0], None), x, None, length=3)[0]

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((ROWS, DIM), *WEIGHTS)]
    text = jax.jit(lambda x, a, b: twice(x, (a, b))).lower(*shapes).compile().as_text()
    assert "known_trip_count" in text
    found = hlo.parse(text.replace("known_trip_count", "not_known"))
    assert flops.executed(found).total == 3 * LAYERS * FORWARD and not found.unknown_loops


def test_what_checkpointing_computes_again_is_told_apart():
    def loss(x, weights):
        return jax.lax.scan(jax.checkpoint(layer), x, weights)[0].sum()

    found, arguments = program(jax.grad(loss), (ROWS, DIM), WEIGHTS)
    counted = flops.executed(found)
    # Twice forward and back; of the forward products the first is done again, the second's result is not needed.
    assert counted.recomputed == LAYERS * FORWARD / 2
    assert counted.total - counted.recomputed == 2 * LAYERS * FORWARD
    plain = jax.make_jaxpr(jax.grad(lambda x, w: jax.lax.scan(layer, x, w)[0].sum()))(*arguments)
    assert flops.asked(plain) == 2 * LAYERS * FORWARD


@pytest.mark.parametrize("groups", [1, 4])
def test_a_convolution_counts_without_its_padding(groups):
    def convolution(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
                                            feature_group_count=groups)  # fmt: skip

    found, arguments = program(convolution, (2, 8, 6, 4), (3, 3, 4 // groups, 12))
    rows, columns = 3 * 3 + 2, 4 * 3 + 2 * 2  # that the window has of the input, at 4 and at 6 places
    by_hand = 2 * 2 * rows * columns * (4 // groups) * 12
    assert flops.asked(jax.make_jaxpr(convolution)(*arguments)) == by_hand
    assert flops.executed(found).total == by_hand


TPU = """
HloModule jit_f, is_scheduled=true, num_partitions=4

%products (a: bf16[8,4,6], b: bf16[8,6,5]) -> bf16[8,4,5] {
  %a = bf16[8,4,6]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[8,6,5]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %batched = bf16[8,4,5]{2,1,0} convolution(%a, %b), window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf
}

%started (p: bf16[4,6]) -> (bf16[4,6], bf16[8,6], u32[]) {
  %p = bf16[4,6]{1,0} parameter(0)
  %gather.1 = bf16[8,6]{1,0} all-gather(%p), channel_id=5, replica_groups=[2,2]<=[4], dimensions={0}
  ROOT %start = (bf16[4,6]{1,0}, bf16[8,6]{1,0}, u32[]{:S(2)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (q: bf16[4,6], r: bf16[8,6], s: u32[], x: bf16[4,6], y: bf16[6,5]) -> (bf16[4,5], bf16[4,6], bf16[8,6], u32[]) {
  %q = bf16[4,6]{1,0} parameter(0)
  %r = bf16[8,6]{1,0} parameter(1)
  %s = u32[]{:S(2)} parameter(2)
  %x = bf16[4,6]{1,0} parameter(3)
  %y = bf16[6,5]{1,0} parameter(4)
  %product = bf16[4,5]{1,0} convolution(%x, %y), dim_labels=bf_io->bf
  %gather.2 = bf16[8,6]{1,0} all-gather(%q), channel_id=5, replica_groups=[2,2]<=[4], dimensions={0}
  ROOT %all = (bf16[4,5]{1,0}, bf16[4,6]{1,0}, bf16[8,6]{1,0}, u32[]{:S(2)}) tuple(%product, %q, %gather.2, %s)
}

%done (t: bf16[4,6], u: bf16[8,6]) -> bf16[8,6] {
  %t = bf16[4,6]{1,0} parameter(0)
  %u = bf16[8,6]{1,0} parameter(1)
  %gather.3 = bf16[8,6]{1,0} all-gather(%t), channel_id=5, replica_groups=[2,2]<=[4], dimensions={0}
  ROOT %end = bf16[8,6]{1,0} custom-call(%t, %u, %gather.3), custom_call_target="AsyncCollectiveDone"
}

%add (l: f32[], m: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  %m = f32[] parameter(1)
  ROOT %sum = f32[] add(%l, %m)
}

ENTRY %main (one: bf16[4,6], two: bf16[6,5], three: f32[10], four: bf16[8,4,6], five: bf16[8,6,5]) -> f32[10] {
  %one = bf16[4,6]{1,0} parameter(0)
  %two = bf16[6,5]{1,0} parameter(1)
  %three = f32[10]{0} parameter(2)
  %four = bf16[8,4,6]{2,1,0} parameter(3)
  %five = bf16[8,6,5]{2,1,0} parameter(4)
  %async-collective-start = (bf16[4,6]{1,0}, bf16[8,6]{1,0}, u32[]{:S(2)}) fusion(%one), kind=kCustom, calls=%started
  %g0 = bf16[4,6]{1,0} get-tuple-element(%async-collective-start), index=0
  %g1 = bf16[8,6]{1,0} get-tuple-element(%async-collective-start), index=1
  %g2 = u32[]{:S(2)} get-tuple-element(%async-collective-start), index=2
  %beside = (bf16[4,5]{1,0}, bf16[4,6]{1,0}, bf16[8,6]{1,0}, u32[]{:S(2)}) fusion(%g0, %g1, %g2, %one, %two), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (2, {})}, calls=%async_collective_fusion.1
  %h1 = bf16[4,6]{1,0} get-tuple-element(%beside), index=1
  %h2 = bf16[8,6]{1,0} get-tuple-element(%beside), index=2
  %async-collective-done = bf16[8,6]{1,0} fusion(%h1, %h2), kind=kCustom, calls=%done
  %each = bf16[8,4,5]{2,1,0:S(1)} fusion(%four, %five), kind=kOutput, calls=%products
  ROOT %reduced = f32[10]{0} all-reduce(%three), channel_id=6, replica_groups=mesh['data'=2,'fsdp'=2] {'data'}, to_apply=%add
}
"""


def test_products_as_tpu_writes_them():
    """A batched product is a convolution over a dilated window: only the pairs that meet count."""
    assert flops.executed(hlo.parse(TPU)).total == 8 * 2 * 4 * 6 * 5 + 2 * 4 * 6 * 5


def test_collectives_of_a_known_program():
    gathered, reduced = sorted(collectives.find(hlo.parse(TPU), 4), key=lambda one: one.kind)
    assert (gathered.kind, gathered.times, gathered.bytes, gathered.overlapped) == ("all-gather", 1, 8 * 6 * 2, True)
    assert gathered.groups == ((0, 1), (2, 3)) and gathered.sent == 8 * 6 * 2 / 2
    assert (reduced.kind, reduced.times, reduced.bytes, reduced.overlapped) == ("all-reduce", 1, 40, False)
    assert reduced.groups == ((0, 2), (1, 3)) and reduced.sent == 2 * 40 / 2


def test_traffic_leaves_out_what_stays_on_the_chip_or_moves_nothing():
    gather = 4 * 6 * 2 + (4 * 6 + 8 * 6) * 2  # start: as its operand and its results say
    beside = (4 * 6 + 6 * 5 + 4 * 5) * 2  # the product alone: the rest is aliased
    done = (4 * 6 + 2 * 8 * 6) * 2
    each = (8 * 4 * 6 + 8 * 6 * 5) * 2  # the result is in vector memory
    assert traffic.hbm_bytes(hlo.parse(TPU)) == gather + beside + done + each + 2 * 40


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=[1,4]<=[4]", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("", ((0, 1, 2, 3),)),
    ],
)
def test_groups_in_every_way_of_writing_them(written, groups):
    text = "ENTRY %e (p: f32[4]) -> f32[8] {\n  %p = f32[4]{0} parameter(0)\n" \
           f"  ROOT %g = f32[8]{{0}} all-gather(%p), channel_id=1, {written}\n}}\n"  # fmt: skip
    assert collectives.find(hlo.parse(text), 4)[0].groups == groups


def test_the_minimum_of_a_small_decoder_by_hand():
    decoder = DecoderConfig(vocab_size=50, dim=8, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=2, mlp_dim=16)
    w0 = {"linear_0": {"kernel": jax.ShapeDtypeStruct((6, 8), jnp.float32)},
          "linear_1": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}}  # fmt: skip
    work = flops.Work(experts=2, samples=5, images=1, visual=4, length=10, targets=6, online=True)
    found = flops.minimum(work, decoder, w0, image=7.0)
    entries = 3 * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 16)
    assert flops.decoder_entries(decoder) == entries
    assert found.decoder == 4 * entries * 2 * 5 * 10
    assert found.attention == 3 * 3 * (2 * 2 * 8 * 10 / 2) * 2 * 5 * 10
    assert found.head == 4 * 8 * 50 * 2 * 5 * 6
    assert found.projector == (6 * (48 + 64) - 2 * 48) * 2 * 5 * 4
    assert found.vision == 7 * 2 * 5
    assert found.total == np.sum(found)


def test_an_image_through_a_small_vision_transformer_by_hand():
    config = VisionConfig(image_size=8, patch_size=4, dim=6, num_layers=4, num_heads=2, mlp_dim=12, activation="gelu",
                          norm_eps=1e-5, has_class_token=True)  # fmt: skip
    tower = vision.abstract(vision.FAMILIES["clip_vision_model"], config)
    chosen, plain = vision.Features(select_layer=-2), Normalisation(1 / 255, (0.0,) * 3, (1.0,) * 3)
    layers = 3 * 5 * (2 * (4 * 36 + 2 * 72) + 2 * 2 * 5 * 6)  # three of the four run, on 2 x 2 patches and the class
    assert flops.of_image(*tower, chosen, plain, 8) == 2 * 4 * 48 * 6 + layers


def test_an_image_through_an_encoder_that_is_no_transformer():
    """EfficientNet-Lite0: its matrix products and its first convolution; depthwise convolutions are sums of shifted maps
    here, no products, and pooling is small."""
    sizes = efficientnet_lite.LITE0
    tower = abstract(lambda: efficientnet_lite.EfficientNetLite(sizes, rngs=nnx.Rngs(0)))
    side, channels, products = 112, 32, 112**2 * 3 * 3 * 3 * 32
    for stage in sizes.stages:
        for repeat in range(stage.repeats):
            expanded = channels * stage.expand
            products += side**2 * channels * expanded * (stage.expand > 1)
            side //= stage.stride if repeat == 0 else 1
            products += side**2 * expanded * stage.channels
            channels = stage.channels
    products += side**2 * channels * 1280
    assert flops.of_image(*tower, vision.Features(), None, 224) == pytest.approx(2 * products, rel=0.003)
