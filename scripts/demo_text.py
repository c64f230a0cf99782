"""Make `data-manifests/demo/sqlite-docs.jsonl`, the text of the demo, from SQLite's documentation.

The documentation is in the public domain (see data-manifests/demo/NOTICE.md). Its HTML comes with
Debian's package:

    apt-get download sqlite3-doc && dpkg-deb -x sqlite3-doc_*.deb pages
    python3 scripts/demo_text.py pages/usr/share/doc/sqlite3 data-manifests/demo/sqlite-docs.jsonl

Standard library only; the same pages give the same bytes. The file in the project was made from
version 3.40.1-2+deb12u2.
"""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

# A page longer than this is cut at the next paragraph, so that no page rules the mixture.
PAGE_CHARACTERS = 9_000
# Shorter pages are link lists and stubs.
LEAST_CHARACTERS = 2_500
# Not prose about SQLite, or not all of it written by its authors.
LEFT_OUT = re.compile(
    r"^(doc_.*|keyword_index|sitemap|requirements|index|docs|capi3ref|c_interface|lang|syntax|syntaxdiagrams|vtablist"
    r"|changes|chronology|news|oldnews|download|doclist|books|crew|support|prosupport|consortium.*|codeofconduct"
    r"|codeofethics|cli|copyright.*|pressrelease.*|famous|mostdeployed|cves|th3|hp1|locrsf|speed|rescode|opcode)$"
)
# Stand for spaces and line ends of preformatted text; no page has them.
HIDDEN_SPACE, HIDDEN_LINE = "\x01", "\x02"
# Elements whose text is no text of the page.
SILENT = {"script", "style", "svg", "title", "head", "button"}
# Elements that begin and end a line.
BLOCKS = {
    "p", "div", "ul", "ol", "li", "dl", "dt", "dd", "table", "tr", "pre", "blockquote", "br", "hr", "center",
    "h1", "h2", "h3", "h4", "h5",
}  # fmt: skip


class Page(HTMLParser):
    """Collects the text of one page in `parts`; `\\n\\n` between paragraphs."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts = []
        self.silent = 0  # depth inside silent elements
        self.frame = 0  # depth of divs inside the page's navigation
        self.pre = 0

    def handle_starttag(self, tag, attributes):
        if self.frame and tag == "div":
            self.frame += 1
        elif tag == "div" and dict(attributes).get("class") in ("nosearch", "toc", "fancy_toc", "imgcontainer"):
            self.frame = 1
        if tag in SILENT:
            self.silent += 1
        if tag == "pre":
            self.pre += 1
        if tag in BLOCKS:
            self.parts.append("\n" if tag in ("li", "br", "tr", "dd") else "\n\n")
        if tag in ("td", "th"):
            self.parts.append(" ")

    def handle_endtag(self, tag):
        if self.frame and tag == "div":
            self.frame -= 1
        if tag in SILENT:
            self.silent = max(0, self.silent - 1)
        if tag == "pre":
            self.pre = max(0, self.pre - 1)
        if tag in ("p", "pre", "ul", "ol", "table", "blockquote", "h1", "h2", "h3", "h4", "h5"):
            self.parts.append("\n\n")

    def handle_data(self, data):
        if not (self.silent or self.frame):
            if self.pre:
                # Its spaces and lines are kept: hidden from the cleaning below.
                self.parts.append(data.expandtabs(4).replace(" ", HIDDEN_SPACE).replace("\n", HIDDEN_LINE))
            else:
                self.parts.append(re.sub(r"\s+", " ", data))


def text_of(html):
    page = Page()
    page.feed(html)
    page.close()
    text = "".join(page.parts).replace("\u00a0", " ")
    text = re.sub(r" *\n *", "\n", re.sub(r" +", " ", text))
    text = text.replace(HIDDEN_SPACE, " ").replace(HIDDEN_LINE, "\n")
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r" +\n", "\n", text))
    text = re.sub(r"\s*This page last modified on .*$", "", text, flags=re.S)
    return text.strip()


def shortened(text):
    if len(text) <= PAGE_CHARACTERS:
        return text
    end = text.find("\n\n", PAGE_CHARACTERS)
    return text if end < 0 else text[:end]


def main():
    pages, out = Path(sys.argv[1]), Path(sys.argv[2])
    lines, seen = [], set()
    for path in sorted(pages.glob("*.html")):
        if LEFT_OUT.match(path.stem):
            continue
        text = shortened(text_of(path.read_text(encoding="utf-8")))
        # One page is there under two names.
        if len(text) >= LEAST_CHARACTERS and text not in seen:
            seen.add(text)
            lines.append(json.dumps({"page": path.name, "text": text}, ensure_ascii=False))
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} pages, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
