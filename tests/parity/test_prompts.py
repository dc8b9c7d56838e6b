"""Pictures and conversations as arrays: equal to what the families' processors in transformers make of them."""

import numpy as np
import pytest
import transformers as hf
from PIL import Image
from tiny_whole import build
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from pivotjax.errors import InputError
from pivotjax.models.multimodal import load_model

GRIDS = [[18, 36], [36, 18], [36, 36], [54, 18]]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tokenizer_of():
    """Bytes and special tokens; a text begins with `<s>`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tags = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    around = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    special = ["<s>", "</s>", "<pad>", "<image>", *around, *tags]
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


def pictures(*sizes):
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]


def asked(question, images=1):
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": question}]}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`folders(name)`: a model, its processor, and where they are saved."""
    made = {}

    def of(name):
        if name not in made:
            make, arguments, parts = CASES[name]
            tokenizer, folder = tokenizer_of(), tmp_path_factory.mktemp("prompts")
            model = build(text="llama", image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
                          of_text=dict(vocab_size=len(tokenizer)), **parts)  # fmt: skip
            processor = make(*arguments, tokenizer)
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            made[name] = model, processor, folder
        return made[name]

    return of


def assert_equal(found, expected):
    """Names, shapes and values; pixels within 1/255 before normalisation, whose deviations are 0.26 or more."""
    expected = {"token_ids" if name == "input_ids" else name: np.asarray(value) for name, value in expected.items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert np.abs(found[name] - value).max() <= (1 / 255 / 0.26 if name == "pixel_values" else 0), name


@pytest.mark.parametrize("name", CASES)
def test_prompts_are_those_of_the_processor(folders, name):
    _, processor, folder = folders(name)
    ours = load_model(folder)
    images = pictures((40, 18), (21, 57), (33, 34), (18, 18))
    text = "USER: <image>what?\nASSISTANT:"
    for one in images:
        expected = processor(images=[one], text=text, return_tensors="np")
        assert_equal(ours.prepare([one], text), expected)
        assert_equal(ours.prepare([one], "what?"), expected)  # through the checkpoint's own template
    requests = [asked("what?"), asked("and these two?", 2), asked("so?")]
    shared = [images[:1], images[1:3], images[3:]]
    texts = [processor.apply_chat_template(one, add_generation_prompt=True) for one in requests]
    nested = shared if name.startswith("idefics3") else images
    expected = processor(images=nested, text=texts, padding=True, return_tensors="np")
    found = ours.prepare(shared, requests)
    assert_equal(found, expected)
    assert not found["attention_mask"].all()  # lengths differ


@pytest.mark.parametrize("name", CASES)
def test_a_picture_and_a_question_to_an_answer(folders, name):
    model, processor, folder = folders(name)
    ours = load_model(folder)
    images = pictures((40, 18), (21, 57))
    inputs = ours.prepare(images, asked("which?", 2))
    expected = processor(
        images=images, text=processor.apply_chat_template(asked("which?", 2), add_generation_prompt=True),
        return_tensors="pt",
    )  # fmt: skip
    ids = model.generate(**expected, max_new_tokens=12, do_sample=False)[:, expected["input_ids"].shape[1] :]
    texts = processor.batch_decode(ids, skip_special_tokens=True)
    assert ours.decode(ours.generate(**inputs, max_new=12)) == [text.strip() for text in texts]


def test_text_without_images(folders):
    _, processor, folder = folders("llava clip")
    ours = load_model(folder)
    found = ours.prepare([[], []], ["hello", "good day"])
    text = [processor.apply_chat_template(asked(one, 0), add_generation_prompt=True) for one in ("hello", "good day")]
    expected = processor.tokenizer(text, padding=True, return_tensors="np")
    assert (found["token_ids"] == expected["input_ids"]).all() and set(found) == {"token_ids", "attention_mask"}
    assert ours.generate(**found, max_new=3).shape == (2, 3)


def test_a_template_that_writes_the_first_token_itself(folders):
    ours = load_model(folders("llava clip")[2])
    prompts = ours.prompts
    first = prompts.special["bos_token"]
    plain, begun = (prompts._tokens([text])["token_ids"][0].tolist() for text in ("hello", first + "hello"))
    assert plain == begun


@pytest.mark.parametrize(
    "images, request_, template, words",
    [
        (1, "<image><image>?", None, "2"),
        (2, asked("?"), None, "were given"),
        (1, "?", "alpaca", "vicuna_v1"),
        (1, ["?", "?"], None, "a list for each of the 2"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(folders, images, request_, template, words):
    ours = load_model(folders("llava clip")[2])
    with pytest.raises(InputError, match=words) as error:
        ours.prepare(pictures(*[(9, 9)] * images), request_, template)
    assert "\n" not in str(error.value)
