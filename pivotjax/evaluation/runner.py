"""Projectors meet test items: caption losses and retrieval of P projectors over one frozen language model."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float64

from pivotjax.data.captions import Captioner
from pivotjax.errors import InputError
from pivotjax.evaluation import tasks
from pivotjax.evaluation.metrics import Outcome
from pivotjax.evaluation.tasks import Packed, Question, TestSet
from pivotjax.models import projector, vlm
from pivotjax.models.language import Language
from pivotjax.progress import Bar

CHOICES = 8  # candidates an image in retrieval
CONTROL_ITEMS = 24  # items a domain that the shuffled-image control takes
_SLOTS_A_CALL = 1024  # tokens of one forward pass: enough to keep the cores busy, little enough to keep logits small


class Spread(NamedTuple):
    """Devices that share the rows of a call. Where they belong to several processes, all of them evaluate the same and
    get the same.

    Fields:
        devices: how many.
        put: `array[numbers]` of a host array, spread over them along the first axis of `numbers`.
        copy: a pytree of host arrays, whole on each of them.
        fetch: a result as a whole host array.
    """

    devices: int
    put: Callable[[np.ndarray, np.ndarray], jax.Array]
    copy: Callable[[Any], Any]
    fetch: Callable[[jax.Array], np.ndarray]


HERE = Spread(
    devices=1,
    put=lambda array, numbers: jnp.asarray(array[numbers]),
    copy=functools.partial(jax.tree.map, jnp.asarray),
    fetch=np.asarray,
)


def evaluate(
    language: Language,
    params: Any,
    projectors: projector.Params,
    tests: Mapping[str, TestSet],
    captioner: Captioner,
    *,
    choices: int = CHOICES,
    control_items: int = CONTROL_ITEMS,
    seed: int = 0,
    spread: Spread = HERE,
) -> dict[str, Outcome]:
    """Caption loss, retrieval and the shuffled-image control of P projectors on every domain.

    Each image is read once a projector: the loss of an item is minus the log-likelihood of its own caption among the
    candidates. A candidate's score is its log-likelihood, end token included; a tie counts as wrong. Projectors that
    are equal bit for bit are computed once, those that are not finite not at all.

    Args:
        language: the frozen language model.
        params: its parameters (an argument, so that they may be placed elsewhere than `language.params`).
        projectors: P projectors, [P, ...] on every leaf.
        tests: domain -> held-out items.
        captioner: prompt, number of visual tokens and tokenizer.
        choices: candidates an image, where the domain has no closed set of answers.
        control_items: the first so many items of each domain are also read with another item's image; 0 leaves it out.
        seed: of the drawn candidates.
        spread: the devices that share the work.

    Returns:
        domain -> Outcome; NaN for projectors that are not finite.

    Raises:
        InputError: a domain without items, with one caption only, or with another number of visual tokens.
    """
    questions, spans = [], {}
    offset = 0
    for domain, test in tests.items():
        _check(domain, test, captioner)
        asked = tasks.retrieval(domain, test, captioner, choices, seed)
        controls = tasks.shuffled(test, captioner, control_items)
        spans[domain] = (asked, controls)
        questions += [question._replace(image=offset + question.image) for question in asked + controls]
        offset += len(test.captions)
    features = np.concatenate([test.features for test in tests.values()])
    packed = tasks.pack(questions, captioner.num_visual, captioner.prompt_ids, captioner.begin_ids)

    scores, start, outcomes = _scores(language, params, projectors, features, packed, "evaluate", spread), 0, {}
    for domain, (asked, controls) in spans.items():
        counts = np.array([len(question.captions) for question in asked])
        first = start + np.cumsum([0, *counts[:-1]])
        own = scores[:, first]
        rivals = np.stack([scores[:, f + 1 : f + n].max(axis=1) for f, n in zip(first, counts)], axis=1)
        start += counts.sum()
        control = scores[:, start : start + len(controls)]
        start += len(controls)
        outcomes[domain] = Outcome(
            nll=-own,
            tokens=_tokens(asked),
            correct=np.where(np.isfinite(own), own > rivals, np.nan),
            choices=int(counts.max()),
            control_nll=-control,
            control_tokens=_tokens(controls),
        )
    return outcomes


def caption_losses(
    language: Language,
    params: Any,
    projectors: projector.Params,
    features: Float[np.ndarray, "N V C"],
    tokens: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    spread: Spread = HERE,
) -> Float64[np.ndarray, " P"]:
    """Caption loss a token (nats) of P projectors, pooled over N pairs of image and caption: for tuning and scores.

    Args:
        language, params, projectors: as in `evaluate`.
        features: visual features.
        tokens, targets, weights: int [N, L], int [N, T] and float [N, T], as `Captioner.encode` gives them.
        spread: the devices that share the work.

    Returns:
        Sum of the negative log-likelihoods over the sum of the tokens, NaN for projectors that are not finite.
    """
    lengths = np.asarray(weights).astype(bool).sum(axis=1)
    captions = [tuple(row[:n].tolist()) for row, n in zip(np.asarray(targets), lengths)]
    prefix = np.asarray(tokens)[0, : tokens.shape[1] - targets.shape[1] + 1]
    num_visual = int((prefix == vlm.IMAGE_TOKEN).sum())
    questions = [Question(image, (caption,)) for image, caption in enumerate(captions)]
    first = int(np.argmax(prefix == vlm.IMAGE_TOKEN))
    packed = tasks.pack(questions, num_visual, prefix[first + num_visual :].tolist(), prefix[:first].tolist())
    scores = _scores(language, params, projectors, np.asarray(features), packed, "caption losses", spread)
    return -scores.sum(axis=1) / lengths.sum()


def _scores(
    language: Language,
    params: Any,
    projectors: projector.Params,
    features: np.ndarray,
    packed: Packed,
    title: str,
    spread: Spread,
) -> Float64[np.ndarray, "P captions"]:
    """Log-likelihood of every caption under every projector: equal ones computed once, not finite ones NaN."""
    each = projector.unstack(jax.device_get(projectors))
    prints = [projector.fingerprint(one) for one in each]
    finite = [all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one)) for one in each]
    chosen = list({prints[p]: p for p in reversed(range(len(each))) if finite[p]}.values())
    rows = _edge_rows(language, params, [each[p] for p in chosen], features, packed, title, spread)
    found = {prints[p]: packed.scores(edges) for p, edges in zip(chosen, rows)}
    missing = np.full(packed.caption.max() + 1, np.nan)
    return np.stack([found.get(name, missing) for name in prints])


def _edge_rows(
    language: Language,
    params: Any,
    projectors: Sequence[projector.Params],
    features: np.ndarray,
    packed: Packed,
    title: str,
    spread: Spread,
) -> Float[np.ndarray, "P R E"]:
    """Log-probability of every edge: one projector after the other, in calls of one shape, hence one compilation.

    A call sees the images of its own rows alone, and projects them where they are.
    """
    rows, width = packed.tokens.shape
    calls = -(-rows // (spread.devices * max(1, _SLOTS_A_CALL // width)))  # of each projector
    batch = spread.devices * -(-rows // (spread.devices * calls))
    layout = (packed.tokens, packed.positions, packed.mask, packed.heads, packed.edge_head, packed.edge_token)
    found = np.empty((len(projectors), rows, packed.edge_head.shape[1]), np.float32)
    with Bar(len(projectors) * rows, title, unit="row") as bar:
        for edges, one in zip(found, projectors):
            placed = spread.copy(one)
            for start in range(0, rows, batch):
                row = np.minimum(np.arange(start, start + batch), rows - 1)  # the last call repeats the last row
                given = [spread.put(features, packed.images[row]), *(spread.put(part, row) for part in layout)]
                told = spread.fetch(_edges(language.graphdef, params, placed, *given))
                edges[start : start + batch] = told[: rows - start]
                bar.update(min(batch, rows - start))
    return found


@functools.partial(jax.jit, static_argnums=0)
def _edges(
    graphdef: nnx.GraphDef,
    params: Any,
    one: projector.Params,
    features: Float[Array, "B G V C"],
    tokens: Array,
    positions: Array,
    mask: Array,
    heads: Array,
    edge_head: Array,
    edge_token: Array,
) -> Float[Array, "B E"]:
    """One forward pass over packed rows, behind one projector; logits only where an edge begins."""
    model = nnx.merge(graphdef, params)
    visual = projector.apply(one, features)
    x = vlm.splice(model, tokens, visual.reshape(len(tokens), -1, visual.shape[-1]))
    hidden, _ = model(x, positions, mask)
    logits = model.logits(jnp.take_along_axis(hidden, heads[..., None], axis=1))
    row = jnp.arange(len(tokens))[:, None]
    return logits[row, edge_head, edge_token] - jax.nn.logsumexp(logits, axis=-1)[row, edge_head]


def _tokens(questions: Sequence[Question]) -> np.ndarray:
    """Length of each question's right caption, int64."""
    return np.array([len(question.captions[0]) for question in questions], np.int64)


def _check(domain: str, test: TestSet, captioner: Captioner) -> None:
    if not test.captions:
        raise InputError(f"{domain} has no test items to evaluate on; give it more items")
    if test.features.shape[1] != captioner.num_visual:
        given, wanted = test.features.shape[1], captioner.num_visual
        raise InputError(f"{domain} has {given} visual tokens an image, not {wanted}; encode its images again")
