"""`pivotjax generate` with whole models (with projectors: tests/jobs/test_demo.py)."""

import shutil

import numpy as np
import pytest
from etils import epath
from PIL import Image
from test_llava_original import save_original, save_tower
from tiny_prompts import CASES, asked, save, tokenizer_of
from tiny_whole import build

import pivotjax
from pivotjax.checkpoints import hub
from pivotjax.errors import InputError
from pivotjax.jobs import convert, generate


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 256, (20 + 9 * i, 31, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    return [folder / "0.png", folder / "1.png"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(name)`: a model, its processor, its folder."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("model")
            made[name] = *save(folder, name), folder
        return made[name]

    return of


def answer_of_transformers(model, processor, pictures, question, count):
    text = processor.apply_chat_template(asked(question, len(pictures)), add_generation_prompt=True)
    inputs = processor(images=[Image.open(one) for one in pictures], text=text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_that_of_transformers(files, saved, name, capsys):
    model, processor, folder = saved(name)
    generate.main([str(files[0]), "what?", "--model", str(folder), "--max-new", "10"])
    assert capsys.readouterr().out == answer_of_transformers(model, processor, files[:1], "what?", 10) + "\n"
    generate.main([str(files[0]), "and?", "--image", str(files[1]), "--model", str(folder), "--max-new", "10"])
    assert capsys.readouterr().out == answer_of_transformers(model, processor, files, "and?", 10) + "\n"


def test_options(files, saved, capsys):
    folder = saved("llava clip")[2]

    def said(*options):
        generate.main([str(files[0]), "what?", "--model", str(folder), "--max-new", "10", *options])
        return capsys.readouterr().out

    assert said("--template", "vicuna_v1") != said() == said("--temperature", "0.0")
    assert said("--temperature", "2", "--seed", "1") == said("--temperature", "2", "--seed", "1")
    assert said("--temperature", "2", "--seed", "1") != said("--temperature", "2", "--seed", "2")
    assert said("--dtype", "bfloat16")


def test_a_checkpoint_of_the_llava_repository(files, tmp_path, capsys):
    """Its prompts need no image token in the tokenizer; pictures are made square first."""
    tokenizer = tokenizer_of()
    words = tokenizer.convert_tokens_to_ids("<image>")  # those before it are the original vocabulary
    model = build("llava", "llama", "clip", image_token_id=words, of_text=dict(vocab_size=words + 3))
    folder = save_original(tmp_path / "llava", model, rows=words, image_aspect_ratio="pad")
    tower = save_tower(tmp_path / "tower", model)
    save(tmp_path / "hf", "llava clip")[1].image_processor.save_pretrained(tower)
    plain = tokenizer_of(special=("<s>", "</s>", "<pad>"))
    plain.save_pretrained(folder)
    with pytest.raises(InputError, match="choose one of plain, vicuna_v1"):
        generate.main([str(files[0]), "what?", "--model", str(folder), "--vision", str(tower)])
    options = ["--model", str(folder), "--vision", str(tower), "--template", "vicuna_v1", "--max-new", "8"]
    generate.main([str(files[0]), "what?", *options])
    ours = pivotjax.load_model(folder, vision=tower)
    inputs = ours.prepare([Image.open(files[0])], "what?", "vicuna_v1")
    assert (inputs["token_ids"] == words).sum() == 16 and ours.prompts.processor.square is not None
    assert capsys.readouterr().out == ours.decode(ours.generate(**inputs, max_new=8))[0] + "\n"


def test_an_orbax_checkpoint_here_and_in_a_bucket(files, saved, tmp_path, capsys, monkeypatch):
    """`gs://` is another kind of path for the same code; here it is a local one of that kind."""
    path_of = hub.path_of
    monkeypatch.setattr(
        hub, "path_of",
        lambda where: epath.Path(tmp_path / where[5:]) if where.startswith("gs://") else path_of(where),
    )  # fmt: skip
    folder = saved("llava_next")[2]
    convert.main([str(folder), str(tmp_path / "here")])
    convert.main([str(folder), "gs://there"])
    capsys.readouterr()
    said = []
    for model in (folder, tmp_path / "here", "gs://there"):
        generate.main([str(files[0]), "what?", "--model", str(model), "--max-new", "10"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2] and said[0].strip()


def test_another_family_s_image_processor(files, saved, tmp_path):
    folder = shutil.copytree(saved("llava_next")[2], tmp_path / "model")
    saved("llava clip")[1].save_pretrained(folder)
    with pytest.raises(InputError, match="image processor is not one of its family"):
        generate.main([str(files[0]), "what?", "--model", str(folder)])


def test_what_a_projector_does_not_take(files, tmp_path):
    for more in (["--image", str(files[1])], ["--template", "plain"], ["--vision", str(tmp_path)]):
        with pytest.raises(InputError, match="projector alone"):
            generate.main([str(files[0]), "--model", str(tmp_path / "projector.safetensors"), *more])


def test_a_picture_that_cannot_be_read_is_refused_first(saved, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(InputError, match="cannot read the image"):
        generate.main([str(tmp_path / "a.png"), "--model", str(saved("llava clip")[2])])
