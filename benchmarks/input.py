"""How fast the input is: images/s of one core beside bare Pillow, and how long a training loop waits for it.

    taskset -c 0 python benchmarks/input.py          # the first part is about one core
    python benchmarks/input.py --part wait

The corpus is made first: JPEGs of some 500 x 400 pixels in WebDataset shards, half of them with the statistics of
photographs (amplitudes fall as 1/frequency, shaded, with edges), half drawings of a
packaged domain.

Part `rate`, by turns in the same run: bare Pillow decodes and resizes JPEGs that are in memory and does nothing else;
our input reads the shards, checks, decodes, resizes, tokenises and batches in a worker process, whose batches this
process takes. Both do the resize of CLIP's processor (shorter edge to the size, bicubic, the middle cut out).

Part `wait`: a loop whose step keeps a device, not this machine, busy (a sleep) takes batches with 0, 1 and 2 workers;
the share of its time that it waits for input, for devices that take half, as many, and twice the images that one core
makes.
"""

import argparse
import io
import json
import multiprocessing
import os
import signal
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from pivotjax.data import assets, images
from pivotjax.data.captions import Captioner
from pivotjax.data.corpora import CorpusConfig, open_corpus
from pivotjax.data.pictures import Decoder, Pictures
from pivotjax.data.pipeline import Feed
from pivotjax.data.sources import source
from pivotjax.models.processors import Normalisation, Processor

COPIES = 8  # of every picture in the shards: tiny corpora take longer to shuffle
GOAL = 0.85  # of bare Pillow's images/s
WARM = 8  # batches before the clock runs: those made ahead, and those that shared memory is taken for
WORDS = "a photo of the old red house by a river with two boats and green trees on sunny day near mountain".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("rate", "wait", "all"), default="all")
    parser.add_argument("--images", type=int, default=512, help="different pictures of the corpus")
    parser.add_argument("--size", type=int, default=336, help="pixels of the encoder's images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=16, help="batches of each side in a repeat")
    parser.add_argument("--steps", type=int, default=10, help="of the training loop")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = write_corpus(Path(folder), args.images)
        size = statistics.mean(map(len, files)) / 1e3
        print(f"{len(files)} JPEGs, {size:.0f} kB on average; {len(os.sched_getaffinity(0))} cores")
        rate = bare(files, args.size)
        if args.part in ("rate", "all"):
            compare_rates(files, Path(folder), args)
        if args.part in ("wait", "all"):
            show_waiting(Path(folder), rate, args)


def compare_rates(files: list[bytes], folder: Path, args: argparse.Namespace) -> None:
    """Prints both rates, and the ratio of each repeat. Within one the two take short turns, so that whatever else the
    machine does meets both; the worker is stopped while Pillow's turn lasts."""
    ratios = []
    with make_feed(folder, args.size, args.batch, workers=1).start(0) as batches:
        for _ in range(WARM):
            next(batches)
        for number in range(args.repeats):
            theirs, ours = [], []
            for turn in range(args.turns):
                tell_workers(signal.SIGSTOP)
                some = [files[(turn * args.batch + n) % len(files)] for n in range(args.batch)]
                theirs.append(len(some) / bare(some, args.size))
                tell_workers(signal.SIGCONT)
                started = time.perf_counter()
                next(batches)
                ours.append(time.perf_counter() - started)
            images = args.turns * args.batch
            ratios.append(sum(theirs) / sum(ours))
            rates = f"bare Pillow {images / sum(theirs):.1f} images/s, pivotjax {images / sum(ours):.1f}"
            print(f"repeat {number + 1}: {rates}, ratio {ratios[-1]:.3f}", flush=True)
    median = statistics.median(ratios)
    print(
        f"ratio: median {median:.3f} (from {min(ratios):.3f} to {max(ratios):.3f}); at least {GOAL}: {median >= GOAL}"
    )


def tell_workers(what: signal.Signals) -> None:
    """Stops the worker processes, or lets them go on."""
    for process in multiprocessing.active_children():
        os.kill(process.pid, what)


def show_waiting(folder: Path, rate: float, args: argparse.Namespace) -> None:
    """Prints a line for each number of workers: the share of waiting for each speed of the device."""
    speeds = (0.5, 1.0, 2.0)
    print("share of the time in which a training loop waits; a device that takes x times a core's images:")
    print("workers  " + "  ".join(f"{speed:>5}x" for speed in speeds))
    for workers in (0, 1, 2):
        feed = make_feed(folder, args.size, args.batch, workers)
        shares = [waiting(feed, args.steps, args.batch / (speed * rate)) for speed in speeds]
        print(f"{workers:>7}  " + "  ".join(f"{share:6.1%}" for share in shares), flush=True)


def bare(files: list[bytes], size: int) -> float:
    """Images/s of Pillow alone."""
    started = time.perf_counter()
    for data in files:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        scale = size / min(image.size)
        width, height = (max(size, int(edge * scale)) for edge in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return len(files) / (time.perf_counter() - started)


def waiting(feed: Feed, count: int, step_seconds: float) -> float:
    """Share of the time in which a loop waits for its batches, after the first ones."""
    with feed.start(0) as batches:
        for _ in range(WARM):
            next(batches)
        started, waited = time.perf_counter(), 0.0
        for _ in range(count):
            asked = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - asked
            time.sleep(step_seconds)
        return waited / (time.perf_counter() - started)


def make_feed(folder: Path, size: int, batch: int, workers: int) -> Feed:
    """Our input over the shards: CLIP's processor, LLaVA's template."""
    corpus = open_corpus(CorpusConfig("webdataset", str(folder / "shards")), folder / "cache")
    fit = Processor(Normalisation(), Image.Resampling.BICUBIC, size, (size, size))
    vocabulary = {word: number for number, word in enumerate(["[?]", "</s>", "\n", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[?]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    captioner = Captioner(tokenizer, 1, num_visual=(size // 14) ** 2, max_caption=64, template="plain")
    return Feed({"a": [Pictures(corpus, "a", size, Decoder(fit))]}, captioner, batch, seed=0, workers=workers)


def write_corpus(folder: Path, count: int) -> list[bytes]:
    """Writes the shards, of 256 pictures each; returns the JPEGs."""
    random = np.random.default_rng(0)
    drawings = packaged(count // 2)
    files = [encoded(photo(random) if n % 2 else next(drawings), random) for n in range(count)]
    (folder / "shards").mkdir()
    for first in range(0, COPIES * count, 256):
        with tarfile.open(folder / "shards" / f"{first // 256:05}.tar", "w") as tar:
            for number, data in enumerate((COPIES * files)[first : first + 256], first):
                caption = " ".join(random.choice(WORDS, random.integers(6, 20)))
                about = json.dumps({"caption": caption, "status": "success", "key": f"{number:09}"})
                for suffix, part in (("jpg", data), ("txt", caption.encode()), ("json", about.encode())):
                    member = tarfile.TarInfo(f"{number:09}.{suffix}")
                    member.size = len(part)
                    tar.addfile(member, io.BytesIO(part))
    return files


def photo(random: np.random.Generator) -> Image.Image:
    """Colours whose amplitudes fall as 1/frequency, as those of photographs do, shaded, with some edges."""
    height, width = int(random.integers(360, 441)), int(random.integers(450, 551))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    channels = []
    for _ in range(2):
        spectrum = random.normal(size=frequency.shape) + 1j * random.normal(size=frequency.shape)
        field = np.fft.irfft2(spectrum / frequency, (height, width))
        channels.append(field / field.std())
    light, tint = channels
    y, x = np.mgrid[:height, :width] / height
    light = light + 1.5 * (y - 0.5)
    for _ in range(6):
        cx, cy, r = random.random() * 1.25, random.random(), 0.05 + 0.2 * random.random()
        light = np.where(np.hypot(x - cx, y - cy) < r, light + random.normal(), light)
    colours = np.stack([light + 0.3 * tint, light, light - 0.3 * tint], axis=-1)
    return Image.fromarray(np.clip(128 + 45 * colours, 0, 255).astype(np.uint8))


def packaged(count: int) -> Iterator[Image.Image]:
    """Pictures of the packaged domain `emoji`, 500 pixels high, on white."""
    domain = source("emoji")
    items = domain.items(assets.fetch(domain.assets, assets.cache_folder(None)))
    for item in items[:: len(items) // (count + 1)]:
        yield Image.fromarray(images.render(item, 500)).crop((0, 50, 500, 450))


def encoded(image: Image.Image, random: np.random.Generator) -> bytes:
    """A JPEG as cameras and web sites write them."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=int(random.integers(80, 96)))
    return out.getvalue()


if __name__ == "__main__":
    main()
