"""Reads pages as a browser does, and what a model could write to get out of its place in one."""

from html.parser import HTMLParser

#: What a model could write to get out of its place in a page.
NASTY = (
    "<script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "'><img src=x onerror=alert(1)>",
    "</div></details></section>",
    "<!-- ",
    "]]>&amp;&lt;",
    "<Path",
    "word\r\n",
    "long" * 900,
    "été 😀 \u202e",
)
#: Elements without an end tag.
_VOID = {"meta", "br", "img", "input", "link"}
# What is written around the text of the model.
_AROUND = {"summary", "h4", "h1", "h2", "h3", "p", "ul", "style", "title", "svg", "dl", "nav", "footer"}


class Reader(HTMLParser):
    """Reads a page, and keeps the text of the model apart from what is written around it.

    Attributes:
        text (`str`): of the model.
        marks (`list[tuple[int, str]]`): problems, and how much of the text stands before each.
        elements (`list[tuple[str, dict]]`): every element with its attributes.
    """

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict]] = []
        self.text = ""
        self.marks: list[tuple[int, str]] = []
        self.elements: list[tuple[str, dict]] = []
        self.feed(page)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open[-1][0] == tag, (self.open[-3:], tag)
        self.open.pop()

    def handle_data(self, data):
        if any(attrs.get("class") == "mv-problem" for _, attrs in self.open):
            self.marks.append((len(self.text), data))
        elif not _AROUND & {tag for tag, _ in self.open}:
            self.text += data
