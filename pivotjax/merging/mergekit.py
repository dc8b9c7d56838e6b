"""What mergekit's recipes mean in our words: one table, written from its behaviour (version 0.1.5).

Both programs have these methods; names of options, their values and their defaults differ. `recipe.parse` looks here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pivotjax.errors import InputError

Settings = dict[str, Any]


@dataclass(frozen=True)
class Theirs:
    """One of mergekit's methods.

    Fields:
        ours: the registered method.
        required: parameters without which mergekit refuses a recipe.
        defaults: our option -> what mergekit means where a recipe leaves it out, if that is not our default.
        words: its parameter -> our option, where the two differ (`weight` and `lambda` are known to all recipes).
        values: its parameter -> {its value: ours}.
        only: parameters that we know at one value alone.
        idle: parameters that it accepts and that change nothing.
        convert: where parameters do not correspond one to one: its parameters -> the same in our options.
        base_is_model: the base is one of the models that are merged, not what updates are measured from.
    """

    ours: str
    required: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    convert: Callable[[Settings], Settings] = dict
    base_is_model: bool = False

    def in_our_words(self, settings: Settings) -> tuple[Settings, list[str]]:
        """Our options for its parameters, and a sentence on each that was left out."""
        notes = [f"{word} is ignored: {self.ours} does not use it" for word in settings if word in self.idle]
        found = {}
        for word, value in self.convert({w: v for w, v in settings.items() if w not in self.idle}).items():
            if word in self.only:
                if value != self.only[word]:
                    raise InputError(f"{word} = {value} is not supported with {self.ours} (only {self.only[word]})")
                continue
            found[self.words.get(word, word)] = _translated(value, self.values.get(word, {}))
        return found, notes


def _translated(setting: Any, values: Mapping[Any, Any]) -> Any:
    if isinstance(setting, list):
        return [_translated(entry, values) for entry in setting]
    if isinstance(setting, Mapping):
        return {**setting, "value": _translated(setting["value"], values)} if "value" in setting else setting
    return values.get(setting, setting)


def _task_vectors(ours: str, **defaults: Any) -> Theirs:
    """The family that sums sparsified task vectors: `weight` is required, lambda and density are 1; to rescale is to
    restore each tensor's sum of magnitudes."""
    defaults = {"scale": 1.0, "density": 1.0} | defaults
    return Theirs(ours, ("weight",), defaults, values={"rescale": {True: "norm", False: "none"}})


def _nuslerp(settings: Settings) -> Settings:
    """Two truth values -> what counts as one vector."""
    flatten, columns = settings.pop("nuslerp_flatten", True), settings.pop("nuslerp_row_wise", False)
    return settings | ({} if flatten else {"along": "inputs" if columns else "outputs"})


METHODS: dict[str, Theirs] = {
    "linear": Theirs("average", ("weight",), base_is_model=True),
    "task_arithmetic": Theirs("task_arithmetic", ("weight",), {"scale": 1.0}, idle=("density", "rescale")),
    "ties": _task_vectors("ties"),
    "dare_linear": _task_vectors("dare_linear", rescale="norm"),
    "dare_ties": _task_vectors("dare_ties", rescale="norm", normalize=False),
    "della_linear": _task_vectors("della_linear", rescale="norm"),
    "della": _task_vectors("della", rescale="norm"),
    "breadcrumbs": _task_vectors("breadcrumbs"),
    "breadcrumbs_ties": _task_vectors("breadcrumbs_ties", normalize=False),
    "sce": Theirs("sce", (), {"select": 1.0, "floor": 1e-6}, {"select_topk": "select"}),
    "model_stock": Theirs("model_stock", (), {"floor": 1e-6}),
    "slerp": Theirs("slerp", ("t",), base_is_model=True),
    "nuslerp": Theirs("nuslerp", ("weight",), convert=_nuslerp),
    "multislerp": Theirs("multislerp", ("weight",), words={"normalize_weights": "normalize"}, only={"eps": 1e-8}),
    "karcher": Theirs("karcher", words={"max_iter": "iterations", "tol": "tolerance"}, base_is_model=True),
}

# Parameters and keys of mergekit that no merge here needs, and why leaving them out changes nothing.
IDLE = {"int8_mask": "it saves memory in mergekit and changes no result"}
_TOKENIZER = "tokenizer files are copied from the base as they are"
IDLE_KEYS = {"tokenizer_source": _TOKENIZER, "tokenizer": _TOKENIZER, "chat_template": _TOKENIZER}
