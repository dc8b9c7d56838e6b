"""Molecules: structural formulas drawn by RDKit, captioned by the compound's name ("9-ethyladenine")."""

import re
from pathlib import Path

from pivotjax.data.assets import ASSETS, members
from pivotjax.data.sources.base import Item, Source
from pivotjax.errors import InputError

_TABLE = "chemicals/Identifiers/chemical identifiers pubchem large"
_SMILES, _INCHI_KEY, _NAME = 4, 6, 8  # columns of the table
_SKELETON = 14  # letters of an InChI key that name the connectivity, without stereochemistry and isotopes
_LONGEST_SMILES = 60
_CARBON = re.compile("C(?![a-z])")
_WORD = re.compile("[a-z]{4}")
_ODD = re.compile(r"\d{3}|[a-z]\d+[a-z]|, ")  # registry numbers, codes, names turned round ("silane, trimethyl-")


def items(files: dict[str, Path]) -> list[Item]:
    """One connected organic molecule a structure, small enough to be drawn readably, with a name that reads as one.

    The concept is the connectivity (first block of the InChI key): stereoisomers and isotopes are drawn much alike.
    """
    rows = members(files["chemicals"], _TABLE, ".tsv")[""].decode().splitlines()
    found: dict[str, Item] = {}
    for row in rows:
        cells = row.split("\t")
        smiles, skeleton, name = cells[_SMILES], cells[_INCHI_KEY][:_SKELETON], cells[_NAME].strip().lower()
        if skeleton not in found and _drawable(smiles) and _readable(name):
            found[skeleton] = Item(f"molecules/{skeleton}", f"molecule {skeleton}", name, smiles.encode(), "smiles")
    return list(found.values())


def _drawable(smiles: str) -> bool:
    return "." not in smiles and bool(_CARBON.search(smiles)) and len(smiles) <= _LONGEST_SMILES


def _readable(name: str) -> bool:
    return bool(_WORD.search(name)) and not _ODD.search(name)


def draw(smiles: str, size: int) -> bytes:
    """PNG of `size` x `size` pixels; ValueError where the SMILES is invalid, InputError where RDKit is missing."""
    try:
        from rdkit import Chem, rdBase
        from rdkit.Chem.Draw import rdMolDraw2D
    except ImportError as error:
        raise InputError('the molecules domain needs RDKit: pip install "pivotjax[demo]"') from error
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    if molecule is None:
        raise ValueError(f"not a valid SMILES: {smiles}")
    canvas = rdMolDraw2D.MolDraw2DCairo(size, size)
    rdMolDraw2D.PrepareAndDrawMolecule(canvas, molecule)
    canvas.FinishDrawing()
    return canvas.GetDrawingText()


SOURCE = Source(
    name="molecules",
    assets=("chemicals",),
    licence=ASSETS["chemicals"].licence,
    attribution=ASSETS["chemicals"].attribution,
    items=items,
)
