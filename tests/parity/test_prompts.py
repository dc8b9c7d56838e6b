"""Pictures and conversations as arrays: equal to what the families' processors in transformers make of them."""

import numpy as np
import pytest
from tiny_prompts import CASES, asked, pictures, save

from pivotjax.errors import InputError
from pivotjax.models.multimodal import load_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`folders(name)`: a model, its processor, and where they are saved."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("prompts")
            made[name] = *save(folder, name), folder
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
