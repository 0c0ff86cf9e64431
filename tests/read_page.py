"""An HTML page read back by the tests: its elements, its tables, what it would load."""

import re
from html.parser import HTMLParser

VOID = {"meta", "input", "br", "img", "link", "hr", "wbr", "image"}


class Page(HTMLParser):
    """Elements with their attributes, tables as text and full values, and what is not closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.wrong = [], [], []
        self.tables, self.text = {}, []
        self._rows = self._cell = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._rows = self.tables.setdefault(attributes.get("id", len(self.tables)), [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._cell = [attributes.get("data-value"), ""]
            self._rows[-1].append(self._cell)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.wrong.append((tag, self.open[-3:], self.getpos()))
        else:
            self.open.pop()
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data):
        self.text.append(data)
        if self._cell is not None:
            self._cell[1] += data

    def rows(self, identity):
        """The body of a table as a list of {column: (full value, text)}."""
        head, *rows = self.tables[identity]
        columns = [text for _, text in head]
        return [dict(zip(columns, map(tuple, row), strict=True)) for row in rows]

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def assert_loads_nothing(text, found):
    for tag, attributes in found.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form"), tag
        for key, value in attributes.items():
            if key in ("src", "href", "xlink:href", "data", "action", "srcset") and value:
                assert value.startswith(("#", "data:image/png;base64,")), (tag, key, value[:80])
            assert not key.startswith("on"), (tag, key)
    for address in re.findall(r"https?://[^\s\"'<>)]+", text):
        assert address in ("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink")
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a["href"][1:] for a in found.of("a")]
    for _, attributes in found.elements:
        for value in attributes.values():
            links += re.findall(r"url\(#([^)]+)\)", value or "")
    assert set(links) <= set(ids)
