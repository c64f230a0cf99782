#!/usr/bin/env python3
"""Long documents for a pair of real models out of Debian's packages: `data/manuals.jsonl` and `data/modules.jsonl`.

    python3 scripts/manuals_text.py [FOLDER]      # data/ if absent; needs apt-get and dpkg, downloads about 90 MB
    python3 scripts/manuals_text.py --chapters 90000 [FOLDER]      # instead `chapters.jsonl`, for contexts of 16,384 tokens
    python3 scripts/manuals_text.py --library [FOLDER]      # instead `library.jsonl`, for 10,000 contexts; downloads 230 MB

English pages of 14,000 to 60,000 characters from handbooks and manuals, and modules of Python's standard library of
14,000 to 200,000, cut after 40,000. A chapter is pages of one manual in their order, joined until they have the characters
asked for. The library is pages of 6,000 to 60,000 characters of other manuals, for training only. The licences are those of the packages (/usr/share/doc/*/copyright in each): read the documents, do not pass
them on. What is made depends on the packages' versions alone.
"""
import argparse
import glob
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from html.parser import HTMLParser

MANUALS = ["debian-handbook", "postgresql-doc-15", "python3.11-doc", "developers-reference", "debian-reference-en",
           "git-doc", "octave-doc", "maxima-doc", "erlang-doc"]
LIBRARY = ["openjdk-17-doc", "rust-doc", "ghc-doc", "python-sympy-doc", "python-pandas-doc", "python-scipy-doc", "python-django-doc",
           "cmake-doc", "sqlite3-doc", "apache2-doc", "lilypond-doc-html", "libboost1.81-doc", "gap-doc", "pari-doc", "ruby3.1-doc",
           "racket-doc"]
# Characters of one of these at most, so that no programming language's interface is most of the library.
LIBRARY_MOST = 8_000_000
CODE = ["libpython3.11-stdlib"]
FILES = {"prose": "manuals.jsonl", "code": "modules.jsonl", "chapters": "chapters.jsonl", "library": "library.jsonl"}
# Characters of each kind: three quarters prose.
MOST = {"prose": 11_000_000, "code": 4_000_000, "chapters": 40_000_000, "library": 60_000_000}
# Folders of translations, which are beside those of the English pages.
TRANSLATED = re.compile(r"/(?!en)[a-z]{2}(-[A-Z]{2})?/")


class Text(HTMLParser):
    """The text of a page, a line for each block."""

    HIDDEN = ("script", "style", "nav", "head")
    BLOCKS = ("p", "div", "li", "tr", "h1", "h2", "h3", "h4", "pre", "br", "dt", "dd", "section", "table")

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.hidden = [], 0

    def handle_starttag(self, tag, attrs):
        self.hidden += tag in self.HIDDEN
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        if tag in self.HIDDEN:
            self.hidden = max(0, self.hidden - 1)
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.hidden:
            self.parts.append(data)


def page_text(html):
    page = Text()
    page.feed(html)
    text = re.sub(r"[ \t]+\n", "\n", "".join(page.parts))
    return re.sub(r"[ \t]{2,}", " ", re.sub(r"\n{3,}", "\n\n", text)).strip()


def files(root, endings):
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.endswith(endings) and not os.path.islink(path):
                yield path


def unpacked(packages, root):
    os.makedirs(root)
    if subprocess.run(["apt-get", "download", "-q", *packages], cwd=root, stdout=subprocess.DEVNULL).returncode:
        sys.exit("error: apt-get could not download the packages\n\nhint: if its lists are old, run `apt-get update` as root, and this again")
    for package in sorted(glob.glob(f"{root}/*.deb")):
        subprocess.run(["dpkg", "-x", package, f"{root}/x"], check=True)
    return f"{root}/x"


def pages(root, packages):
    """Path and text of each English page, in the order of their paths."""
    manuals = unpacked(packages, f"{root}/{packages[0]}")
    for path in files(manuals, (".html", ".xhtml")):
        name = path[len(manuals):]
        if "index" not in os.path.basename(path).lower() and not TRANSLATED.search(name):
            yield name, page_text(open(path, encoding="utf-8", errors="ignore").read())


def modules(root):
    for path in files(unpacked(CODE, f"{root}/code"), (".py",)):
        text = open(path, encoding="utf-8", errors="ignore").read()
        if "test" not in path and 14_000 < len(text) < 200_000:
            yield text[:40_000]


def chapters(root, characters):
    """Pages of one folder, joined until they have so many characters; what is left of a folder is dropped."""
    folder, joined, seen = None, [], set()
    for name, text in pages(root, MANUALS):
        if os.path.dirname(name) != folder:
            folder, joined = os.path.dirname(name), []
        # Packages have some pages twice.
        if text[:500] in seen:
            continue
        seen.add(text[:500])
        joined.append(text)
        if sum(map(len, joined)) >= characters:
            yield "\n\n".join(joined)[:characters]
            joined = []


def library(root):
    for package in LIBRARY:
        texts = [text[:60_000] for _, text in pages(root, [package]) if len(text) > 6_000]
        random.shuffle(texts)
        size = 0
        for text in texts:
            size += len(text)
            if size > LIBRARY_MOST:
                break
            yield text


def documents(root, asked):
    if asked.chapters:
        return {"chapters": list(chapters(root, asked.chapters))}
    if asked.library:
        return {"library": list(library(root))}
    return {"prose": [text[:60_000] for _, text in pages(root, MANUALS) if len(text) > 14_000], "code": list(modules(root))}


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", nargs="?", default="data")
    arguments.add_argument("--chapters", type=int, metavar="CHARACTERS", help="join pages to documents of so many characters")
    arguments.add_argument("--library", action="store_true", help="many more manuals, which no evaluation reads")
    asked = arguments.parse_args()
    out = asked.folder
    os.makedirs(out, exist_ok=True)
    random.seed(7)
    seen = set()
    with tempfile.TemporaryDirectory() as root:
        for kind, texts in documents(root, asked).items():
            random.shuffle(texts)
            path, size, count = os.path.join(out, FILES[kind]), 0, 0
            with open(path + ".tmp", "w", encoding="utf-8") as file:
                for text in texts:
                    # Pages that packages have twice begin alike.
                    if text[:2000] in seen or size > MOST[kind]:
                        continue
                    seen.add(text[:2000])
                    size += len(text)
                    count += 1
                    file.write(json.dumps({"text": text, "kind": kind}, ensure_ascii=False) + "\n")
            os.rename(path + ".tmp", path)
            print(f"{path}: {count} documents, {os.path.getsize(path)} bytes")


if __name__ == "__main__":
    main()
