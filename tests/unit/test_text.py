"""Texts to token ids: buckets, padding, masks, and tokenizers that misbehave."""

import json
import threading

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from appliance.errors import BackendError, InvalidManifest, InvalidRequest
from appliance.manifest import TextSection
from appliance.text import TextEncoder

WORDS = {"[pad]": 0, "[unk]": 1, "[cls]": 2, "[sep]": 3, "a": 4, "b": 5, "c": 6}


def tokenizer(has_specials: bool = False) -> bytes:
    made = Tokenizer(models.WordLevel(WORDS, unk_token="[unk]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if has_specials:
        made.post_processor = processors.TemplateProcessing(
            single="[cls] $A [sep]", special_tokens=[("[cls]", 2), ("[sep]", 3)]
        )
    return made.to_str().encode()


def encoder(content: bytes | None = None, **section) -> TextEncoder:
    settings = {"buckets": [4, 8], "max_tokens": 8, **section}
    return TextEncoder(TextSection(**settings), tokenizer() if content is None else content, "model")


def integers(content: bytes) -> list[int]:
    return list(memoryview(content).cast("q"))


def test_ids_and_mask_are_padded_to_the_smallest_bucket_that_holds_the_longest():
    tokens = encoder().encode([b"a b c", b"a"])
    assert tokens.length == 4
    assert integers(tokens.ids) == [4, 5, 6, 0, 4, 0, 0, 0]
    assert integers(tokens.mask) == [1, 1, 1, 0, 1, 0, 0, 0]
    assert encoder().encode([b"a b c a b"]).length == 8
    assert tokens.took_ns > 0


def test_the_padding_id_is_the_manifests():
    assert integers(encoder(pad_id=9).encode([b"a"]).ids) == [4, 9, 9, 9]


def test_longer_texts_are_cut_to_max_tokens():
    tokens = encoder(max_tokens=6).encode([b"a " * 100])
    assert tokens.length == 8
    assert integers(tokens.mask) == [1] * 6 + [0] * 2


def test_special_tokens_count_and_are_kept():
    tokens = encoder(tokenizer(has_specials=True), max_tokens=4).encode([b"a b c a b c"])
    assert integers(tokens.ids) == [2, 4, 5, 3]


def test_an_empty_text_is_padding_only():
    tokens = encoder().encode([b""])
    assert integers(tokens.mask) == [0, 0, 0, 0]


def test_unknown_words_nul_and_other_scripts_are_texts_like_any_other():
    tokens = encoder().encode(["Grüße 你好 \x00 a".encode()])
    assert integers(tokens.ids).count(4) == 1


def test_bytes_that_are_no_utf_8_are_refused_with_row_and_place():
    with pytest.raises(InvalidRequest, match="row 1: byte 2 is not UTF-8"):
        encoder().encode([b"a", b"ab\xff"])


def test_a_text_of_more_than_a_million_characters_is_refused():
    with pytest.raises(InvalidRequest, match="1048577 characters"):
        encoder().encode([b"a" * 1_048_577])


def test_views_and_bytearrays_are_texts_too():
    assert encoder().encode([memoryview(b"a b"), bytearray(b"c")]).length == 4


def test_threads_may_share_an_encoder():
    shared = encoder()
    results = {}

    def work(word: str) -> None:
        results[word] = {shared.encode([f"{word} {word}".encode()]).ids for _ in range(200)}

    threads = [threading.Thread(target=work, args=(word,)) for word in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for word, ids in results.items():
        assert [integers(each) for each in ids] == [[WORDS[word], WORDS[word], 0, 0]]


def document(**parts) -> bytes:
    model = {"type": "WordLevel", "vocab": WORDS, "unk_token": "[unk]"}
    return json.dumps({"version": "1.0", "model": model, **parts}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        tokenizer()[:-20],
        document(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        document(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        document(pre_tokenizer={"type": "FixedLength", "length": 0}),
        document(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[absent]"}),
    ],
    ids=["empty", "no model", "no text", "deep", "cut", "pattern", "panic at load", "panic at use", "no unknown token"],
)
def test_a_tokenizer_that_cannot_work_is_refused_at_the_load(content):
    """Also where its library panics, which is no Exception, and where only the first text would show it."""
    with pytest.raises(InvalidManifest, match="tokenizer of 'model'"):
        encoder(content)


def test_a_max_tokens_that_has_no_room_for_the_special_tokens_is_refused_at_the_load():
    """The library then gives up cutting, and no bucket would hold a long text."""
    with pytest.raises(InvalidManifest, match="max_tokens"):
        encoder(tokenizer(has_specials=True), max_tokens=1)


class Panic(BaseException):
    """What pyo3 makes of a Rust panic looks like this."""


def test_a_panic_while_a_text_is_tokenised_is_a_backend_error(monkeypatch):
    broken = encoder()

    class Broken:
        def encode_batch_fast(self, texts):
            raise Panic("index out of bounds")

    monkeypatch.setattr(broken, "_tokenizer", Broken())
    with pytest.raises(BackendError, match="cannot tokenise"):
        broken.encode([b"a"])
