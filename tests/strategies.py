"""Texts for the layout tests: a readable notation for hand-written ones, hypothesis strategies for random ones."""

from dataclasses import dataclass

from hypothesis import strategies as st

TAGS = (
    "<Think>",
    "</Think>",
    "<Parallel>",
    "</Parallel>",
    "<Goal>",
    "</Goal>",
    "<Outline>",
    "</Outline>",
    "<Path>",
    "</Path>",
    "<Conclusion>",
    "</Conclusion>",
)
#: Ids 0..11 are the tags, 12 the newline (written `_`), then what labels are made of, then words of one letter.
token_ids: dict[str, int] = {tag: token_id for token_id, tag in enumerate(TAGS)}
NEWLINE = len(TAGS)
label_ids: dict[str, int] = {piece: NEWLINE + 1 + i for i, piece in enumerate([*"0123456789", ".", ":", "10", "12"])}
_LETTERS = {letter: NEWLINE + 1 + len(label_ids) + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
VOCABULARY: dict[str, int] = {**token_ids, "_": NEWLINE, **label_ids, **_LETTERS}

MAX_TOKENS = 110
# Blocks in one stretch of text by depth, and paths of a block outside and inside another: the first is the simplest.
_BLOCKS_AT_DEPTH = ((1, 2, 0, 3), (0, 1, 1, 2), (0, 1, 1), (0, 1, 1), (0,))
_PATHS_AT_DEPTH = ((2, 1, 3, 4), (1, 2, 1, 2, 3, 4))

plain = st.integers(NEWLINE, max(VOCABULARY.values()))
_BLOCK_TAGS = ("<Parallel>", "</Parallel>", "<Goal>", "</Goal>", "<Path>", "</Path>", "<Conclusion>", "</Conclusion>")
# `<Path>` and `<Parallel>` twice: without paths being read there is little to get wrong.
_soup_tag = st.sampled_from([token_ids[tag] for tag in (*_BLOCK_TAGS, "<Path>", "<Path>", "<Parallel>", *TAGS)])


def encode(text: str) -> list[int]:
    """Ids of a text written as words between blanks: tags, `_` for a newline, label pieces, single letters."""
    return [VOCABULARY[word] for word in text.split()]


@dataclass(frozen=True)
class Sample:
    """Token ids, and the starts of the packed documents (`None`: one document)."""

    ids: list[int]
    starts: list[int] | None = None


class _TreeWriter:
    """Writes one well-formed document of at most `room` tokens; tags are paid for before a block opens."""

    def __init__(self, draw: st.DrawFn, room: int) -> None:
        self.draw = draw
        self.room = room
        self.ids: list[int] = []
        self.separated = draw(st.booleans())
        self.wordy = draw(st.booleans())

    def tag(self, name: str) -> None:
        self.ids.append(token_ids[name])

    def spend(self, ids: list[int]) -> None:
        ids = ids[: self.room]
        self.room -= len(ids)
        self.ids += ids

    def gap(self) -> None:
        if self.separated:
            self.spend([NEWLINE])
        if self.wordy:
            self.spend(self.draw(st.lists(plain, max_size=1)))

    def words(self) -> None:
        self.spend(self.draw(st.lists(plain, max_size=3)))

    def document(self) -> None:
        if self.room >= 2 and self.draw(st.booleans()):
            self.room -= 2
            self.tag("<Think>")
            self.text(0)
            self.tag("</Think>")
            self.words()
        else:
            self.text(0)

    def text(self, depth: int) -> None:
        """Words with whole blocks between them."""
        self.words()
        for _ in range(self.draw(st.sampled_from(_BLOCKS_AT_DEPTH[depth]))):
            paths = self.draw(st.sampled_from(_PATHS_AT_DEPTH[min(depth, 1)]))
            cost = 6 + 4 * paths
            if cost <= self.room:
                self.room -= cost
                self.block(paths, depth)
                self.words()

    def block(self, paths: int, depth: int) -> None:
        self.tag("<Parallel>")
        self.gap()
        self.tag("<Goal>")
        self.gap()
        for _ in range(paths):
            self.tag("<Outline>")
            self.words()
            self.tag("</Outline>")
            self.gap()
        self.tag("</Goal>")
        self.gap()
        for _ in range(paths):
            self.tag("<Path>")
            self.text(depth + 1)
            self.tag("</Path>")
            self.gap()
        self.tag("<Conclusion>")
        self.text(depth + 1)
        self.tag("</Conclusion>")
        self.gap()
        self.tag("</Parallel>")


@st.composite
def trees(draw: st.DrawFn, max_tokens: int = MAX_TOKENS) -> Sample:
    """Well-formed documents: up to four levels, consecutive and nested blocks (in paths and in conclusions), one to
    four paths, with and without separators, plain text everywhere."""
    writer = _TreeWriter(draw, max_tokens)
    writer.document()
    return Sample(writer.ids)


@st.composite
def truncated(draw: st.DrawFn, samples: st.SearchStrategy[Sample]) -> Sample:
    """A sample cut off anywhere."""
    sample = draw(samples)
    length = len(sample.ids) - draw(st.integers(0, len(sample.ids)))
    starts = None if sample.starts is None else [start for start in sample.starts if start < length]
    return Sample(sample.ids[:length], starts)


@st.composite
def edited(draw: st.DrawFn, max_tokens: int = MAX_TOKENS) -> Sample:
    """A tree in which a few tokens were dropped, replaced or doubled, mostly tags."""
    ids = list(draw(trees(max_tokens)).ids)
    for _ in range(draw(st.integers(1, 4))):
        tags = [index for index, token_id in enumerate(ids) if token_id < NEWLINE]
        index = draw(st.sampled_from(tags)) if tags else len(ids)
        replacement = draw(st.lists(st.one_of(_soup_tag, plain), max_size=2))
        ids[index : index + draw(st.integers(0, 1))] = replacement
    return Sample(ids)


@st.composite
def permuted(draw: st.DrawFn, max_tokens: int = MAX_TOKENS // 2) -> Sample:
    """A tree whose tags changed places with each other."""
    ids = list(draw(trees(max_tokens)).ids)
    places = [index for index, token_id in enumerate(ids) if token_id < NEWLINE]
    for place, token_id in zip(places, draw(st.permutations([ids[place] for place in places])), strict=True):
        ids[place] = token_id
    return Sample(ids)


def any_length(elements: st.SearchStrategy[int], longest: int) -> st.SearchStrategy[list[int]]:
    """Lists of every length alike; `st.lists` by itself prefers short ones."""
    return st.integers(0, longest).flatmap(lambda size: st.lists(elements, min_size=size, max_size=size))


def soup(max_tokens: int = MAX_TOKENS // 2) -> st.SearchStrategy[Sample]:
    """Tags and plain tokens in no order at all."""
    return any_length(st.one_of(_soup_tag, _soup_tag, plain), max_tokens).map(Sample)


def skeleton(max_tokens: int = MAX_TOKENS // 2) -> st.SearchStrategy[Sample]:
    """The tags that open and close branches, in no order: what happens after a reduce, again and again."""
    tags = ("<Path>", "<Path>", "<Parallel>", "<Conclusion>", "</Parallel>")
    return any_length(st.sampled_from([token_ids[tag] for tag in tags]), max_tokens).map(Sample)


def shuffled(max_tokens: int = MAX_TOKENS) -> st.SearchStrategy[Sample]:
    """Malformed documents of every kind."""
    return st.one_of(edited(max_tokens), permuted(max_tokens // 2), soup(max_tokens // 2), skeleton(max_tokens // 2))


@st.composite
def packed(draw: st.DrawFn, max_document: int = 32) -> Sample:
    """Two to four documents of any kind in one sequence, with their starts (0 given or implied)."""
    document = st.one_of(trees(max_document), truncated(trees(max_document)), shuffled(max_document))
    ids: list[int] = []
    starts: list[int] = []
    for _ in range(draw(st.integers(2, 4))):
        part = draw(document).ids
        if part:
            starts.append(len(ids))
            ids += part
    if draw(st.booleans()):
        starts = [start for start in starts if start]
    return Sample(ids, starts)
