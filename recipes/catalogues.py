"""Read text in many languages out of the gettext catalogues in Debian packages.

A catalogue pairs each English message with its translation, and leaves an untranslated message out. So the language
of every text is known from the file it lies in, which plain documents in translation do not grant: they keep English
wherever the translator has not been.
"""

import gettext
import hashlib
import html
import io
import re
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LANGUAGES = (
    "cs", "da", "de", "el", "en", "es", "fi", "fr", "hu", "it", "ja",
    "ko", "nl", "pl", "pt", "ro", "ru", "sv", "tr", "uk", "zh",
)  # fmt: skip

PACKAGES = {
    "apt": "2.6.2",
    "aptitude-common": "0.8.13-5",
    "coreutils": "9.1-1",
    "dpkg": "1.21.23",
    "evolution-common": "3.46.4-2+deb12u1",
    "freeciv-data": "3.0.6-1+deb12u1",
    "gettext": "0.21-12",
    "gnucash-common": "1:4.13-1",
    "gnupg-l10n": "2.2.40-1.1+deb12u2",
    "gramps": "5.1.5-1",
    "homebank-data": "5.6.2-1",
    "pidgin-data": "2.14.12-1",
    "wesnoth-1.16-did": "1:1.16.9-1",
    "wesnoth-1.16-dm": "1:1.16.9-1",
    "wesnoth-1.16-dw": "1:1.16.9-1",
    "wesnoth-1.16-ei": "1:1.16.9-1",
    "wesnoth-1.16-httt": "1:1.16.9-1",
    "wesnoth-1.16-l": "1:1.16.9-1",
    "wesnoth-1.16-low": "1:1.16.9-1",
    "wesnoth-1.16-nr": "1:1.16.9-1",
    "wesnoth-1.16-sota": "1:1.16.9-1",
    "wesnoth-1.16-sotbe": "1:1.16.9-1",
    "wesnoth-1.16-trow": "1:1.16.9-1",
    "wesnoth-1.16-tsg": "1:1.16.9-1",
    "wesnoth-1.16-ttb": "1:1.16.9-1",
    "wesnoth-1.16-utbs": "1:1.16.9-1",
    "wget": "1.21.3-1+deb12u1",
}
"""Package to version, of Debian 12. Each is under the GPL or LGPL in a version that the GPL 3 may take in."""

MIN_LETTERS = 8
MAX_CHARACTERS = 300
FINGERPRINT_LETTERS = 40

_CATALOGUE = re.compile(r"/locale/(?P<locale>[^/@]+)/LC_MESSAGES/(?P<domain>[^/]+)\.mo$")
# What a message holds besides language: a context before "^" or "|", markup, addresses, format directives,
# placeholders, escapes, options, words with digits, paths, quotes left empty.
_NOISE = (
    re.compile(r"^[^\s^|]{0,40}(?: [^\s^|]{1,20}){0,3}[|^]"),
    re.compile(r"<[^<>]{1,200}>"),
    re.compile(r"\b\w+://\S+|\S+@\S+"),
    re.compile(r"%(?:\([^)]*\)|\{[^}]*\})?[-+ #0]*\d*(?:\$[-+#0]*\d*)?(?:\.\d+)?(?:h|l|z|j)*[A-Za-z%]"),
    re.compile(r"\$\([^)]*\)|\$\{[^}]*\}|\$\|?\w+|\{[^{}]*\}"),
    re.compile(r"\\[a-z]|[\\*#~`|]"),
    re.compile(r"(?<!\S)[\[(\"'«„“]*--?[A-Za-z]\S*"),
    re.compile(r"\S*\d\S*"),
    re.compile(r"\S*[/=]\S*"),
    re.compile(r"[\"'“”„«‹‘‚]\s*[\"'“”»›’]"),
)
_MNEMONIC = re.compile(r"[_&]")
_PARAGRAPH = re.compile(r"\n\s*\n|(?<=[.!?])\n|\n(?=\s*[-*•])")
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])")
_LATIN = re.compile(r"[A-Za-zÀ-ɏẞ]")
_SCRIPTS = {
    "el": re.compile(r"[Ͱ-Ͽἀ-῿]"),
    "ja": re.compile(r"[぀-ヿ一-鿿]"),
    "ko": re.compile(r"[가-힣]"),
    "ru": re.compile(r"[Ѐ-ӿ]"),
    "uk": re.compile(r"[Ѐ-ӿ]"),
    "zh": re.compile(r"[一-鿿]"),
}
_KANA = re.compile(r"[぀-ヿ]")


@dataclass(frozen=True, slots=True)
class Text:
    """A cleaned piece of one message: at most `MAX_CHARACTERS`, one line."""

    catalogue: str
    language: str
    text: str


def fetch(folder: Path) -> list[Path]:
    """Download the packages that the folder lacks, install none; their paths in a fixed order.

    Raises:
        subprocess.CalledProcessError: a package of that version is not offered any more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, version in PACKAGES.items():
        pattern = f"{name}_{version.replace(':', '%3a')}_*.deb"
        if not any(folder.glob(pattern)):
            subprocess.run(["apt-get", "download", "--quiet", f"{name}={version}"], cwd=folder, check=True)
        paths.append(next(folder.glob(pattern)))
    return paths


def read(packages: Iterable[Path]) -> list[Text]:
    """All usable texts of the packages, near-duplicates removed, in an order that depends on the packages alone."""
    texts = {text for package in packages for text in _package_texts(package)}
    return _without_duplicates(sorted(texts, key=_shuffle_key))


def fingerprint(text: str) -> str:
    """The first letters without case, spaces, digits and punctuation: equal for near-duplicates."""
    letters = (character for character in text.casefold() if character.isalpha())
    return "".join(letters)[:FINGERPRINT_LETTERS]


def _package_texts(package: Path) -> Iterator[Text]:
    archive = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files:
            found = _CATALOGUE.search(member.name)
            content = files.extractfile(member) if found else None
            if found and content is not None:
                language = found["locale"].partition("_")[0]
                yield from _catalogue_texts(found["domain"], language, content.read())


def _catalogue_texts(domain: str, language: str, content: bytes) -> Iterator[Text]:
    if language not in LANGUAGES or language == "en":
        return
    for original, translation in _messages(content):
        yield from _texts(domain, "en", original)
        # A translation that shares most of its words with the original is a list of names or was left in English.
        if language in _SCRIPTS or _shared_words(original, translation) < 0.4:
            yield from _texts(domain, language, translation)


def _messages(content: bytes) -> Iterator[tuple[str, str]]:
    try:
        translations = gettext.GNUTranslations(io.BytesIO(content))
    except UnicodeDecodeError:  # a catalogue in an encoding other than UTF-8 whose header is not ASCII
        return
    # The public interface looks messages up one by one; only this attribute lists them.
    catalog: dict[str | tuple[str, int], str] = translations._catalog  # type: ignore[attr-defined]
    for key, translation in catalog.items():
        original = key[0] if isinstance(key, tuple) else key
        if original and translation and original != translation:
            yield original.rpartition("\x04")[2], translation


def _texts(domain: str, language: str, message: str) -> Iterator[Text]:
    for paragraph in _PARAGRAPH.split(message):
        for piece in _pieces(clean(paragraph)):
            if _is_in_script(piece, language):
                yield Text(domain, language, piece)


@cache  # the English side comes once per language
def clean(paragraph: str) -> str:
    """The paragraph's language alone: markup, directives, options and paths removed, on one line."""
    # A mnemonic's mark stands inside a word, which must stay whole.
    paragraph = _MNEMONIC.sub("", html.unescape(paragraph))
    for pattern in _NOISE:
        paragraph = pattern.sub(" ", paragraph)
    return re.sub(r"\s+([,.;:!?])", r"\1", " ".join(paragraph.split())).strip(" ,;:-()[]\"'“”„«»")


def _pieces(text: str) -> Iterator[str]:
    """The text cut at ends of sentences into pieces of at most `MAX_CHARACTERS`."""
    piece = ""
    for sentence in _SENTENCE_END.split(text):
        if piece and len(piece) + len(sentence) >= MAX_CHARACTERS:
            yield piece
            piece = ""
        gap = "" if piece.endswith(("。", "！", "？")) else " "
        piece = f"{piece}{gap}{sentence}".strip()[:MAX_CHARACTERS]
    yield piece


def _is_in_script(text: str, language: str) -> bool:
    letters = sum(character.isalpha() for character in text)
    if letters < MIN_LETTERS or letters < 0.6 * len(text):
        return False
    native = len(_SCRIPTS.get(language, _LATIN).findall(text))
    if language in ("ja", "zh") and bool(_KANA.search(text)) != (language == "ja"):
        return False
    return native >= (0.7 if language in _SCRIPTS else 0.98) * letters


def _shared_words(original: str, translation: str) -> float:
    known = set(re.findall(r"\w+", original.casefold()))
    words = re.findall(r"\w+", translation.casefold())
    return sum(word in known for word in words) / len(words) if words else 1.0


def _shuffle_key(text: Text) -> bytes:
    return hashlib.sha256(f"{text.catalogue}\0{text.language}\0{text.text}".encode()).digest()


def _without_duplicates(texts: list[Text]) -> list[Text]:
    """One text per fingerprint; none where two languages share the fingerprint."""
    languages = {(fingerprint(text.text), text.language) for text in texts}
    shared = Counter(mark for mark, _ in languages)
    seen: set[str] = set()
    kept = []
    for text in texts:
        mark = fingerprint(text.text)
        if mark not in seen and shared[mark] == 1:
            kept.append(text)
        seen.add(mark)
    return kept
