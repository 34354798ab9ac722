#!/usr/bin/env python3
"""Checks the documentation. Reports one `FILE:LINE: MESSAGE` per fault and exits 1 if there is any.

  * Links of README.md, docs/ and the other top-level pages: target files and anchors exist.
  * Links inside docs/ stay inside docs/, because the book holds nothing else.
  * Each page of docs/ is listed in docs/SUMMARY.md, names its readers in its first lines ("For: ...") and is linked.
  * Tests that a page names as `FILE::test`, and source files that it names by path, exist.
  * Words that CONTRIBUTING.md rules out, in pages and unit files.

Options:
  --rust       also check the Rust sources: the same words, and doc comments that begin with a question word, in the
               tests too
  --sentences  also list sentences of more than 25 words (a help for writers; never an error)
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "docs"
MOST_WORDS = 25

# (pattern, advice). A space stands for any white space, so that a line break hides nothing. A match of the group
# `fine` is not a fault.
WORDS = [
    (r"\banew\b", "again"),
    (r"\bmend(s|ed|ing)?\b", "fix"),
    (r"\bfor good\b", "permanently"),
    (r"\bput(s|ting)? off\b", "defer"),
    (r"\bas (it|they) (was|were)\b(?! (a|an|the|in|on|at|by|last|\w+ed|\w+en)\b)", "unchanged"),
    (r"\b(nobody|somebody|whoever|everybody|anybody)(?!\w)", "name the actor"),
    (r"\bsomeone( else)?\b", "name the actor"),
    (r"\bof (its|their|his|our) own(?=\W*$|[.,;:)]| (and|or|that|which|with|without|in|on|is|are|has|for|to|from)\b)",
     "separate, its own"),
    (r"\b(is|are|was|were|be) told\b|\btold (again|already|twice|why|that|apart|to)\b", "reported"),
    (r"(?P<fine>\bt?here )?\b(is|are) no (?!longer\b|more than\b|less than\b|larger than\b)", "is not a, is an invalid"),
    (r"\bknows? (no(?! longer)|none|nothing)\b", "does not know"),
    (r"\b(is|are) to (stay|be|become|happen|watch|go)\b", "must"),
    (r"\b(stopped|started|restarted|reloaded|take|takes|taken|took|stop|restart) (with it |one |it )?along\b",
     "as a dependent"),
    (r"\b(we|us|he|him|himself)\b", "name the actor"),
    (r"\bit does no harm\b|\bdo(es)? no harm\b", "is harmless"),
]
PATTERNS = [(re.compile(words.replace(" ", r"\s+"), re.MULTILINE | (0 if "we|us" in words else re.IGNORECASE)), advice)
            for words, advice in WORDS]
QUESTION = re.compile(r"\s*//[/!]\s*(What|Whether|How|Who|Whoever|Whose|Where|Which)\b")

faults = []


def fault(path, line, message):
    faults.append((str(path.relative_to(ROOT)), line, message))


def blank(match):
    """Spaces instead of the match, so that offsets and lines stay."""
    return re.sub(r"[^\n]", " ", match.group(0))


def line_of(text, offset):
    return text.count("\n", 0, offset) + 1


def without_code(text):
    """Markdown without fenced, indented and inline code."""
    text = re.sub(r"^(```|~~~)[^\n]*\n.*?^\1[^\n]*$", blank, text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(?<=\n\n)( {4}[^\n]*\n)+", blank, text)
    return re.sub(r"(`+)(?!`)(?:[^`]|(?!\1)`)+?\1(?!`)", blank, text)


def pages():
    top = sorted(ROOT.glob("*.md"))
    return top + sorted(BOOK.rglob("*.md")) + [ROOT / "dracut/README.md"]


def check_words(path, text):
    for pattern, advice in PATTERNS:
        for match in pattern.finditer(text):
            if match.groupdict().get("fine"):
                continue
            found = " ".join(match.group(0).split())
            fault(path, line_of(text, match.start()), f'"{found}": write {advice}')


def slug(heading):
    """The anchor of a heading, as GitHub and mdBook make it."""
    heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
    heading = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return heading.replace(" ", "-")


def anchors(path, known={}):
    if path not in known:
        text = re.sub(r"^```.*?^```", blank, path.read_text(), flags=re.DOTALL | re.MULTILINE)
        known[path], seen = set(), {}
        for heading in re.findall(r"^#{1,6}\s+(.*?)\s*#*$", text, re.MULTILINE):
            name = slug(heading)
            count = seen.get(name, 0)
            seen[name] = count + 1
            known[path].add(name if count == 0 else f"{name}-{count}")
        known[path].update(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))
    return known[path]


def check_links(path):
    """Returns the files that the page links to."""
    text = without_code(path.read_text())
    linked = set()
    links = re.finditer(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|^\[[^]]+\]:\s*(\S+)", text, re.MULTILINE)
    for match in links:
        target = match.group(1) or match.group(2)
        line = line_of(text, match.start())
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists():
            fault(path, line, f"dead link: {target}")
            continue
        if BOOK in path.parents and BOOK not in file.parents:
            fault(path, line, f"link leaves the book: {target}; name the path in code instead")
        if anchor and (file.suffix != ".md" or anchor not in anchors(file)):
            fault(path, line, f"dead anchor: {target}")
        linked.add(file)
    return linked


def test_functions(folder=ROOT / "tests/harness/tests", known={}):
    """The names of all functions by test program, which is a file or a folder."""
    if not known:
        for path in folder.rglob("*.rs"):
            program = path.relative_to(folder).parts[0].removesuffix(".rs")
            known.setdefault(program, set()).update(re.findall(r"^\s*(?:pub )?fn (\w+)", path.read_text(), re.MULTILINE))
    return known


def check_names(path):
    text = path.read_text()
    for match in re.finditer(r"`([a-z_]+)::([a-z_0-9]+)`", text):
        program, name = match.groups()
        known = test_functions().get(program)
        if known is None and path.name == "contract.md" or known is not None and name not in known:
            fault(path, line_of(text, match.start()), f"no such test: {program}::{name}")
    for match in re.finditer(r"`((?:src|crates|generators|tests|packaging|units)/[\w./-]*\w)`", text):
        if not (ROOT / match.group(1)).exists():
            fault(path, line_of(text, match.start()), f"no such file: {match.group(1)}")


def check_book():
    summary = BOOK / "SUMMARY.md"
    listed = check_links(summary) if summary.exists() else set()
    if not summary.exists():
        fault(BOOK, 1, "SUMMARY.md is missing")
    linked = set()
    for path in pages():
        if path != summary:
            linked |= check_links(path) - {path}
    for path in sorted(BOOK.rglob("*.md")):
        if path == summary:
            continue
        if path not in listed:
            fault(path, 1, "missing from docs/SUMMARY.md")
        if path not in linked and path != BOOK / "README.md":
            fault(path, 1, "not linked from another page")
        if not re.search(r"^For: ", "\n".join(path.read_text().splitlines()[:6]), re.MULTILINE):
            fault(path, 1, 'the first lines name no readers ("For: ...")')


def check_rust(path):
    check_beginnings(path)
    # Comment marks become spaces, so that a sentence is one text.
    check_words(path, re.sub(r"^\s*//[/!]?", blank, path.read_text(), flags=re.MULTILINE))


def check_beginnings(path):
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        before = lines[number - 1] if number else ""
        match = QUESTION.match(line)
        if match and not re.match(r"\s*//[/!]", before):
            fault(path, number + 1, f'doc comment begins with "{match.group(1)}": write a verb or a noun phrase')


def list_sentences(path):
    text = without_code(path.read_text())
    text = re.sub(r"^\|?[\s|:-]+\|?$", blank, text, flags=re.MULTILINE)
    for match in re.finditer(r"(?:[^.:;?!|\n]|[.:;](?=\S)|\n(?!\s*\n|\s*[*|#-]|\s*\d+\. ))+", text):
        words = re.findall(r"[^\s]+", match.group(0))
        if len(words) > MOST_WORDS:
            start = len(match.group(0)) - len(match.group(0).lstrip())
            where = line_of(text, match.start() + start)
            print(f"{path.relative_to(ROOT)}:{where}: {len(words)} words: {' '.join(words[:8])} ...")


def main():
    options = set(sys.argv[1:])
    if options - {"--rust", "--sentences"}:
        sys.exit(__doc__)
    check_book()
    for path in pages():
        check_words(path, without_code(path.read_text()))
        check_names(path)
    for path in sorted((ROOT / "units").iterdir()):
        check_words(path, re.sub(r"^#+", blank, path.read_text(), flags=re.MULTILINE))
    if "--rust" in options:
        for folder in ("src", "crates", "generators"):
            for path in sorted((ROOT / folder).rglob("*.rs")):
                check_rust(path)
        for path in sorted((ROOT / "tests").rglob("*.rs")):
            check_beginnings(path)
    if "--sentences" in options:
        for path in pages():
            list_sentences(path)
    for path, line, message in sorted(faults):
        print(f"{path}:{line}: {message}")
    if faults:
        sys.exit(f"{len(faults)} faults in the documentation; CONTRIBUTING.md has the rules")


if __name__ == "__main__":
    main()
