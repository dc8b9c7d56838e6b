"""FLOPs of a training step: what the optimised program executes, what the traced program asks for, what is the least.

A multiplication and an addition are two; only matrix products and convolutions count, as everywhere in the field.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from pivotjax.models import projector, vision
from pivotjax.models.language import DecoderConfig
from pivotjax.models.processors import Normalisation
from pivotjax.models.vision import Features, VisionConfig, VisionTransformer
from pivotjax.tpu.hlo import Computation, Instruction, Program

# How JAX names what a checkpointed function computes again in the backward pass, and XLA what it computes again itself.
_RECOMPUTED, _XLA_RECOMPUTED = "rematted_computation", ".remat"


class Executed(NamedTuple):
    """FLOPs of one device in one step.

    Fields:
        total: all of them.
        recomputed: those among them that activation checkpointing does a second time.
        kernels: custom kernels that are not counted (their HLO does not say what they do).
    """

    total: float
    recomputed: float
    kernels: int


def executed(program: Program) -> Executed:
    """Of the optimised HLO: every product in every computation, times how often that runs."""
    total = recomputed = 0.0
    kernels = 0
    for name, times in program.runs.items():
        computation = program.computations[name]
        for instruction in computation.instructions.values():
            count = times * of_instruction(computation, instruction)
            total += count
            if _RECOMPUTED in instruction.op_name or _XLA_RECOMPUTED in instruction.name:
                recomputed += count
            kernels += instruction.opcode == "custom-call" and '"tpu_custom_call"' in instruction.attributes
    return Executed(total, recomputed, kernels)


def of_instruction(computation: Computation, instruction: Instruction) -> int:
    """Of one `dot` or `convolution` (which is what TPU's compiler makes of every product); others have none."""
    if instruction.opcode == "dot":
        left = computation.instructions[instruction.operands[0]].arrays[0]
        contracted = np.prod([left.dims[d] for d in instruction.numbers("lhs_contracting_dims")], dtype=np.int64)
        return 2 * instruction.arrays[0].size * int(contracted)
    return _convolution(computation, instruction) if instruction.opcode == "convolution" else 0


def _convolution(computation: Computation, instruction: Instruction) -> int:
    left, right = (computation.instructions[name].arrays[0].dims for name in instruction.operands[:2])
    out = instruction.arrays[0].dims
    lhs, rest = instruction.attribute("dim_labels").split("_")
    rhs, result = rest.split("->")
    window = _window(instruction, sum(label.isdigit() for label in lhs))
    pairs = 1
    for number, sizes in enumerate(window):
        pairs *= _meeting(left[lhs.index(str(number))], out[result.index(str(number))], *sizes)
    groups = int(instruction.attribute("batch_group_count") or 1)
    return 2 * pairs * (left[lhs.index("b")] // groups) * right[rhs.index("i")] * right[rhs.index("o")]


def _meeting(given: int, made: int, size: int, stride: int, low: int, base: int, dilation: int) -> int:
    """Pairs of an output and an input of one dimension that meet in a convolution: padding and the gaps of dilation are
    left out, as in HloCostAnalysis."""
    starts = np.arange(made)[:, None] * stride + np.arange(size)[None] * dilation - low
    return int(((starts >= 0) & (starts <= (given - 1) * base) & (starts % base == 0)).sum())


def _window(instruction: Instruction, dims: int) -> list[tuple[int, int, int, int, int]]:
    """Size, stride, padding before, dilation of the input and of the window, for every spatial dimension."""
    text = instruction.attributes.partition("window={")[2].partition("}")[0]
    given = dict(part.split("=") for part in text.split()) if text else {}

    def values(name: str, default: str) -> list[str]:
        return given[name].split("x") if name in given else [default] * dims

    low = [part.split("_")[0] for part in values("pad", "0_0")]
    columns = (values("size", "1"), values("stride", "1"), low, values("lhs_dilate", "1"), values("rhs_dilate", "1"))
    return [tuple(int(value) for value in row) for row in zip(*columns, strict=True)]


def asked(jaxpr: ClosedJaxpr | Jaxpr) -> float:
    """Of a traced program, over all devices: a check of `executed` that knows nothing of the compiler."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    made = np.prod(equation.outvars[0].aval.shape, dtype=float) if equation.outvars else 0.0
    if name == "dot_general":
        left = equation.invars[0].aval.shape
        return 2.0 * made * np.prod([left[d] for d in params["dimension_numbers"][0][0]], dtype=float)
    if name == "conv_general_dilated":
        return _of_convolution(equation)
    if name == "pallas_call":
        return float(params["cost_estimate"].flops) if params.get("cost_estimate") else 0.0
    inner = sum(asked(value) for given in params.values() for value in _jaxprs(given))
    if name == "scan":
        return params["length"] * inner
    return inner * (params["mesh"].size if name == "shard_map" else 1)


def _of_convolution(equation: Any) -> float:
    left, right, out = (array.aval.shape for array in (*equation.invars, *equation.outvars))
    params = equation.params
    lhs, rhs, result = params["dimension_numbers"]  # each: batch or outputs, features, then the spatial dimensions
    strides, low = params["window_strides"], [before for before, _ in params["padding"]]
    window = zip(strides, low, params["lhs_dilation"], params["rhs_dilation"], strict=True)
    pairs = 1
    for number, sizes in enumerate(window, start=2):
        pairs *= _meeting(left[lhs[number]], out[result[number]], right[rhs[number]], *sizes)
    return 2.0 * pairs * (left[lhs[0]] // params["batch_group_count"]) * right[rhs[1]] * right[rhs[0]]


def _jaxprs(given: Any) -> list[Any]:
    values = given if isinstance(given, (tuple, list)) else [given]
    return [value for value in values if isinstance(value, (ClosedJaxpr, Jaxpr))]


class Work(NamedTuple):
    """What a step is given: K experts, B rows each, and what a row is: a sample, or several packed.

    Fields:
        experts, samples: K and B.
        images: images of a row; more than one where samples are packed.
        visual: visual tokens of an image.
        length: tokens of a row, visual ones and padding included (L).
        targets: positions at which the vocabulary is scored (T).
        online: the vision encoder runs inside the step.
    """

    experts: int
    samples: int
    images: int
    visual: int
    length: int
    targets: int
    online: bool


class Minimum(NamedTuple):
    """FLOPs of one step over all devices that no arrangement of it can go below, by part."""

    decoder: float
    attention: float
    head: float
    projector: float
    vision: float

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(self)


def minimum(work: Work, decoder: DecoderConfig, projector_sizes: projector.Params, image: float) -> Minimum:
    """The analytic minimum for a frozen decoder and encoder, of the sequences that the program is given.

    With N the entries of the decoder's matrices (embedding and head left out), M those of the projector's, M_0 of its
    first matrix, H of the head:

    - decoder: 4 N a token: 2 N forward, 2 N for the gradient of the activations; none for frozen weights;
    - attention: 3 x (2 x 2 x d x L / 2) a token and layer: scores and mixing, once forward and twice backward, over the
      earlier half of the sample's own sequence that a causal mask leaves, d = heads x head_dim;
    - head: 4 H a target;
    - projector: 6 M - 2 M_0 a visual token: the features need no gradient;
    - vision: what `of_image` says.

    Padding counts, because the program is given it; `report` says how much that is.

    Args:
        image: FLOPs of encoding one image inside the step (`of_image`); 0 where batches bring features.
    """
    rows = work.experts * work.samples
    tokens, width = rows * work.length, decoder.num_heads * decoder.head_dim
    kernels = [np.prod(layer["kernel"].shape[-2:], dtype=float) for _, layer in sorted(projector_sizes.items())]
    return Minimum(
        decoder=4.0 * decoder_entries(decoder) * tokens,
        attention=6.0 * width * work.length / work.images * tokens * decoder.num_layers,
        head=4.0 * decoder.dim * decoder.vocab_size * rows * work.targets,
        projector=(6 * sum(kernels) - 2 * kernels[0]) * rows * work.images * work.visual,
        vision=image * rows * work.images,
    )


def decoder_entries(config: DecoderConfig) -> int:
    """Entries of the matrices of a decoder's layers: N of `4 N a token`."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = config.dim * (2 * queries + 2 * keys)
    return config.num_layers * (attention + 3 * config.dim * config.mlp_dim)


def of_image(
    graphdef: nnx.GraphDef, params: Any, chosen: Features, normalise: Normalisation | None, size: int
) -> float:
    """Forward FLOPs of one image of `size` x `size` pixels through an encoder, whose weights may be shapes only.

    A vision transformer's by formula: with E the entries of its patch embedding's matrix and of those of the layers
    that run, 2 E a patch, and 4 x dim x tokens a token and layer for attention, which sees all tokens. Any other
    encoder's are those that its traced forward pass asks for.
    """
    tower = nnx.merge(graphdef, params)
    if isinstance(tower, VisionTransformer):
        return _of_transformer(tower.config, vision.depth_of(chosen.select_layer, tower.config.num_layers))
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    return asked(jax.make_jaxpr(vision.visual_features, static_argnums=(0, 1, 2))(
        graphdef, chosen, normalise, params, image))  # fmt: skip


def _of_transformer(config: VisionConfig, layers: int) -> float:
    tokens = config.num_patches + config.has_class_token
    matrices = 4 * config.dim**2 + 2 * config.dim * config.mlp_dim
    patches = 2.0 * config.num_patches * 3 * config.patch_size**2 * config.dim
    return patches + layers * tokens * (2.0 * matrices + 4.0 * config.dim * tokens)
