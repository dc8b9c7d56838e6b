"""Models like those of `tiny_whole`, with tokenizers, processors and templates, in folders."""

from pathlib import Path
from typing import Any

import numpy as np
import transformers as hf
from PIL import Image
from tiny_whole import GRIDS, build
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


_TAGS = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
SPECIAL = ("<s>", "</s>", "<pad>", "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *_TAGS)


def tokenizer_of(special=SPECIAL):
    """The letters of ASCII and special tokens; a text begins with `<s>`."""
    letters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]  # the last two: space and newline
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def llava(tower, strategy, tokenizer):
    sizes = {"clip": (CLIPImageProcessorPil, dict(size={"shortest_edge": 18}, crop_size={"height": 18, "width": 18})),
             "siglip": (SiglipImageProcessorPil, dict(size={"height": 18, "width": 18}))}  # fmt: skip
    kind, options = sizes[tower]
    return hf.LlavaProcessor(
        kind(**options), tokenizer, patch_size=4, vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1 if tower == "clip" else 0, chat_template=TEMPLATE,
    )  # fmt: skip


def llava_next(tower, strategy, tokenizer):
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 18}, crop_size={"height": 18, "width": 18}, image_grid_pinpoints=GRIDS
    )
    return hf.LlavaNextProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy=strategy, num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip


def idefics3(split, scale, tokenizer):
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 48}, max_image_size={"longest_edge": 16}, do_image_splitting=split
    )
    return hf.Idefics3Processor(images, tokenizer, image_seq_len=(16 // 4 // scale) ** 2, chat_template=TEMPLATE)


CASES = {
    "llava clip": (llava, ("clip", "default"), dict(family="llava", tower="clip")),
    "llava clip, class token": (llava, ("clip", "full"), dict(
        family="llava", tower="clip", vision_feature_select_strategy="full")),
    "llava siglip": (llava, ("siglip", "full"), dict(family="llava", tower="siglip")),
    "llava_next": (llava_next, ("clip", "default"), dict(family="llava_next", tower="clip")),
    "idefics3": (idefics3, (True, 2), dict(family="idefics3", tower="idefics3")),
    "idefics3, whole images": (idefics3, (False, 1), dict(family="idefics3", tower="idefics3", scale_factor=1)),
}  # fmt: skip


def save(folder: Path, name: str) -> tuple[Any, Any]:
    """Saves one of `CASES` as transformers does; its model and processor."""
    make, arguments, parts = CASES[name]
    tokenizer = tokenizer_of()
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    model = build(text="llama", image_token_id=image_token, of_text=dict(vocab_size=len(tokenizer)), **parts)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    processor = make(*arguments, tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def pictures(*sizes):
    """Noise of these widths and heights."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]


def asked(question, images=1):
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": question}]}]


