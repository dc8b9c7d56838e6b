"""What an image is of, in a form in which variants of one thing and different domains agree.

Splitting by concept is only as good as this normal form: two pictures of one thing must never land on both sides.
"""

import re
import unicodedata

# "medium-light skin tone" and the mirrored emoji; they change the drawing, not what it shows
_PHRASES = re.compile(r"(medium[ -]light|medium[ -]dark|light|medium|dark) skin tone|facing right")
_PEOPLE = frozenset(
    "person persons people man men woman women boy boys girl girls male males female females human humans adult "
    "gentleman lady guy".split()
)
_STYLES = frozenset("outline outlined variant filled".split())
_LITTLE = frozenset("a an the of with in on and".split())
_SAME = {
    "older": "old",
    "mrs": "santa",  # Mrs. Claus and Mx. Claus are Santa Claus of another gender
    "mx": "santa",
    "mermaid": "merperson",
    "merman": "merperson",
    "princess": "prince",
    "grey": "gray",
    "colour": "color",
}


def normalise(text: str) -> str:
    """The concept a caption or a file name stands for: its telling words, lower case, without accents, sorted.

    Words for gender, skin tone, the mirrored form and the drawing style go ("woman running: dark skin tone" and "man
    running" are both "running"; "account-outline" is "account"), little words and the order of words too ("down arrow"
    is "arrow down"). Of a name made of such words only, something stays: every plain person is "person".
    """
    plain = unicodedata.normalize("NFKD", text.lower().replace("’", "'")).encode("ascii", "ignore").decode()
    words = re.findall(r"[a-z0-9]+", _PHRASES.sub(" ", plain.replace("_", " ")).replace("'s ", " "))
    words = [_SAME.get(word, word) for word in words]
    telling = {word for word in words if word not in _PEOPLE and word not in _STYLES and word not in _LITTLE}
    if telling:
        return " ".join(sorted(telling))
    if _PEOPLE & set(words):
        return "person"
    return " ".join(sorted(set(words))) or text.strip().lower()
