"""Whether two short answers in numbers or words say the same: for visual mathematics.

Numbers are compared by value (1/2, 0.5, \\frac12), units and percent signs only where both have one, choices by letter,
lists item by item, and all else as text without regard to case, white space and LaTeX's spellings. Nothing is executed:
a bounded parser of its own reads numbers. What it cannot read goes to math-verify, where that is installed.
"""

import math
import re
from importlib.util import find_spec

LONGEST = 120                            # characters; longer answers are compared as text
SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9}
SYMBOLS = {"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "⁄": "/", "π": "pi", "√": "sqrt", "²": "^2", "³": "^3",
           "°": "", "½": "(1/2)", "¼": "(1/4)", "¾": "(3/4)"}
LATEX = (                                # spelling -> plain text; those with braces are applied from inside to outside
    (r"\\(left|right|displaystyle|degree|circ|quad|[,;:! $])|\^\s*\\circ|\^\{\s*\\circ\s*\}|[$£€~]", ""),
    (r"\\%", "%"), (r"\{,\}", ","), (r"\\(cdot|times)", "*"), (r"\\div", "/"), (r"\\pi\b", "pi"), (r"\\[()\[\]]", ""),
    (r"\\[dtc]frac", r"\\frac"), (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"), (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"))
BRACES = (
    (r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname|mbox|boxed)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))"), (r"\\sqrt\s*\[(\d)\]\s*\{([^{}]*)\}", r"((\2)^(1/\1))"),
    (r"\\sqrt\s*\{([^{}]*)\}", r"sqrt(\1)"), (r"\^\s*\{(\w+)\}", r"^\1"), (r"\^\s*\{([^{}]*)\}", r"^(\1)"))
TOKEN = re.compile(r"\s*(\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])|\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+|sqrt|pi|[-+*/^()])")

def same_answer(predicted: str, label: str) -> bool:
    """Whether two answers say the same. Never raises, and takes less than a few milliseconds without math-verify.

    >>> same_answer(r"\\frac{1}{2}", "0.5"), same_answer("(A)", "A"), same_answer("3 cm", "3 m")
    (True, True, False)
    """
    if max(len(predicted), len(label)) > LONGEST:
        return predicted.split() == label.split()
    a, b = plain(predicted), plain(label)
    if re.fullmatch(r"\(?[A-Ha-h][).:]?", b):            # a choice: (B), B. or (B) 24, but not Blue
        choice = re.fullmatch(r"\(?([A-Ha-h])(?:[).:].*)?", a, re.DOTALL)
        return choice is not None and choice[1].upper() == b.strip("().:").upper()
    a = re.sub(r"^\(?[A-H][).:]\s+(?=\S)", "", a)       # (B) 24, where the label is 24
    if ("=" in a) != ("=" in b):                         # x = 5
        a, b = (re.sub(r"^\s*[A-Za-z]\w*\s*=", "", text) for text in (a, b))
    items_a, items_b = items(a), items(b)
    if len(items_a) == len(items_b) and all(map(same_item, items_a, items_b)):
        return True
    return quantity(b) is None and verified(predicted, label)

def plain(text: str) -> str:
    """An answer without LaTeX's and Unicode's spellings of the same thing."""
    for symbol, replacement in SYMBOLS.items():
        text = text.replace(symbol, replacement)
    for pattern, replacement in LATEX:
        text = re.sub(pattern, replacement, text)
    for _ in range(6):                                   # as deep as braces may nest
        for pattern, replacement in BRACES:
            text = re.sub(pattern, replacement, text)
    text = re.sub(r"(\d+)\s*\(\((\d+)\)/\((\d+)\)\)", r"(\1+\2/\3)", text)         # mixed numbers: 1\frac12
    text = re.sub(r"(?<![\d.^/])(\d+) +(\d+/\d+)", r"(\1+\2)", text)               # and 1 1/2
    return text.strip().rstrip(".").strip()

def items(text: str) -> list[str]:
    """The sides of an equation; what the commas of a list part, and its brackets; those of 1,234 part nothing."""
    if "=" in text:
        return text.split("=")
    brackets = text[:1] + text[-1:]
    if "," not in text or quantity(text):
        return [text]
    if brackets in ("()", "[]", "{}", "(]", "[)"):
        return [brackets, *text[1:-1].split(",")]
    return text.split(",")

def same_item(a: str, b: str) -> bool:
    """Whether two numbers with or without units, or two texts, are the same."""
    first, second = quantity(a), quantity(b)
    if first is None or second is None:
        return squash(a) == squash(b) != ""
    (value, unit), (other, its_unit) = first, second
    if unit and its_unit and unit != its_unit:
        return False
    close = lambda x, y: math.isclose(x, y, rel_tol=1e-12, abs_tol=1e-12)
    percent = (unit == "%") - (its_unit == "%")          # 10% is 0.1; and it is 10 where the question says percent
    return close(value, other) or percent != 0 and close(value / 100 ** (percent > 0), other / 100 ** (percent < 0))

def squash(text: str) -> str:
    """A text without case, braces and white space, but for that between two words or two numbers."""
    text = re.sub(r"(?<=\d)\s+(?=\d)|(?<=[^\W\d])\s+(?=[^\W\d])", "_", text.replace("{", "").replace("}", "").strip())
    return re.sub(r"\s", "", text).casefold()

def quantity(text: str) -> tuple[float, str] | None:
    """(value, unit) of a number as people write it, such as 2\\sqrt3 cm or 3.5 million; None for anything else."""
    value, rest = number(text)
    words = rest.strip().casefold().rstrip("s")          # hours and hour
    if words.split(" ")[0].rstrip("s") in SCALES and value is not None:
        scale, _, words = words.partition(" ")
        value *= SCALES[scale.rstrip("s")]
    words = {"percent": "%", "per cent": "%"}.get(words, words)
    is_unit = words == "%" or re.fullmatch(r"(?:[a-z]{2,}|[mgslhv])(?:[ /*]+[a-z]+)*(?:\^?\(?[23]\)?)?", words)
    return (value, words) if value is not None and (not words or is_unit) else None

def number(text: str) -> tuple[float | None, str]:
    """The value of the expression that a text begins with, and the text after it; None where there is no finite one."""
    tokens, end = [], 0
    while found := TOKEN.match(text, end):
        tokens.append(found[1])
        end = found.end()
    try:
        value = Expression(tokens).read()
        return (float(value), text[end:]) if math.isfinite(value) else (None, text)
    except (ValueError, OverflowError, ZeroDivisionError, TypeError):       # TypeError: a root of a negative number
        return None, text

class Expression:
    """Reads + - * / ^ ( ) sqrt and pi from tokens, with the usual precedence; 2 pi and 2 sqrt(3) are products."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens[::-1]       # the next one is last

    def read(self) -> float:
        """The value of all tokens; ValueError if they are no expression."""
        value = self.sum()
        if self.tokens:
            raise ValueError("something is left over")
        return value

    def take(self, *wanted: str) -> str:
        """The next token if it is one of these, else nothing."""
        return self.tokens.pop() if self.tokens and self.tokens[-1] in wanted else ""

    def sum(self) -> float:
        value = self.product()
        while sign := self.take("+", "-"):
            value += self.product() * (1 if sign == "+" else -1)
        return value

    def product(self) -> float:
        value = self.power()
        while self.tokens and self.tokens[-1] in ("*", "/", "(", "sqrt", "pi"):
            if self.take("/"):
                value /= self.power()
            else:
                self.take("*")           # or nothing: 2 pi
                value *= self.power()
        return value

    def power(self) -> float:
        if sign := self.take("+", "-"):
            return self.power() * (1 if sign == "+" else -1)
        base = self.atom()
        return base ** self.power() if self.take("^") else base

    def atom(self) -> float:
        if self.take("sqrt"):
            return math.sqrt(self.atom())
        if self.take("("):
            value = self.sum()
            if not self.take(")"):
                raise ValueError("a bracket is not closed")
            return value
        if self.take("pi"):
            return math.pi
        if not self.tokens:
            raise ValueError("it ends too early")
        return float(self.tokens.pop().replace(",", ""))     # ValueError for an operator

def verified(predicted: str, label: str) -> bool:
    """What math-verify says, if it is installed (pip install math-verify): it knows algebra, and takes its time."""
    if find_spec("math_verify") is None:
        return False
    from math_verify import parse, verify
    return bool(verify(parse(f"${label}$"), parse(f"${predicted}$")))
