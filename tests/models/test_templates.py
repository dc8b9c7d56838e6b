"""Prompts: the built-in conversation formats word for word, and checkpoints' own templates against transformers."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from pivotjax.errors import InputError
from pivotjax.models.multimodal import templates
from pivotjax.models.multimodal.templates import BUILT_IN, conversation, of_folder, render

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
IMAGE, QUESTION = {"type": "image"}, {"type": "text", "text": "What is it?"}
TALK = [
    {"role": "user", "content": [IMAGE, QUESTION]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
LLAMA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
# What LLaVA's `conv_templates[name]` gives for TALK, and for its first message alone.
EXPECTED = {
    "vicuna_v1": (
        f"{VICUNA} USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:",
        f"{VICUNA} USER: <image>\nWhat is it? ASSISTANT:",
    ),
    "llama_2": (
        f"[INST] <<SYS>>\n{LLAMA}\n<</SYS>>\n\n<image>\nWhat is it? [/INST] A cat. </s><s>[INST] Sure? [/INST]",
        f"[INST] <<SYS>>\n{LLAMA}\n<</SYS>>\n\n<image>\nWhat is it? [/INST]",
    ),
    "mistral_instruct": (
        "[INST] <image>\nWhat is it? [/INST] A cat. </s>[INST] Sure? [/INST]",
        "[INST] <image>\nWhat is it? [/INST]",
    ),
    "chatml": (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat is it?<|im_end|>"
        "<|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nSure?<|im_end|><|im_start|>assistant\n",
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat is it?<|im_end|>"
        "<|im_start|>assistant\n",
    ),
    "plain": ("<image>What is it?A cat.\nSure?", "<image>What is it?"),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_formats(name):
    assert (render(BUILT_IN[name], TALK, SPECIAL), render(BUILT_IN[name], TALK[:1], SPECIAL)) == EXPECTED[name]


def test_plain_is_the_image_and_its_caption():
    pair = [{"role": "user", "content": [IMAGE]}, {"role": "assistant", "content": "a red square"}]
    assert render(BUILT_IN["plain"], pair, SPECIAL, add_generation_prompt=False) == "<image>a red square\n"
    assert render(BUILT_IN["plain"], conversation("", images=1), SPECIAL) == "<image>"


@pytest.mark.parametrize("name", ["vicuna_v1", "llama_2", "mistral_instruct", "chatml"])
def test_a_system_message_replaces_the_built_in_one(name):
    text = render(BUILT_IN[name], [{"role": "system", "content": "Be brief."}, *TALK], SPECIAL)
    standard = {"vicuna_v1": VICUNA, "llama_2": LLAMA, "chatml": "Answer the questions."}.get(name)
    if standard:
        assert text == EXPECTED[name][0].replace(standard, "Be brief.")
    else:
        assert text == EXPECTED[name][0].replace("[INST] ", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n", 1)


# Shapes of templates that checkpoints bring: images first, in their places, loops with `continue`, `generation` blocks.
LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] != 'assistant' %}{{ content['text'] + ' ' }}{% else %}{% generation %}"
    "{{ content['text'] + ' ' }}{% endgeneration %}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
IDEFICS = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
LOOPS = (
    "{{ bos_token }}{%- for m in messages %}\n  {%- if loop.index0 == 1 %}{% continue %}{% endif %}\n"
    "{%- set space = namespace(n=loop.index) %}{{ m['content'] | tojson }}{{ space.n }}\n{%- endfor %}"
    "{#- a note -#}{{ messages[0].type }}{{ strftime_now('%Y')[:1] }}"
)
STRUCTURED = [{**message, "content": [QUESTION] if isinstance(message["content"], str) else message["content"]}
              for message in TALK]  # fmt: skip


@pytest.mark.parametrize("template", [LLAVA_HF, IDEFICS, LOOPS], ids=["llava", "idefics3", "loops"])
@pytest.mark.parametrize("generate", [True, False])
def test_checkpoints_templates_come_out_as_in_transformers(template, generate):
    expected = render_jinja_template([STRUCTURED], chat_template=template, add_generation_prompt=generate, **SPECIAL)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert render(template, STRUCTURED, SPECIAL, generate) == expected[0]
    assert "What is it?" in expected[0]


def test_a_template_for_text_gets_the_images_as_text():
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    assert render(template, TALK, SPECIAL) == "[<image>\nWhat is it?][A cat.][Sure?]"


def test_pictures_in_messages_are_no_danger():
    class Picture:
        def save(self):
            raise AssertionError("a template called a method")

    talk = [{"role": "user", "content": [{"type": "image", "image": Picture()}, QUESTION]}]
    assert render(IDEFICS, talk, SPECIAL).startswith("<|im_start|>User:<image>What is it?")
    assert "<Picture>" in render("{{ messages[0].content[0]['image'] }} {{ 'type' }}", talk, SPECIAL)


@pytest.mark.parametrize(
    "template, words",
    [
        ("{% for %}", "broken"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "does not take"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "does not take"),
        ("{{ messages[7]['content'] + 'x' }}", "does not take"),
    ],
)
def test_a_bad_template_is_one_clear_line(template, words):
    with pytest.raises(InputError, match=words) as error:
        render(template, TALK, SPECIAL)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("where", ["chat_template.jinja", "chat_template.json", "processor_config.json", "list"])
def test_a_folder_s_template_is_found(tmp_path, where):
    assert of_folder(tmp_path) is None
    if where == "chat_template.jinja":
        (tmp_path / where).write_text("{{ 1 }}")
    elif where == "list":
        several = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ 1 }}"}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    else:
        (tmp_path / where).write_text(json.dumps({"chat_template": "{{ 1 }}"}))
    assert of_folder(tmp_path) == "{{ 1 }}"


def test_a_folder_that_transformers_writes(tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tokenizer.chat_template = IDEFICS
    tokenizer.save_pretrained(tmp_path)
    assert of_folder(tmp_path) == IDEFICS


def test_a_question_about_images():
    asked = conversation("Which is older?", images=2)
    assert asked == [{"role": "user", "content": [IMAGE, IMAGE, {"type": "text", "text": "Which is older?"}]}]
    assert templates.render(BUILT_IN["mistral_instruct"], asked, SPECIAL) == (
        "[INST] <image>\n<image>\nWhich is older? [/INST]"
    )
