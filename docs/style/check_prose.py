"""Check the project's prose: docstrings, comments, messages, names, Markdown, YAML and JSON.

    python docs/style/check_prose.py [FILE ...]

Without arguments all files under version control are checked. Each finding is printed as
`file:line: text -> advice`. The exit status is 1 if there are any. `phrases.txt` lists the phrases and
their replacements. Code in backticks and in fenced blocks is not prose.

The script knows nothing about grammar. It reports phrases and beginnings of sentences, no more.
"""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

PHRASES = Path(__file__).with_name("phrases.txt")
HASH_COMMENTS = {".toml", ".sh", ".example", ".gitignore", ".dockerignore", "Makefile", "Dockerfile"}
MIN_WORDS = 3
"""Number of words from which a string literal is a message rather than a key."""

QUESTION_WORD = re.compile(
    r"(?:^|(?<=[.!?])[\"')]?\s+|\n\s*\n)\s*(?:[-*|>#]+\s+)?((?:What|Who|Whatever|Whoever)\b[^.!?]*)([.!?]|$)",
    re.IGNORECASE,
)
DOCSTRING_START = re.compile(r"\s*(Of|That|Which|Whose)\b")


class Passage(NamedTuple):
    """Connected text that begins on `line`; `is_docstring` adds the rule for first words."""

    line: int
    text: str
    is_docstring: bool = False


class Finding(NamedTuple):
    line: int
    text: str
    advice: str


# --- rules ------------------------------------------------------------------------------------------


def read_phrases(file: Path = PHRASES) -> list[tuple[re.Pattern[str], str]]:
    """Pairs of pattern and advice. A space in a pattern matches any whitespace."""
    lines = [line for line in file.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    pairs = [line.partition(" -> ")[::2] for line in lines]
    return [
        (
            re.compile(rf"\b(?:{pattern.strip().replace(' ', chr(92) + 's+')})\b", re.IGNORECASE),
            advice.strip(),
        )
        for pattern, advice in pairs
    ]


def check(passage: Passage, phrases: Iterable[tuple[re.Pattern[str], str]]) -> Iterator[Finding]:
    text = without_code(passage.text)
    for pattern, advice in phrases:
        for match in pattern.finditer(text):
            yield finding(passage, match.start(), match.group(), advice)
    for match in QUESTION_WORD.finditer(text):
        if match.group(2) != "?":
            yield finding(passage, match.start(1), match.group(1), "begin with the subject or the verb")
    if passage.is_docstring and (start := DOCSTRING_START.match(text)):
        yield finding(passage, start.start(1), start.group(1), "begin with a noun phrase or a verb")


def finding(passage: Passage, position: int, text: str, advice: str) -> Finding:
    line = passage.line + passage.text.count("\n", 0, position)
    return Finding(line, " ".join(text.split())[:50], advice)


def without_code(text: str) -> str:
    """The text with code in backticks replaced by a placeholder of the same shape."""
    return re.sub(r"`[^`]+`", lambda code: re.sub(r"\S", "_", code.group()), text)


# --- passages ---------------------------------------------------------------------------------------


def passages_of(file: Path) -> Iterator[Passage]:
    source = file.read_text("utf-8")
    match file.suffix or file.name:
        case ".py":
            yield from python_passages(source)
        case ".md":
            yield from markdown_passages(source)
        case ".yaml" | ".yml":
            yield from yaml_passages(source)
            yield from comment_passages(source)
        case ".json":
            yield from json_passages(source)
        case kind if kind in HASH_COMMENTS or file.name in HASH_COMMENTS:
            yield from comment_passages(source)


def python_passages(source: str) -> Iterator[Passage]:
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    in_fstrings = {
        id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in in_fstrings:
            yield from literal_passages(node, id(node) in docstrings)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield Passage(node.lineno, node.name.removeprefix("test_").replace("_", " "))
    yield from python_comments(source)


def literal_passages(node: ast.Constant | ast.JoinedStr, is_docstring: bool) -> Iterator[Passage]:
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    values = [part.value if isinstance(part, ast.Constant) else "{}" for part in parts]
    text = "".join(value for value in values if isinstance(value, str))
    if is_docstring or len(text.split()) >= MIN_WORDS:
        yield Passage(node.lineno, text, is_docstring)


def python_comments(source: str) -> Iterator[Passage]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    yield from joined((token.start[0], token.start[1], token.string.lstrip("#! ")) for token in comments)


def comment_passages(source: str) -> Iterator[Passage]:
    """Comments that start with `#`, in any language without multi-line strings."""
    found = [
        (number, re.search(r"(?:^|\s)#+ (.*)", line)) for number, line in enumerate(source.splitlines(), 1)
    ]
    yield from joined((number, match.start(), match.group(1)) for number, match in found if match)


def joined(comments: Iterable[tuple[int, int, str]]) -> Iterator[Passage]:
    """Comments by line, column and text; consecutive ones at the same column form one passage."""
    first = last = column = -1
    texts: list[str] = []
    for line, start, text in comments:
        if texts and (line, start) != (last + 1, column):
            yield Passage(first, "\n".join(texts))
            texts = []
        if not texts:
            first = line
        last, column = line, start
        texts.append(text)
    if texts:
        yield Passage(first, "\n".join(texts))


def markdown_passages(source: str) -> Iterator[Passage]:
    """Paragraphs, headings, list items and table cells."""
    without_blocks = re.sub(r"^( *)```.*?^\1```$", blank, source, flags=re.DOTALL | re.MULTILINE)
    starts_item = re.compile(r"\s*(?:[-*]|\d+\.)\s|#|>")
    first, texts = 1, list[str]()
    for number, line in enumerate([*without_blocks.splitlines(), ""], 1):
        if texts and (not line.strip() or starts_item.match(line) or line.startswith("|")):
            yield Passage(first, "\n".join(texts))
            texts = []
        if line.startswith("|"):
            yield from (Passage(number, cell.strip()) for cell in line.split("|"))
        elif line.strip():
            first = first if texts else number
            texts.append(re.sub(r"^\s*(?:[-*#>]+|\d+\.)\s+", "", line))


def blank(block: re.Match[str]) -> str:
    return "\n" * block.group().count("\n")


def yaml_passages(source: str) -> Iterator[Passage]:
    nodes = list(yaml.compose_all(source, yaml.SafeLoader))
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.ScalarNode) and len(node.value.split()) >= MIN_WORDS:
            yield Passage(node.start_mark.line + 1, node.value)
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            nodes += [part for pair in node.value for part in pair]


def json_passages(source: str) -> Iterator[Passage]:
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"', source):
        text = json.loads(match.group())
        if len(text.split()) >= MIN_WORDS:
            yield Passage(source.count("\n", 0, match.start()) + 1, text)


# --- command ----------------------------------------------------------------------------------------


def tracked_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], check=True, capture_output=True, encoding="utf-8"
    ).stdout
    return [Path(name) for name in listing.split("\0") if name and Path(name).is_file()]


def main(arguments: list[str]) -> int:
    phrases = read_phrases()
    num_findings = 0
    for file in [Path(name) for name in arguments] or tracked_files():
        found = {f for passage in passages_of(file) for f in check(passage, phrases)}
        num_findings += len(found)
        for line, text, advice in sorted(found):
            print(f"{file}:{line}: {text} -> {advice}")
    return 1 if num_findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
