#!/usr/bin/env python3
"""Documents that are no prose, as FOLDER/records.jsonl: lists, tables, logs, settings, identifiers, chains of names.

    python3 scripts/records_text.py [FOLDER] [--documents 300] [--file records.jsonl]      # data/ if absent; reads FOLDER/manuals.jsonl for words

A mapper that has seen manuals alone ranks badly in such text. Every document has two to five parts of random kinds, 16,000
to 40,000 characters in all. Nothing is downloaded and nothing depends on the clock: words come from the manuals, the rest
from a generator with a fixed seed. The forms are common ones and not those of a benchmark's prompts.
"""
import argparse
import collections
import json
import os
import random
import re
import string

PARTS = []


def part(function):
    """Registers a kind of text: a function of (random generator, words, characters wanted) to lines."""
    PARTS.append(function)
    return function


def until(size, line):
    """Lines of `line()` with `size` characters or slightly more."""
    lines, total = [], 0
    while total < size:
        lines.append(line(len(lines)))
        total += len(lines[-1]) + 1
    return lines


def name(r, words, parts=2):
    return " ".join(r.choice(words).capitalize() for _ in range(parts))


def code(r):
    """An identifier in one of the usual forms."""
    digits = r.choice([8, 16, 40])
    return r.choice([
        lambda: str(r.randrange(10 ** r.randint(3, 9))),
        lambda: "%08x-%04x-%04x-%04x-%012x" % tuple(r.getrandbits(b) for b in (32, 16, 16, 16, 48)),
        lambda: "".join(r.choices(string.ascii_uppercase + string.digits, k=r.randint(5, 10))),
        lambda: f"{r.choice(string.ascii_uppercase)}{r.randrange(100, 1000)}-{r.randrange(10, 100)}",
        lambda: "%0*x" % (digits, r.getrandbits(4 * digits)),
    ])()


def skewed(r, items):
    """Draws of `items` in which a few are frequent: the n-th with a chance of n to a random power between -2 and 0."""
    power = r.uniform(0, 2)
    weights = [(n + 1) ** -power for n in range(len(items))]
    return lambda: r.choices(items, weights)[0]


@part
def items(r, words, size):
    """A numbered or marked list of words."""
    draw = skewed(r, r.sample(words, r.randint(40, 400)))
    mark = r.choice([lambda n: f"{n + 1}. ", lambda n: "- ", lambda n: f"({n + 1}) ", lambda n: ""])
    if r.random() < 0.5:
        return until(size, lambda n: mark(n) + draw())
    return [r.choice([" ", ", ", "; "]).join(until(size, lambda n: mark(n) + draw()))]


@part
def invented(r, words, size):
    """A stream of words that no language has, some of them frequent."""
    vocabulary = ["".join(r.choices(string.ascii_lowercase, k=r.randint(3, 8))) for _ in range(r.randint(50, 500))]
    draw = skewed(r, vocabulary)
    return until(size, lambda n: " ".join(draw() for _ in range(r.randint(8, 20))) + r.choice([".", "", " ..."]))


@part
def table(r, words, size):
    """Rows of a table: names, codes, dates and amounts."""
    columns = r.sample([
        ("name", lambda: name(r, words)), ("id", lambda: code(r)), ("amount", lambda: f"{r.uniform(0, 9999):.2f}"),
        ("date", lambda: f"{r.randint(1980, 2030)}-{r.randint(1, 12):02}-{r.randint(1, 28):02}"), ("place", lambda: name(r, words, 1)),
        ("state", lambda: r.choice(["open", "closed", "late", "void"])), ("count", lambda: str(r.randrange(500))),
    ], r.randint(3, 6))
    separator = r.choice([",", "\t", " | ", "; "])
    return [separator.join(c for c, _ in columns)] + until(size, lambda n: separator.join(f() for _, f in columns))


@part
def objects(r, words, size):
    """JSON objects, one a line."""
    keys = r.sample(words, r.randint(3, 7))
    value = lambda: r.choice([lambda: code(r), lambda: r.randrange(100000), lambda: name(r, words), lambda: r.random() < 0.5,
                              lambda: [r.choice(words) for _ in range(r.randint(1, 4))]])()
    return until(size, lambda n: json.dumps({k: value() for k in keys}))


@part
def log(r, words, size):
    """Lines of a log."""
    seconds, hosts = r.randrange(86400), [f"{r.choice(words)}-{r.randrange(40)}" for _ in range(r.randint(2, 9))]
    events = [" ".join(r.sample(words, r.randint(2, 6))) for _ in range(r.randint(5, 30))]

    def line(n):
        nonlocal seconds
        seconds = (seconds + r.randrange(90)) % 86400
        clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        return f"{clock} {r.choice(['INFO', 'WARN', 'ERROR', 'DEBUG'])} {r.choice(hosts)} {r.choice(events)} id={code(r)}"
    return until(size, line)


@part
def settings(r, words, size):
    """Settings with sections."""
    def line(n):
        if r.random() < 0.1:
            return f"\n[{r.choice(words)}.{r.choice(words)}]"
        return f"{r.choice(words)}_{r.choice(words)} = {r.choice([code(r), json.dumps(name(r, words)), str(r.random() < 0.5).lower()])}"
    return until(size, line)


@part
def statements(r, words, size):
    """Sentences that each say one thing of one subject, several times of the same subject."""
    subjects = [" ".join(r.sample(words, 2)) for _ in range(r.randint(20, 200))]
    forms = ["{s} is registered under {c}.", "Ask for {c} when you call about {s}.", "For {s}, we noted {c} on that day.",
             "{c} belongs to {s}.", "The entry of {s} reads {c}; {o} has another.", "Since then {s} has been part of {o}."]
    chosen = r.sample(forms, r.randint(1, 4))
    sentence = lambda n: r.choice(chosen).format(s=r.choice(subjects), o=r.choice(subjects), c=code(r))
    return until(size, lambda n: " ".join(sentence(n) for _ in range(r.randint(1, 4))))


@part
def chains(r, words, size):
    """Names that take their values from earlier names, among lines that do something else."""
    names = []

    def line(n):
        new = r.choice([lambda: "".join(r.choices(string.ascii_uppercase, k=r.randint(2, 6))), lambda: f"{r.choice(words)}_{r.randrange(90)}"])()
        kind = r.random()
        if kind < 0.3 or not names:
            names.append(new)
            return f"{new} := {r.randrange(100000)}"
        if kind < 0.6:
            old = r.choice(names)
            names.append(new)
            return r.choice(["{n} := {o}", "let {n} = {o};", "copy {o} to {n}", "{n} gets the value of {o}"]).format(n=new, o=old)
        return " ".join(r.choice(words) for _ in range(r.randint(6, 14))) + "."
    return until(size, line)


@part
def glossary(r, words, size):
    """Terms with a short text each."""
    return until(size, lambda n: f"{name(r, words, r.randint(1, 2))}: {' '.join(r.choice(words) for _ in range(r.randint(5, 25)))}.")


def vocabulary(path):
    """The 6,000 most frequent words of four to ten letters."""
    counts = collections.Counter()
    with open(path, encoding="utf-8") as file:
        for line in file:
            counts.update(re.findall(r"\b[a-z]{4,10}\b", json.loads(line)["text"]))
    return [w for w, _ in sorted(counts.items(), key=lambda c: (-c[1], c[0]))[:6000]]


def document(r, words):
    size, count = r.randint(16_000, 40_000), r.randint(2, 5)
    parts = []
    for make in (r.choice(PARTS) for _ in range(count)):
        parts.append(name(r, words, r.randint(1, 4)) + "\n\n" + "\n".join(make(r, words, size // count)))
    return "\n\n".join(parts)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", nargs="?", default="data")
    arguments.add_argument("--documents", type=int, default=300)
    arguments.add_argument("--file", default="records.jsonl", help="its name in the folder")
    asked = arguments.parse_args()
    words = vocabulary(os.path.join(asked.folder, "manuals.jsonl"))
    r, path = random.Random(7), os.path.join(asked.folder, asked.file)
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        for _ in range(asked.documents):
            file.write(json.dumps({"text": document(r, words), "kind": "records"}, ensure_ascii=False) + "\n")
    os.rename(path + ".tmp", path)
    print(f"{path}: {asked.documents} documents, {os.path.getsize(path)} bytes")


if __name__ == "__main__":
    main()
