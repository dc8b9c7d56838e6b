"""What projectors are asked: which of several captions belongs to an image, packed so that no token is computed twice.

A question is one image and the captions it is held against. Its captions are merged into a tree of tokens under the
common prefix (image and prompt): captions that begin alike share their beginning, and every token sees its own
ancestors only. Several questions stand side by side in one row of fixed width, blind to each other, so that the
prefix's keys and values are computed once per image and there is hardly any padding. (Tree attention as in SpecInfer,
arXiv 2305.09781; packing as in arXiv 2107.02027, best fit with the largest first.)
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32

from pivotjax.data.captions import Captioner
from pivotjax.data.features import Sample
from pivotjax.errors import InputError
from pivotjax.models.vlm import IMAGE_TOKEN

_WIDTHS = (128, 160, 192, 224, 256, 320, 384, 512)  # of a packed row, in tokens
_ATTENTION_COST = 1 / 1800  # what one more slot of width costs a token, as a share of its other work (measured, CPU)


@dataclass(frozen=True)
class TestSet:
    """One domain's held-out images.

    features: [N, V, channels].  captions, keys: one an image.  answers: a closed set of captions that every image is
    held against (the 24 of shapes); None: the wrong captions are drawn from the other images' captions.
    """

    __test__ = False  # not a test case, whatever its name looks like

    features: Float32[np.ndarray, "N V C"]
    captions: tuple[str, ...]
    keys: tuple[str, ...]
    answers: tuple[str, ...] | None = None

    @classmethod
    def of(cls, samples: Iterable[Sample], answers: Iterable[str] | None = None) -> "TestSet":
        """Of samples as `FeatureSource` gives them. InputError where there are none."""
        samples = list(samples)
        if not samples:
            raise InputError("there are no test items to evaluate on; give the domain more items")
        features = np.stack([sample["features"] for sample in samples])
        captions, keys = (tuple(sample[name] for sample in samples) for name in ("caption", "key"))
        return cls(features, captions, keys, None if answers is None else tuple(answers))


class Question(NamedTuple):
    """An image (its row in the features) and token sequences, each with its end token; the right one comes first."""

    image: int
    captions: tuple[tuple[int, ...], ...]


class Packed(NamedTuple):
    """Questions as R rows of W token slots. An edge of a tree is one log-probability: a token after its prefix."""

    tokens: Int32[np.ndarray, "R W"]  # IMAGE_TOKEN where a visual token stands
    positions: Int32[np.ndarray, "R W"]
    mask: Bool[np.ndarray, "R W W"]  # which slots each slot sees
    images: Int32[np.ndarray, "R G"]  # rows of the features, in the order of the row's IMAGE_TOKENs
    heads: Int32[np.ndarray, "R H"]  # slots whose logits are read
    edge_head: Int32[np.ndarray, "R E"]  # index into heads
    edge_token: Int32[np.ndarray, "R E"]
    edge: Int[np.ndarray, " M"]  # flat index (row * E + edge) of every token of every caption ...
    caption: Int[np.ndarray, " M"]  # ... and the caption it belongs to, numbered through all questions in order
    used: int  # slots that hold a token

    def scores(self, edges: Float[np.ndarray, "R E"]) -> Float[np.ndarray, " captions"]:
        """Log-likelihood of every caption, float64: the sum of its edges."""
        return np.bincount(self.caption, np.asarray(edges, np.float64).ravel()[self.edge])


def retrieval(domain: str, test: TestSet, captioner: Captioner, choices: int = 8, seed: int = 0) -> list[Question]:
    """For each image its own caption and `choices - 1` others (all the others of a closed set).

    The others are distinct captions of the same domain's test images, drawn by (seed, domain, key) alone: the same for
    every projector, wherever the item stands. InputError where there is nothing to tell apart.
    """
    if choices < 2:
        raise InputError(f"retrieval among {choices} caption tells nothing; give 2 or more choices")
    pool = sorted(set(test.captions if test.answers is None else test.answers) | set(test.captions))
    ids = {caption: tuple(captioner.caption_ids(caption)) for caption in pool}
    if len(set(ids.values())) < 2:
        raise InputError(f"the {len(test.captions)} test items of {domain} share one caption; retrieval needs two")
    questions = []
    for image, (caption, key) in enumerate(zip(test.captions, test.keys)):
        others = [other for other in pool if ids[other] != ids[caption]]
        if test.answers is None and len(others) > choices - 1:
            generator = np.random.default_rng([seed, zlib.crc32(f"{domain}/{key}".encode())])
            others = [others[i] for i in generator.choice(len(others), choices - 1, replace=False)]
        questions.append(Question(image, (ids[caption], *(ids[other] for other in others))))
    return questions


def shuffled(test: TestSet, captioner: Captioner, items: int) -> list[Question]:
    """The control: the first `items` captions, each alone, with the image of the next item that has another caption.

    None where all items share one caption.
    """
    total = len(test.captions)
    if len(set(test.captions)) < 2:
        return []
    questions = []
    for item in range(min(items, total)):
        order = ((item + step) % total for step in range(1, total))
        other = next(i for i in order if test.captions[i] != test.captions[item])
        questions.append(Question(other, (tuple(captioner.caption_ids(test.captions[item])),)))
    return questions


def pack(questions: Sequence[Question], num_visual: int, prompt: Sequence[int], begin: Sequence[int] = ()) -> Packed:
    """Lays questions out in rows (see the module's text).

    Args:
        questions: at least one.
        num_visual: visual tokens an image (V).
        prompt: token ids between image and caption.
        begin: token ids before the image.
    """
    trees = [_Tree.of(question) for question in questions]
    prefix = len(begin) + num_visual + len(prompt)
    sizes = [prefix + len(tree.tokens) for tree in trees]
    width, rows = _best_rows(sizes)
    heads = _round_up(max(sum(1 + len(trees[q].tokens) for q in row) for row in rows), 16)
    edges = _round_up(max(sum(len(trees[q].edges) for q in row) for row in rows), 16)
    packed = Packed(
        tokens=np.zeros((len(rows), width), np.int32),
        positions=np.zeros((len(rows), width), np.int32),
        mask=np.tile(np.eye(width, dtype=bool), (len(rows), 1, 1)),  # padding sees itself: no softmax over nothing
        images=np.zeros((len(rows), max(map(len, rows))), np.int32),
        heads=np.zeros((len(rows), heads), np.int32),
        edge_head=np.zeros((len(rows), edges), np.int32),
        edge_token=np.zeros((len(rows), edges), np.int32),
        edge=np.zeros(0, np.int64),
        caption=np.zeros(0, np.int64),
        used=sum(sizes),
    )
    first_caption = np.cumsum([0, *(len(question.captions) for question in questions)])
    edge, caption = [], []
    prefix_tokens = [*begin, *[IMAGE_TOKEN] * num_visual, *prompt]
    for r, row in enumerate(rows):
        slot = head = first_edge = 0
        for place, q in enumerate(row):
            tree, end = trees[q], slot + sizes[q]
            packed.images[r, place] = questions[q].image
            packed.tokens[r, slot:end] = prefix_tokens + tree.tokens
            packed.positions[r, slot:end] = [*range(prefix), *(prefix + depth for depth in tree.depths)]
            packed.mask[r, slot:end, slot:end] = tree.mask(prefix)
            read = 1 + len(tree.tokens)  # the prefix's last slot and every node
            packed.heads[r, head : head + read] = np.arange(slot + prefix - 1, end)
            packed.edge_head[r, first_edge : first_edge + len(tree.edges)] = [head + parent for parent, _ in tree.edges]
            packed.edge_token[r, first_edge : first_edge + len(tree.edges)] = [token for _, token in tree.edges]
            for number, path in enumerate(tree.paths):
                edge += [r * edges + first_edge + step for step in path]
                caption += [first_caption[q] + number] * len(path)
            slot, head, first_edge = end, head + read, first_edge + len(tree.edges)
    return packed._replace(edge=np.array(edge, np.int64), caption=np.array(caption, np.int64))


class _Tree(NamedTuple):
    """A question's captions as a tree. Node 0 is the prefix; nodes 1.. are tokens that something follows."""

    tokens: list[int]  # of nodes 1..
    depths: list[int]  # of nodes 1..: 0 right after the prefix
    parents: list[int]  # of nodes 1..: always an earlier node
    edges: list[tuple[int, int]]  # (node, token that follows it), each once
    paths: list[list[int]]  # a caption's edges

    @classmethod
    def of(cls, question: Question) -> "_Tree":
        tree = cls([], [], [], [], [])
        edge_of: dict[tuple[int, int], int] = {}
        node_of: dict[tuple[int, int], int] = {}  # by the edge that leads there
        for caption in question.captions:
            node, path = 0, []
            for depth, token in enumerate(caption):
                step = (node, token)
                if step not in edge_of:
                    edge_of[step] = len(tree.edges)
                    tree.edges.append(step)
                path.append(edge_of[step])
                if depth == len(caption) - 1:
                    break
                if step not in node_of:
                    tree.tokens.append(token)
                    tree.depths.append(depth)
                    tree.parents.append(node)
                    node_of[step] = len(tree.tokens)
                node = node_of[step]
            tree.paths.append(path)
        return tree

    def mask(self, prefix: int) -> Bool[np.ndarray, "L L"]:
        """Which slots each slot sees: the prefix is causal, a node sees the prefix, its ancestors and itself."""
        size = prefix + len(self.tokens)
        mask = np.zeros((size, size), bool)
        mask[:prefix, :prefix] = np.tri(prefix, dtype=bool)
        for node, parent in enumerate(self.parents, start=1):
            slot = prefix - 1 + node
            mask[slot] = mask[prefix - 1 + parent]
            mask[slot, slot] = True
        return mask


def _best_rows(sizes: Sequence[int]) -> tuple[int, list[list[int]]]:
    """The row width whose packing costs least, and the questions of each row."""
    largest = _round_up(max(sizes), 16)
    layouts = [(width, _best_fit(sizes, width)) for width in {max(width, largest) for width in _WIDTHS}]
    return min(layouts, key=lambda layout: (len(layout[1]) * layout[0] * (1 + layout[0] * _ATTENTION_COST), layout[0]))


def _best_fit(sizes: Sequence[int], width: int) -> list[list[int]]:
    """Largest first, each into the fullest row that still has room."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(width + 1)]  # rows by free slots
    for q in sorted(range(len(sizes)), key=lambda q: -sizes[q]):
        room = next((free for free in range(sizes[q], width + 1) if with_room[free]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, width
        else:
            row = with_room[room].pop()
        rows[row].append(q)
        with_room[room - sizes[q]].append(row)
    return rows


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
