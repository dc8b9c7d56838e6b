"""Pictures and conversations as the arrays that a whole model takes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer

from pivotjax.errors import InputError
from pivotjax.files import read_json
from pivotjax.models.language import read_tokenizer
from pivotjax.models.multimodal import templates
from pivotjax.models.multimodal.family import Family
from pivotjax.models.multimodal.network import MultimodalConfig
from pivotjax.models.multimodal.templates import BUILT_IN, IMAGE, Message
from pivotjax.models.processors import AnyProcessor

Request = str | Sequence[Message]
Picture = Image.Image | np.ndarray | str | Path

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Prompts:
    """What a model's folder says about prompts.

    Fields:
        family, config: of the network.
        tokenizer: knows the image token.
        processor: of images; None: it takes none.
        template: the checkpoint's own chat template; None: it has none.
        special: special tokens by name, for templates.
        pad_token: id that shorter prompts are padded with.
        where: names the folder in errors.
    """

    family: Family
    config: MultimodalConfig
    tokenizer: Tokenizer
    processor: AnyProcessor | None
    template: str | None
    special: Mapping[str, str]
    pad_token: int
    where: str

    def __call__(
        self,
        images: Sequence[Picture] | Sequence[Sequence[Picture]],
        request: Request | Sequence[Request],
        template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> dict[str, np.ndarray]:
        """`token_ids` and `attention_mask` [B, L], padded on the left, `pixel_values`, and what else the family takes.

        Args:
            images: of one request in their order, or a list for each of several.
            request: a question about the images, a text with `<image>` for each of them that is the whole prompt
                already, or messages; or a list of such.
            template: one of `templates.BUILT_IN`; None: the checkpoint's own.
            add_generation_prompt: end where the assistant's answer begins.

        Raises:
            InputError: the images do not fit the request, or there is no template.
        """
        several = not isinstance(request, str) and bool(request) and not isinstance(request[0], Mapping)
        requests, pictures = (request, images) if several else ([request], [images])
        if len(requests) != len(pictures) or not all(isinstance(own, list | tuple) for own in pictures):
            raise InputError(f"images must be a list for each of the {len(requests)} requests")
        texts = [self.text(one, len(own), template, add_generation_prompt) for one, own in zip(requests, pictures)]
        counts = [text.count(IMAGE) for text in texts]
        if counts != [len(own) for own in pictures]:
            raise InputError(f"the prompts show {counts} images and {[len(own) for own in pictures]} were given; "
                             f"write {IMAGE} once for each")
        if not sum(counts):
            return self._tokens(texts)
        arrays, known = self.family.process(self.processor, [[_opened(one) for one in own] for own in pictures])
        shown = (self.family.placeholder(self.config, **one) for one in known)
        return self._tokens([_expanded(text, shown) for text in texts]) | arrays

    def text(
        self, request: Request, images: int, template: str | None = None, add_generation_prompt: bool = True
    ) -> str:
        """The prompt's text, `<image>` once for each image."""
        if isinstance(request, str) and IMAGE in request:
            return request
        chosen = self._template(template)
        return templates.render(
            chosen, templates.conversation(request, images), self.special, add_generation_prompt
        )

    def _template(self, name: str | None) -> str:
        if name is not None and name not in BUILT_IN:
            raise InputError(f"there is no template {name!r}; known: {', '.join(BUILT_IN)}")
        found = self.template if name is None else BUILT_IN[name]
        if found is None:
            raise InputError(f"{self.where} has no chat template; choose one of {', '.join(BUILT_IN)}, the one that it "
                             "was trained with")
        return found

    def _tokens(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        begun = self.special.get("bos_token")  # by the template, or else by the tokenizer
        rows = [
            self.tokenizer.encode(text, add_special_tokens=not (begun and text.startswith(begun))).ids for text in texts
        ]
        length = max(map(len, rows))
        ids = np.full((len(rows), length), self.pad_token, np.int32)
        mask = np.zeros((len(rows), length), np.int32)
        for row, (own, real) in zip(rows, zip(ids, mask)):
            own[length - len(row) :] = row
            real[length - len(row) :] = 1
        return {"token_ids": ids, "attention_mask": mask}


def load_prompts(
    folder: Path,
    family: Family,
    config: MultimodalConfig,
    pad_token: int,
    load_images: Callable[[], AnyProcessor],
) -> Prompts:
    """From a model's folder: tokenizer.json, tokenizer_config.json, the chat template; images by `load_images`."""
    special = _special_tokens(folder)
    tokenizer = read_tokenizer(folder)
    if config.image_token is not None:
        if tokenizer.token_to_id(IMAGE) is None:  # the LLaVA repository's layout has none
            tokenizer.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
        if tokenizer.token_to_id(IMAGE) != config.image_token:
            raise InputError(f"{folder}: {IMAGE} has the id {tokenizer.token_to_id(IMAGE)} in tokenizer.json and "
                             f"{config.image_token} in config.json; get the folder again")
    processor = None if family.processor is None else load_images()
    if processor is not None and not isinstance(processor, family.processor):
        raise InputError(f"{folder}: its image processor is not one of its family (preprocessor_config.json); get it "
                         "from where the model came from")
    pad = tokenizer.token_to_id(special.get("pad_token", ""))
    return Prompts(
        family=family,
        config=config,
        tokenizer=tokenizer,
        processor=processor,
        template=templates.of_folder(folder),
        special=special,
        pad_token=pad_token if pad is None else pad,
        where=str(folder),
    )


def _special_tokens(folder: Path) -> dict[str, str]:
    """By name; a token may be given as text or with its properties."""
    found: dict[str, str] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        held = read_json(file) if file.is_file() else {}
        named = {name: held[name] for name in _SPECIAL if held.get(name) is not None}
        found |= {name: one["content"] if isinstance(one, dict) else one for name, one in named.items()}
    return found


def _expanded(text: str, shown: Iterator[str]) -> str:
    first, *rest = text.split(IMAGE)
    return first + "".join(next(shown) + one for one in rest)


def _opened(picture: Picture) -> Image.Image:
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    if isinstance(picture, Image.Image):
        return picture
    try:
        return Image.open(picture)
    except OSError as error:
        raise InputError(f"cannot read the picture {picture}: {error}") from error
