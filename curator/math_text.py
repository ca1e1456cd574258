r"""Answers as people write them, made ready for math-verify: plain signs as LaTeX, units apart, prose told apart.

math-verify reads LaTeX well. It takes `5\,040` for a product, finds the 1 in `sqrt(2) + 1`, and drops units and bases
without comparing them; what it would misread is rewritten here, or found out before it is asked.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

#: Letters that are no prose although they stand together.
FUNCTIONS = frozenset(
    re.findall(
        r"\w+",
        "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt frac gcd lcm mod min max det "
        "arg deg pi infty infinity inf",
    )
)

_SIGNS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "±": r"\pm ",
    "∈": r"\in ", "°": r"^\circ ", "º": r"^\circ ", "²": "^2", "³": "^3", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "€": "", "£": "", "¥": "",
}  # fmt: skip
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[A-Za-z]))")
_PLAIN_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\s*(?:\(([^()]*)\)|\{([^{}]*)\})")
_SET_SPACE = re.compile(
    r"\\(?:displaystyle|qquad|quad|left|right|bigl|bigr|Bigl|Bigr|big|Big)(?![A-Za-z])|(?<!\\)\\[,;:! ()\[\]]|~"
)
_GROUPS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\{,\}|,\\!|\\,|,\\,|\\ |[ ~\u00a0\u202f])\d{3})+(?!\d)")
_POWER_OF_TEN = re.compile(r"(?<![A-Za-z])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![A-Za-z\d])")
_MIXED = re.compile(r"(?<![\d./^_{])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d/])")
_WORD_FUNCTION = re.compile(r"(?<![\\A-Za-z])(arcsin|arccos|arctan|sinh?|cosh?|tanh?|cot|sec|csc|log|ln|exp)(?![a-z])")
_MODULO = re.compile(r"\s*(?:\\pmod\s*\{[^{}]*\}|\\bmod\s*\d+|\(\s*\\?mod\s*\d+\s*\))\s*\Z")
_PERCENT = re.compile(r"(?<=[\d)}])\s*(?:per\s?cent|percentage points?)\b", re.IGNORECASE)
_WORD_PI = re.compile(r"(?<![\\A-Za-z])(pi|infinity|inf|infty)(?![A-Za-z])")
_LISTED = re.compile(r"\s*(?:,\s*)?(?<![\\A-Za-z])(?:and|or)(?![A-Za-z])\s*")
_NAMED = re.compile(r"(?<![\\A-Za-z])([A-Za-z])\s*=(?!=)")
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|hbox|mathrm|mathbf|rm|operatorname)\s*\{([^{}]*)\}")
_WRAPPED_NUMBER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf)\s*\{([^{}A-Za-z]*\d[^{}A-Za-z]*)\}")
_PER_CENT = re.compile(r"(-?[\d.]+)\s*\\?%")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
_SHORT_PROSE = frozenset(
    re.findall(r"\w+", "is it no not the one two if by of to an at on we yes and for are any all can")
)

_MEASURE = {
    "mm": "mm millimeter millimetre", "cm": "cm centimeter centimetre", "m": "m meter metre",
    "km": "km kilometer kilometre", "in": "in inch inche", "ft": "ft foot feet", "yd": "yd yard", "mi": "mi mile",
    "s": "s sec second", "min": "min minute", "h": "h hr hour", "day": "day", "week": "week", "month": "month",
    "year": "year yr", "g": "g gram", "kg": "kg kilogram", "lb": "lb pound", "oz": "oz ounce", "l": "l liter litre",
    "ml": "ml milliliter millilitre", "gal": "gal gallon", "dollar": "dollar", "cent": "cent", "deg": "deg degree",
    "rad": "rad radian", "mph": "mph", "eV": "ev", "J": "j joule", "N": "newton", "K": "kelvin", "unit": "unit",
}  # fmt: skip
_MEASURES = {name: unit for unit, names in _MEASURE.items() for name in names.split()}
_HIGHEST_DEGREE = 40
_TWO_LETTERS = frozenset(name for name in _MEASURES if len(name) == 2)
_UNIT = re.compile(
    r"(?<=[\d)}\]%A-Za-z ])\s*(?<![\\A-Za-z])"
    r"(?P<unit>(?:[A-Za-z]{2,}|(?<=[\d)}] )[mshgl](?![A-Za-z]))\.?"
    r"(?:\s*/\s*[A-Za-z]+|(?:\s+[A-Za-z]+){0,4})(?:\s*\^\s*\{?[23]\}?)?)\s*\Z"
)
_LAST_WRAPPED = re.compile(
    r"(?:\\(?:text|textrm|mbox|hbox|mathrm|rm)\s*\{(?P<unit>[^{}]*)\}\s*(?:/\s*)?(?:\^\s*\{?[23]\}?)?\s*)+\Z"
)


def as_latex(answer: str) -> str:
    """An answer with plain signs and words of mathematics in LaTeX, and numbers without separators of thousands."""
    answer = _GROUPS.sub(lambda match: re.sub(r"\D", "", match.group()), answer)
    answer = _SET_SPACE.sub(" ", answer.replace(r"\$", "").replace("$", ""))
    answer = _WRAPPED_NUMBER.sub(r"\1", re.sub(r"\\\s*\Z", "", answer))
    for sign, latex in _SIGNS.items():
        answer = answer.replace(sign, latex)
    answer = answer.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    for pattern in (_ROOT, _PLAIN_ROOT):
        answer = pattern.sub(lambda match: rf"\sqrt{{{next(filter(None, match.groups()), '')}}}", answer)
    answer = _POWER_OF_TEN.sub(r"\1 \\cdot 10^{\2}", answer)
    answer = _MIXED.sub(r"\1\\frac{\2}{\3}", answer)
    answer = _MODULO.sub("", _PERCENT.sub(r"\%", answer)).replace("**", "^")
    answer = _WORD_FUNCTION.sub(r"\\\1", answer)
    return _WORD_PI.sub(lambda match: r"\pi " if match[1] == "pi" else r"\infty ", answer).strip()


def split_unit(answer: str) -> tuple[str, str | None]:
    """An answer without the unit, or other words, that come after its value.

    Returns:
        `tuple[str, str | None]`: the value, and the measure where it is known (`"cm"` for square centimetres too).
    """
    wrapped = _LAST_WRAPPED.search(answer)
    if wrapped and _has_value(answer[: wrapped.start()]) and not _LISTED.search(f" {wrapped.group()} "):
        return answer[: wrapped.start()].rstrip(r"\, "), _measure(_WRAPPED.sub(r" \1 ", wrapped.group()))
    plain = _WRAPPED.sub(r" \1 ", answer)
    found = _UNIT.search(plain)
    if found is None or not _has_value(plain[: found.start()]):
        return answer, None
    words = re.findall("[A-Za-z]+", found["unit"])
    unknown = len(words[0]) == 2 and words[0].lower() not in _TWO_LETTERS
    if unknown or {word.lower() for word in words} & (FUNCTIONS | {"or", "and", "not", "is"}):
        return answer, None
    return plain[: found.start()].rstrip(), _measure(found["unit"])


def listed(answer: str) -> str:
    """`x = 3 or x = -3` as `3, -3`; other answers as they are, with a comma for every "and" and "or"."""
    answer = _LISTED.sub(
        ", ", _WRAPPED.sub(lambda match: f" {match[1]} " if _LISTED.search(match[1]) else match[0], answer)
    )
    names = _NAMED.findall(answer)
    return _NAMED.sub("", answer) if len(names) > 1 and len(set(names)) == 1 and "," in answer else answer


def without_percent(first: str, second: str) -> tuple[str, str]:
    """Two answers, the sign of per cent taken from one if the other is from 1 up and has none: as likely as not, the
    question asks for a percentage. `0.62` and `62%` stay as they are."""
    for one, other in ((first, second), (second, first)):
        if (match := _PER_CENT.fullmatch(one)) and re.fullmatch(r"-?0*[1-9][\d.]*", other):
            return (match[1], other) if one is first else (other, match[1])
    return first, second


def has_prose(answer: str) -> bool:
    """Whether there are words in an answer that are no functions and no products of a few letters."""
    answer = _COMMAND.sub(" ", _WRAPPED.sub(r" \1 ", answer))
    words = [word.lower() for word in _WORD.findall(answer)]
    return any(word not in FUNCTIONS and (len(word) > 3 or word in _SHORT_PROSE) for word in words)


def brackets(answer: str) -> str | None:
    r"""The brackets around a list, `"()"`, `"[)"`, `"{}"`; `None` where there is no list or it is not bracketed."""
    answer = answer.replace(r"\left", "").replace(r"\right", "").replace(r"\{", "⦃").replace(r"\}", "⦄").strip(" $")
    if len(answer) < 2 or answer[0] not in "([⦃" or answer[-1] not in ")]⦄":
        return None
    depth, commas = 0, 0
    for at, sign in enumerate(answer):
        depth += (sign in "([{⦃") - (sign in ")]}⦄")
        if depth == 0 and at < len(answer) - 1:
            return None
        commas += sign == "," and depth == 1
    return (answer[0] + answer[-1]).replace("⦃", "{").replace("⦄", "}") if commas else None


def exact(expression: Any) -> Any:
    """An expression of sympy with its decimals as fractions."""
    from sympy import Basic, Float, MatrixBase, Rational

    if isinstance(expression, MatrixBase):
        return expression.applyfunc(exact)
    decimals = expression.atoms(Float) if isinstance(expression, Basic) else ()
    return expression.xreplace({each: Rational(str(each)) for each in decimals}) if decimals else expression


def too_large(expression: Any) -> bool:
    """Whether working out an expression of sympy may take for ever, as `9**(9**9)` does.

    One power of integers runs in C, where no time limit reaches it, and threads have none. Integrals, limits and
    series are not worked out at all: they are problems, not answers.
    """
    from sympy import Derivative, Function, Integral, Limit, Pow, Product, Sum, binomial, exp, factorial, gamma

    for node in _nodes(expression):
        if isinstance(node, Derivative | Integral | Limit | Product | Sum):
            return True
        if isinstance(node, Pow):
            limit, sizes = (_HIGHEST_DEGREE if node.base.free_symbols else 10_000), [_size(node.exp)]
        elif isinstance(node, Function):
            limit = 2_000 if isinstance(node, binomial | exp | factorial | gamma) else 10**15
            sizes = [_size(each) for each in node.args]
        else:
            continue
        if max(sizes, default=0) > limit:
            return True
    return False


def _has_value(text: str) -> bool:
    return bool(re.search(r"\d|\\pi|\\sqrt|\\frac|(?<![A-Za-z])[A-Za-z](?![A-Za-z])", text)) and not has_prose(text)


def _measure(unit: str) -> str | None:
    words = [word for word in re.findall("[A-Za-z]+", unit) if word.lower() not in ("square", "cubic", "sq", "cu")]
    names = [_MEASURES.get(word.lower()) or _MEASURES.get(word.lower().removesuffix("s")) for word in words]
    if words[1:2] == ["per"] or "/" in unit:
        names = [name for word, name in zip(words, names, strict=True) if word != "per"]
        joined = "/".join(name or "?" for name in names)
        return {"mi/h": "mph"}.get(joined, joined) if "?" not in joined else None
    return names[0] if len(names) == 1 else None


def _nodes(expression: Any) -> Iterator[Any]:
    waiting = [expression]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += list(node) if isinstance(node, list | tuple) else _parts(node)


def _parts(node: Any) -> list[Any]:
    from sympy import MatrixBase

    return list(node.flat()) if isinstance(node, MatrixBase) else list(getattr(node, "args", ()))


def _size(expression: Any) -> float:
    """About how large a value can be, infinity where it is beyond a float."""
    from sympy import Mul, Number, NumberSymbol, Pow, exp, factorial, gamma

    try:
        if isinstance(expression, Number | NumberSymbol):
            return abs(float(expression))
        sizes = [_size(part) for part in _parts(expression)]
        if isinstance(expression, Pow):
            return max(sizes[0], 1.0) ** sizes[1]
        if isinstance(expression, Mul):
            return math.prod(sizes)
        if isinstance(expression, factorial | gamma):
            return math.gamma(sizes[0] + 1)
        if isinstance(expression, exp):
            return math.exp(sizes[0])
        return sum(sizes)
    except (OverflowError, ValueError, TypeError):
        return math.inf
