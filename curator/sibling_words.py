"""Words that point from one path at another, which nobody in the path can see.

Each is a regular expression, read without regard to case and between word boundaries. They are few on purpose: a word
is here if it points at a sibling more often than not, so "above" is not, but "as above" is.
"""

#: What a part of a solution may be called.
_PART = r"(?:part|path|branch|outline|subtask|sub-step|step|case|attempt|approach|method|option|possibility|scenario)"
_DID = r"(?:did|do|saw|have seen|found|showed|shown|seen|computed|calculated|derived|mentioned|noted|discussed)"
_BEFORE = r"(?:above|before|earlier|previously)"

#: Wherever they stand in a path.
SIBLING_WORDS: tuple[str, ...] = (
    # Likeness to something that was said elsewhere.
    r"similarly",
    r"likewise",
    r"analogously",
    r"by analogy",
    r"in the same (?:way|manner|fashion)",
    r"by the same (?:argument|reasoning|method|logic|token|steps)",
    rf"(?:as|like) {_BEFORE}",
    rf"as (?:(?:we|i|was|is) )?{_DID} {_BEFORE}",
    rf"the same as (?:{_BEFORE}|(?:in )?the (?:other|previous|first|last))",
    # Siblings by number.
    r"(?:path|branch|outline|subtask|sub-step) \d+(?:\.\d+)*",
    rf"(?:in|from|of|as in|like|unlike|see|by|to|than|with|for) {_PART} \d+(?:\.\d+)*(?!\s*[=<>≤≥]| is )",
    # Siblings by place.
    rf"the (?:other|previous|preceding|earlier|former|latter) (?:two |three |few )?{_PART}(?:s|es)?",
    r"the other possibilities",
    r"(?:other|parallel|sibling) (?:paths?|branch|branches)",
)

#: At the very beginning of a path, where there is nothing of its own that they could follow, and numbering.
OPENING_WORDS: tuple[str, ...] = (
    r"alternatively",
    r"also",
    r"another (?:approach|method|way|attempt|case|possibility|option)",
    r"conversely",
    r"lastly",
    r"next,",
    r"on the other hand",
    r"secondly",
    r"thirdly",
    r"fourthly",
    r"(?:first|second|third|fourth),",
    rf"{_PART} (?:\d+(?:\.\d+)*|[ivx]+)[:.)]",
    r"\(?\d{1,2}[.)](?!\d)",
)
