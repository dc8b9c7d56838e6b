"""What the Hugging Face layouts of the vision transformers have in common: config fields and tensor names."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pivotjax.checkpoints.names import Rule, Transform, transposed
from pivotjax.models.settings import Settings
from pivotjax.models.vision.vit import ACTIVATIONS, VisionConfig


def read_config(fields: Mapping[str, Any], where: str, defaults: Mapping[str, Any], **variant: Any) -> VisionConfig:
    """The config of a tower from config.json's fields and, for those that it leaves out, the family's `defaults`.

    `variant` are the fields of `VisionConfig` that the family fixes. InputError for what is not supported.
    """
    given = {name: value for name, value in Settings(fields, where).fields.items() if value is not None}
    settings = Settings({"num_channels": 3, **defaults, **given}, where)
    settings.one_of("num_channels", 3)
    config = VisionConfig(
        image_size=settings.size("image_size"),
        patch_size=settings.size("patch_size"),
        dim=settings.size("hidden_size"),
        num_layers=settings.size("num_hidden_layers"),
        num_heads=settings.size("num_attention_heads"),
        mlp_dim=settings.size("intermediate_size"),
        activation=settings.one_of("hidden_act", *ACTIVATIONS),
        norm_eps=settings.number("layer_norm_eps"),
        **variant,
    )
    if config.dim % config.num_heads:
        raise settings.unsupported("num_attention_heads", f"it must divide hidden_size {config.dim}")
    if not config.num_patches:
        raise settings.unsupported("image_size", f"it must be patch_size {config.patch_size} or more")
    return config


# torch's `[out, in, height, width]` and Flax's `[height, width, in, out]`.
_convolution = Transform(
    lambda weight: np.ascontiguousarray(weight.transpose(2, 3, 1, 0)),
    lambda kernel: np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)),
)


def _linear_patches(patch: int) -> Transform:
    """A linear layer over a patch's `[height, width, colour]`, as the kernel of the convolution that it is."""
    return Transform(
        lambda weight: np.ascontiguousarray(weight.T).reshape(patch, patch, 3, -1),
        lambda kernel: np.ascontiguousarray(kernel.reshape(patch * patch * 3, -1).T),
    )


def rules(config: VisionConfig, stem: str) -> tuple[Rule, ...]:
    """The names of a tower's tensors, each after `stem` (`vision_model.`)."""
    layer = f"{stem}encoder.layers.{{layer}}."
    patches = _linear_patches(config.patch_size) if config.positions == "interpolated" else _convolution
    found = [
        Rule("patch_kernel", (f"{stem}embeddings.patch_embedding.weight",), patches),
        Rule("positions", (f"{stem}embeddings.position_embedding.weight",)),
        *_norm("layers/{layer}/norm1", f"{layer}layer_norm1"),
        *_linear("layers/{layer}/q", f"{layer}self_attn.q_proj"),
        *_linear("layers/{layer}/k", f"{layer}self_attn.k_proj"),
        *_linear("layers/{layer}/v", f"{layer}self_attn.v_proj"),
        *_linear("layers/{layer}/o", f"{layer}self_attn.out_proj"),
        *_norm("layers/{layer}/norm2", f"{layer}layer_norm2"),
        *_linear("layers/{layer}/fc1", f"{layer}mlp.fc1"),
        *_linear("layers/{layer}/fc2", f"{layer}mlp.fc2"),
        *_norm("final_norm", f"{stem}post_layernorm"),
    ]
    if config.patch_bias:
        found.append(Rule("patch_bias", (f"{stem}embeddings.patch_embedding.bias",)))
    if config.has_class_token:
        found.append(Rule("class_token", (f"{stem}embeddings.class_embedding",)))
    if config.pre_norm:
        found += _norm("pre_norm", f"{stem}pre_layrnorm")  # spelt so
    if config.pooling_head:
        head = f"{stem}head."
        found += [
            Rule("head/probe", (f"{head}probe",)),
            Rule("head/in_proj/kernel", (f"{head}attention.in_proj_weight",), transposed),
            Rule("head/in_proj/bias", (f"{head}attention.in_proj_bias",)),
            *_linear("head/out_proj", f"{head}attention.out_proj"),
            *_norm("head/norm", f"{head}layernorm"),
            *_linear("head/fc1", f"{head}mlp.fc1"),
            *_linear("head/fc2", f"{head}mlp.fc2"),
        ]
    return tuple(found)


def _linear(path: str, key: str) -> list[Rule]:
    return [Rule(f"{path}/kernel", (f"{key}.weight",), transposed), Rule(f"{path}/bias", (f"{key}.bias",))]


def _norm(path: str, key: str) -> list[Rule]:
    return [Rule(f"{path}/scale", (f"{key}.weight",)), Rule(f"{path}/bias", (f"{key}.bias",))]
