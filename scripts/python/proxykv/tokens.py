"""Tokens around a context: the chat template's, and those that make a model repeat it (crates/lm, crates/score)."""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

QUOTED_TOKENS = 8


def text_encoder(tokenizer):
    """A function from texts to ids as they are within a prompt.

    A SentencePiece tokenizer puts a blank before every text it is given, but none after another character.
    """
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        return encode

    def pieces(text: str) -> str:
        text = core.normalizer.normalize_str(text) if core.normalizer else text
        return "".join(p for p, _ in core.pre_tokenizer.pre_tokenize_str(text)) if core.pre_tokenizer else text

    for lead in ("", "\u0001", "\n", ".", "|"):
        pairs = (("a", "b"), ("a", " b"), ("a ", "b"), ("a\n", "b"))
        fits = all(pieces(a + b) == pieces(a) + pieces(lead + b).removeprefix(pieces(lead)) for a, b in pairs)
        ids = encode(lead)
        if fits and (not lead or all(encode(lead + x)[: len(ids)] == ids for x in ("a", " b", "1", "[", "\u00e9", "\u4eac"))):
            return lambda text: encode(lead + text)[len(ids) :]
    raise ValueError("the tokenizer reads a text as another one than its parts, which prompts are made of")


class Frame(NamedTuple):
    """Tokens around a user's text, by the chat template; without one the bos token, if there is one, as in kvpress."""

    prefix: list[int]
    switch: list[int]

    @classmethod
    def of(cls, tokenizer) -> Frame:
        prefix, switch = cls._texts(tokenizer)
        return cls(tokenizer.encode(prefix, add_special_tokens=False), text_encoder(tokenizer)(switch))

    @classmethod
    def hash(cls, tokenizer) -> str:
        """SHA-256 of the texts of prefix and switch, as an export names it."""
        return hashlib.sha256("\u0001".join(cls._texts(tokenizer)).encode()).hexdigest()

    @staticmethod
    def _texts(tokenizer) -> list[str]:
        if getattr(tokenizer, "chat_template", None) is None:
            return [tokenizer.bos_token or "", "\n"]
        mark = "\u0001"
        message = [{"role": "user", "content": mark}]
        options = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
        text = tokenizer.apply_chat_template(message, **options)
        if text.count(mark) != 1:
            raise ValueError("the chat template must render the text of a user's message once")
        return text.split(mark)


class Requests(NamedTuple):
    """What is fed to make a model repeat its context, scoring chunk by scoring chunk: token ids."""

    first: list[int]
    later: list[int]
    switch: list[int]
    chunk_tokens: int

    @classmethod
    def of(cls, tokenizer, label: dict) -> Requests:
        """By the section `label` of an export."""
        original, encode = label["preset"] == "original", text_encoder(tokenizer)
        later = "\n\nRepeat the part of the previous context exactly, starting with" + " " * original
        first, size = "\n\nRepeat the previous context exactly.", label["chunk_tokens"] or (2000 if original else 2048)
        return cls(encode(first), encode(later), Frame.of(tokenizer).switch, max(1, size))

    def chunks(self, context: int) -> list[tuple[int, int]]:
        """Begin and end of each scoring chunk of so many tokens; the last may be shorter."""
        return [(start, min(start + self.chunk_tokens, context)) for start in range(0, context, self.chunk_tokens)]

    def _quoted(self, start: int) -> int:
        return min(start, self.chunk_tokens, QUOTED_TOKENS)

    def before(self, start: int) -> int:
        """Tokens fed before the chunk at `start` itself."""
        return len(self.later if start else self.first) + self._quoted(start) + len(self.switch)

    def ids(self, context: list[int], start: int, end: int) -> list[int]:
        quote = context[start - self._quoted(start) : start]
        return (self.later if start else self.first) + quote + self.switch + context[start:end]


def vocab_hash(tokenizer) -> str:
    """SHA-256 of all tokens with their ids, as an export names it."""
    vocab = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    text = json.dumps(vocab, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
