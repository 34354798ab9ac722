#!/usr/bin/env python3
"""Prints figures about the sources and the history at two commits, as a Markdown table.

  figures.py BEFORE [NOW]     NOW: HEAD. The commits of NOW are those since BEFORE; those of BEFORE are all up to it.

Options:
  --rebuild   also compiles the agent at both commits (dev profile, minutes), and measures `cargo build` after a change
              of a function in the merge of /etc

The sources are formatted by rustfmt, so a function ends at the first line that closes its indentation. Tests are files and
modules of tests. "Verb" and "imperative" are estimates by the form of the first word.
"""

import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "target" / "figures"

SHIPPED = re.compile(r"(src|generators/src|crates/[^/]+/src)/.*\.rs")
TEST_FILE = re.compile(r"(^|/)tests?(/|\.rs$)|_tests\.rs$|/testing\.rs$")
TEST_MODULE = re.compile(r"^#\[cfg\(test\)\]\n(?:#\[[^\n]*\]\n)*(?:pub\(crate\) )?mod \w+ \{.*?^\}", re.MULTILINE | re.DOTALL)
FUNCTION = re.compile(
    r"^( *)(?:pub(?:\([^)]*\))? )?(?:const |async |unsafe |extern \"C\" )*fn \w+(?:[^;{]|\{[^\n]*\})*?\{\n(.*?)^\1\}$",
    re.MULTILINE | re.DOTALL)
TEST_FUNCTION = re.compile(r"#\[(?:tokio::)?test")
DOC = re.compile(r"(?:^[ \t]*//[/!][^\n]*\n)+", re.MULTILINE)
QUESTION = re.compile(r"(What|Whether|How|Who|Whose|Whoever|Where|Which)\b")
VERB = re.compile(r"[A-Z][a-z]+(?<![aius])s (?!of\b|and\b|that\b|in\b|for\b|with\b|are\b|which\b)")
# Of a subject that begins with a verb in the imperative, the first word is not one of these and has none of these ends.
NOT_IMPERATIVE = re.compile(
    r"(the|a|an|what|how|who\w*|one|two|every|each|no|all|both|our|ours|in|without|never|new|pid|\S+(s|ed|ing|'|,|\.\S+|=))$",
    re.IGNORECASE)


def git(*arguments):
    return subprocess.run(["git", "-C", ROOT, *arguments], check=True, capture_output=True, text=True).stdout


def checkout(commit, name):
    """Returns a work tree of the commit."""
    tree = WORK / name
    if not tree.exists():
        git("worktree", "prune")
        git("worktree", "add", "--quiet", "--detach", str(tree), commit)
    git("-C", str(tree), "checkout", "--quiet", "--force", "--detach", commit)
    return tree


def share(part, whole):
    return f"{100 * len(part) // max(1, len(whole))} % of {len(whole)}"


def of_sources(tree):
    files = {path: path.read_text() for path in sorted(tree.rglob("*.rs")) if "target" not in path.relative_to(tree).parts}
    shipped = {path: text for path, text in files.items()
               if SHIPPED.fullmatch(str(path.relative_to(tree))) and not TEST_FILE.search(str(path.relative_to(tree)))}
    code = [TEST_MODULE.sub("", text) for text in shipped.values()]
    lines = [line.strip() for text in code for line in text.splitlines()]
    lengths = sorted(match.group(2).count("\n") for text in code for match in FUNCTION.finditer(text))
    tests = [match.group(2).count("\n") for text in files.values() for match in FUNCTION.finditer(text)
             if TEST_FUNCTION.search(text[:match.start()].rsplit("\n\n", 1)[-1])]
    firsts = [match.group(0).strip().lstrip("/! ") for text in files.values() for match in DOC.finditer(text)]
    return {
        "lines of code outside tests": sum(1 for line in lines if line and not line.startswith("//")),
        "files outside tests": len(shipped),
        "lines of the longest file": max(len(text.splitlines()) for text in files.values()),
        "lines of a function: median, 95th percentile, most":
            f"{statistics.median_low(lengths)}, {lengths[len(lengths) * 95 // 100]}, {lengths[-1]}",
        "lines of the longest test function": max(tests),
        "doc comments that begin with a question word": share([doc for doc in firsts if QUESTION.match(doc)], firsts),
        "doc comments that begin with a verb": share([doc for doc in firsts if VERB.match(doc)], firsts),
        "groups of files that import each other": circles(tree),
    }


def circles(tree):
    command = ["cargo", "test", "--quiet", "--test", "architecture", "print_circles", "--", "--ignored", "--nocapture"]
    output = subprocess.run(command, cwd=ROOT, env={**os.environ, "ARCHITECTURE_OF": str(tree)},
                            check=True, stdout=subprocess.PIPE, text=True).stdout
    return sum(1 for line in output.splitlines() if line.startswith("circle: "))


def of_history(commits):
    subjects = git("log", "--no-merges", "--format=%s", commits).splitlines()
    firsts = [subject.split(": ", 1)[-1].split()[0] for subject in subjects]
    return {"imperative subjects of commits": share([word for word in firsts if not NOT_IMPERATIVE.match(word)], firsts)}


def rebuild(tree):
    """Returns the seconds of a build after a change of a function in the merge of /etc."""
    build = ["cargo", "build", "--quiet", "--bin", "node-image-pivot"]
    subprocess.run(build, cwd=tree, check=True)
    source = next(path for path in (tree / "crates/etc-merge/src/decide.rs", tree / "src/etc/decide.rs") if path.exists())
    source.write_text(re.sub(r"^((?:pub(?:\(\w+\))? )?fn \w+\([^{]*\{\n)", r"\1    std::hint::black_box(());\n",
                             source.read_text(), count=1, flags=re.MULTILINE))
    start = time.monotonic()
    subprocess.run(build, cwd=tree, check=True)
    taken = time.monotonic() - start
    subprocess.run(["git", "-C", tree, "checkout", "--quiet", "."], check=True)
    return {"seconds of a build after a change in the merge of /etc": f"{taken:.1f}"}


def main():
    commits = [argument for argument in sys.argv[1:] if argument != "--rebuild"]
    if not commits or len(commits) > 2:
        sys.exit(__doc__)
    before, now = [git("rev-parse", "--verify", commit + "^{commit}").strip() for commit in [*commits, "HEAD"][:2]]
    columns = []
    for name, commit, history in (("before", before, before), ("now", now, f"{before}..{now}")):
        tree = checkout(commit, name)
        columns.append({**of_sources(tree), **of_history(history), **(rebuild(tree) if "--rebuild" in sys.argv else {})})
    print(f"| figure | {before[:7]} | {now[:7]} |\n|---|---:|---:|")
    for figure, value in columns[0].items():
        print(f"| {figure} | {value} | {columns[1][figure]} |")


main()
