#!/usr/bin/env python3
"""Long documents for a pair of real models out of Debian's packages: `data/manuals.jsonl` and `data/modules.jsonl`.

    python3 scripts/manuals_text.py [FOLDER]      # data/ if absent; needs apt-get and dpkg, downloads about 90 MB

English pages of 14,000 to 60,000 characters from handbooks and manuals, and modules of Python's standard library of
14,000 to 200,000, cut after 40,000. The licences are those of the packages (/usr/share/doc/*/copyright in each):
read the documents, do not pass them on. What is made depends on the packages' versions alone.
"""
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
CODE = ["libpython3.11-stdlib"]
FILES = {"prose": "manuals.jsonl", "code": "modules.jsonl"}
# Characters of each kind: three quarters prose.
MOST = {"prose": 11_000_000, "code": 4_000_000}
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
    subprocess.run(["apt-get", "download", "-q", *packages], cwd=root, check=True, stdout=subprocess.DEVNULL)
    for package in sorted(glob.glob(f"{root}/*.deb")):
        subprocess.run(["dpkg", "-x", package, f"{root}/x"], check=True)
    return f"{root}/x"


def documents(root):
    prose, code = [], []
    manuals = unpacked(MANUALS, f"{root}/manuals")
    for path in files(manuals, (".html", ".xhtml")):
        if "index" in os.path.basename(path).lower() or TRANSLATED.search(path[len(manuals):]):
            continue
        text = page_text(open(path, encoding="utf-8", errors="ignore").read())
        if len(text) > 14_000:
            prose.append(text[:60_000])
    for path in files(unpacked(CODE, f"{root}/code"), (".py",)):
        if "test" in path:
            continue
        text = open(path, encoding="utf-8", errors="ignore").read()
        if 14_000 < len(text) < 200_000:
            code.append(text[:40_000])
    return {"prose": prose, "code": code}


def main():
    out = sys.argv[1] if len(sys.argv) > 1 else "data"
    os.makedirs(out, exist_ok=True)
    random.seed(7)
    seen = set()
    with tempfile.TemporaryDirectory() as root:
        for kind, texts in documents(root).items():
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
