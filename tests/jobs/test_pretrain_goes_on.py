"""`pivotjax pretrain` goes on as its own errors advise, and refuses what would do nothing before it loads anything."""

import pytest
from tiny_world import llava_corpus, make_language, make_tower

from pivotjax.checkpoints import store
from pivotjax.errors import InputError
from pivotjax.jobs import pretrain
from pivotjax.training.metrics import read_metrics

RECIPE = """
model: {{vision: {0}/tower, language: {0}/language, select_layer: -1}}
data:
  corpora: {{plain: {{format: llava_json, path: {0}/plain/captions.json, images: {0}/plain}}}}
  prompt: a
  max_caption: 4
  train: 24
  calibration: 4
  test: 2
training: {{steps: 3, batch: 2, learning_rate: 1.0e+30, log_every: 1, guard: {{not_finite: abort}}}}
checkpoints: {{every_steps: 1}}
cache: {0}/cache
"""


@pytest.mark.slow
def test_after_abort_the_run_goes_on_with_skip_and_with_models_that_were_moved(tmp_path):
    """At this learning rate the second step's loss is not finite."""
    make_language(tmp_path / "language")
    make_tower("clip", tmp_path / "tower")
    llava_corpus(tmp_path / "plain")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(tmp_path))
    same = [str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match=r"step 2 went wrong for plain and training\.guard says abort"):
        pretrain.main(same)
    (tmp_path / "language").rename(tmp_path / "moved")
    changed = ["--training.guard.not-finite", "skip", "--data.bad-limit", "0.2", "--model.language"]
    pretrain.main([*same, *changed, str(tmp_path / "moved")])
    assert [row["step"] for row in read_metrics(tmp_path / "out")] == [1, 2, 3]
    assert [row["action"] for row in read_metrics(tmp_path / "out", "incidents")] == ["skip", "skip"]
    assert store.load_projector(tmp_path / "out" / "projectors" / "plain").info["alive"]

    make_language(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"was made with another backbone\.language"):
        pretrain.main([*same, *changed, str(tmp_path / "other")])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--checkpoints.keep-best", "1"], "give metrics.evaluate_every as well"),
        (["--metrics.profile-from", "9", "--training.steps", "8"], "profile_from is 9, but training.steps 8"),
        (["--training.warmup", "100"], "warmup is a share of the steps, at most 1, not 100"),
        (["--checkpoints.folder", "/proc/self/none"], "cannot write to /proc/self/none"),
    ],
)
def test_what_would_fail_or_do_nothing_is_refused_before_anything_is_loaded(tmp_path, given, said):
    with pytest.raises(InputError, match=said):
        pretrain.main(["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), *given])
    assert not (tmp_path / "cache").exists()
