"""algos/README.zh.md says what README.md says: the same headings, commands, links, numbers and tables.

Both pages are cut into blocks: headings, paragraphs, list items, rows of tables, code. Block by block the
two must agree in all that needs no translation. The wording itself is for people to compare.
"""

import difflib
import posixpath
import re
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = "README.md", "algos/README.zh.md"
TEXTS = {page: (ROOT / page).read_text() for page in (ENGLISH, CHINESE)}

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]*)((?: \"[^\"]*\")?)\)")
CODE = re.compile(r"`[^`]+`")
# Digits that belong to a name (A2C, x86) are no number; 3 million is written 300 万.
NUMBER = re.compile(r"(?<![A-Za-z_\d.])−?\d+(?:,\d{3})*(?:\.\d+)*%?(?: million| 万)?")
HAN = r"[\u4e00-\u9fff]"


@dataclass
class Block:
    line: int
    kind: str
    text: str


def blocks(text: str) -> list[Block]:
    """The page from its title on, wrapped lines joined. Code keeps its lines."""
    found, open_block = [], False
    lines = enumerate(text.splitlines(), 1)
    for number, line in lines:
        content = line.strip()
        place = "in a list, " if line.startswith(" ") else ""
        heading = re.match(r"(#+) ", content)
        item = re.match(r"(-|\d+\.) ", content)
        if content.startswith("```"):
            code = []
            for _, inner in lines:
                if inner.strip() == "```":
                    break
                code.append(inner)
            found.append(Block(number, f"{place}code {content[3:]}".rstrip(), "\n".join(code)))
            open_block = False
        elif not content:
            open_block = False
        elif heading or content.startswith(("|", "<!--")):
            cells = content.strip("|").count("|") + 1
            kind = heading[1] if heading else f"row of {cells}" if content[0] == "|" else "mark"
            found.append(Block(number, kind, content))
            open_block = False
        elif item or not open_block:
            kind = f"{place}item {item[1]}" if item else f"{place}paragraph"
            found.append(Block(number, kind, content[len(item[0]) :] if item else content))
            open_block = True
        else:
            found[-1].text += "\n" + content
    titles = [index for index, block in enumerate(found) if block.kind == "#"]
    return found[titles[0] if titles else 0 :]


def anchor(heading: str) -> str:
    """What GitHub calls a heading: small letters, no punctuation, - for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.lstrip("# ").lower()).replace(" ", "-")


def anchors(text: str) -> list[str]:
    return ["#" + anchor(block.text) for block in blocks(text) if re.fullmatch("#+", block.kind)]


def targets(text: str, page: str, names: list[str] | None = None) -> list[str]:
    """Where the links of a text lead, seen from the root; headings of the page itself by their number.

    names: the headings of the page; without them a link within the page is only "#".
    """
    found = []
    for picture, _, target, phrase in LINK.findall(text):
        if target.startswith("#"):
            target = f"#heading {names.index(target) + 1}" if names and target in names else "#"
        elif "://" not in target:
            target = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        found.append(picture + target + phrase)
    return found


def numbers(text: str) -> list[str]:
    """All numbers of a text in plain digits, sorted."""
    found = []
    for number in NUMBER.findall(text):
        digits, _, unit = number.replace(",", "").replace("−", "-").partition(" ")
        scale = {"million": 1_000_000, "万": 10_000}.get(unit)
        found.append(f"{Decimal(digits) * scale:.0f}" if scale else digits)
    return sorted(found)


def comment(line: str, listing: bool) -> tuple[str, str]:
    """A line of code and its comment; in a listing of files the words behind the name are the comment."""
    found = re.match(r"( +\S+  +)(.*)$" if listing else r"(.*?(?:^|\s)#)(\s.*)$", line)
    return (found[1], found[2]) if found else (line, "")


def facts(block: Block, page: str, names: list[str] | None) -> dict[str, object]:
    """What a translation leaves as it is, by the name that a message gives it."""
    if "code" in block.kind:
        pairs = [comment(line, listing=block.kind.endswith("code")) for line in block.text.split("\n")]
        code, comments = zip(*pairs, strict=True)
        return {"code": list(code), "numbers in comments": numbers("\n".join(comments))}
    if block.kind == "mark" or set(block.text) <= set("|-:"):  # or the line below the head of a table
        return {"text": [block.text]}
    found = {}
    cells = block.text.strip("|").split("|") if block.kind.startswith("row") else [block.text]
    for column, cell in enumerate(cells, 1):
        where = f" in column {column}" if len(cells) > 1 else ""
        prose = LINK.sub(lambda link: link[2], CODE.sub("", cell))
        found[f"links{where}"] = targets(cell, page, names)
        found[f"code{where}"] = sorted(CODE.findall(cell))
        found[f"numbers{where}"] = numbers(prose)
        found[f"bold words{where}"] = len(re.findall(r"\*\*.+?\*\*", prose, flags=re.S))
    return found


def only(these: list[str], those: list[str]) -> str:
    return ", ".join((Counter(these) - Counter(those)).elements()) or "nothing"


def compare(english: dict[str, object], chinese: dict[str, object]) -> list[str]:
    """What differs between the facts of two blocks of one kind."""
    found = []
    for name, value in english.items():
        other = chinese[name]
        if value == other:
            continue
        if isinstance(value, list) and sorted(value) != sorted(other):
            found.append(
                f"{name}: in English only {only(value, other)}; in Chinese only {only(other, value)}"
            )
        elif isinstance(value, list):
            found.append(
                f"{name}: in another order; in English {', '.join(value)}; in Chinese {', '.join(other)}"
            )
        else:
            found.append(f"{name}: in English {value}; in Chinese {other}")
    return found


def differences(english: str, chinese: str) -> list[str]:
    """One message for each place where the Chinese page is out of step."""
    pages = {ENGLISH: blocks(english), CHINESE: blocks(chinese)}
    names = {ENGLISH: anchors(english), CHINESE: anchors(chinese)}
    if len(names[ENGLISH]) != len(names[CHINESE]):  # a message for the heading, none for each link behind it
        names = dict.fromkeys(pages)
    there, here = ([facts(block, page, names[page]) for block in pages[page]] for page in pages)
    keys = [
        [f"{block.kind} {fact}" for block, fact in zip(pages[page], of_page, strict=True)]
        for page, of_page in ((ENGLISH, there), (CHINESE, here))
    ]
    found = []
    for operation, i, i_end, j, j_end in difflib.SequenceMatcher(None, *keys, autojunk=False).get_opcodes():
        if operation == "equal":
            continue
        mine, other = pages[ENGLISH][i:i_end], pages[CHINESE][j:j_end]
        if [block.kind for block in mine] == [block.kind for block in other]:
            for a, b, in_english, in_chinese in zip(mine, other, there[i:i_end], here[j:j_end], strict=True):
                for difference in compare(in_english, in_chinese):
                    found.append(f"{CHINESE}:{b.line} against {ENGLISH}:{a.line} ({a.kind}): {difference}")
        else:
            found += [f"{CHINESE} lacks the {b.kind} of {ENGLISH}:{b.line}: {b.text[:70]}" for b in mine]
            found += [f"{ENGLISH} lacks the {b.kind} of {CHINESE}:{b.line}: {b.text[:70]}" for b in other]
    return found


def test_the_chinese_readme_is_in_step():
    found = differences(TEXTS[ENGLISH], TEXTS[CHINESE])
    assert not found, "\n" + "\n".join(found)


SAMPLE = """\
# One file

It runs on **Linux**, see [Words](#words) and [uv](https://docs.astral.sh/uv); 3 million
steps of A2C reach 500, as `python algos/ppo.py` says.

![The loop](tests/benchmark/figures/loop.png)

## Start

```bash
python algos/ppo.py --seed 1  # on each of 4 machines
```

- one
- two of 9

```
  args.json   all 7 arguments
```

## Words

| word | place |
|---|---|
| ratio | [ppo](algos/ppo.py#L25 "as a ratio"), 11 s |
| GAE | [a2c](algos/a2c_continuous.py) |
"""
TRANSLATED = """\
[English](../README.md) | 中文

# 一个文件

它在 **Linux** 上运行，见[词汇](#词汇)和 [uv](https://docs.astral.sh/uv)；
`python algos/ppo.py` 表明，A2C 走 300 万步达到 500。

![循环](../tests/benchmark/figures/loop.png)

## 开始

```bash
python algos/ppo.py --seed 1  # 在 4 台机器上各运行一次
```

- 一
- 9 个中的两个

```
  args.json   全部 7 个参数
```

## 词汇

| 词 | 位置 |
|---|---|
| ratio（比率） | [ppo](ppo.py#L25 "as a ratio")，11 秒 |
| GAE | [a2c](a2c_continuous.py) |
"""
BROKEN = {
    "a heading is gone": ("## 开始\n", "", "lacks the ## of README.md:8: ## Start"),
    "a heading is deeper": ("## 开始", "### 开始", "lacks the ## of README.md:8: ## Start"),
    "a number": ("500", "501", "zh.md:5 against README.md:3 (paragraph): numbers: in English only 500"),
    "a large number": ("300 万", "30 万", "in English only 3000000; in Chinese only 300000"),
    "a number in a table": ("11 秒", "12 秒", "column 2: in English only 11; in Chinese only 12"),
    "a number in a comment": ("# 在 4 台", "# 在 5 台", "numbers in comments: in English only 4"),
    "a number in a listing": ("全部 7 个", "全部 8 个", "numbers in comments: in English only 7"),
    "a command": ("`python algos/ppo.py`", "`python ppo.py`", "code: in English only `python algos/ppo.py`"),
    "a command in a block": ("--seed 1", "--seed 2", "code: in English only python algos/ppo.py --seed 1"),
    "a file in a listing": ("args.json ", "arg.json  ", "code: in English only   args.json"),
    "a picture": ("loop.png", "path.png", "links: in English only !tests/benchmark/figures/loop.png"),
    "another site": ("docs.astral.sh", "astral.sh", "links: in English only https://docs.astral.sh/uv"),
    "a line": ("#L25", "#L26", 'in English only algos/ppo.py#L25 "as a ratio"'),
    "another folder": ("](ppo.py", "](../ppo.py", 'in Chinese only ppo.py#L25 "as a ratio"'),
    "a link within the page": ("(#词汇)", "(#开始)", "links: in English only #heading 3"),
    "a link to no heading": ("(#词汇)", "(#词)", "links: in English only #heading 3; in Chinese only #"),
    "a bold word is plain": ("**Linux**", "Linux", "bold words: in English 1; in Chinese 0"),
    "an item is gone": ("- 9 个中的两个\n", "", "lacks the item - of README.md:15: two"),
    "a new paragraph": (
        "## 词汇",
        "完。\n\n## 词汇",
        "README.md lacks the paragraph of algos/README.zh.md:23: 完。",
    ),
    "a row is gone": ("| ratio（", "<!-- | ratio（", "lacks the row of 2 of README.md:25: | ratio |"),
    "a column is gone": ("| 词 | 位置 |", "| 词 |", "lacks the row of 2 of README.md:23: | word | place |"),
}


def test_a_translation_is_in_step():
    assert not differences(SAMPLE, TRANSLATED)


@pytest.mark.parametrize("case", BROKEN)
def test_a_page_that_is_out_of_step_is_noticed(case):
    old, new, message = BROKEN[case]
    assert old in TRANSLATED
    found = differences(SAMPLE, TRANSLATED.replace(old, new, 1))
    assert any(message in line for line in found), found
    assert len(found) <= 2, found  # the place, and not all that follows


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_leads_somewhere(page):
    """Files and their headings; other sites are not asked."""
    for _, _, target, _ in LINK.findall(TEXTS[page]):
        if "://" in target:
            continue
        path, _, name = target.partition("#")
        file = (
            ROOT / posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else ROOT / page
        )
        assert file.exists(), f"{page} links to {target}: there is no {file.relative_to(ROOT)}"
        if name and file.suffix == ".md":
            assert "#" + name in anchors(file.read_text()), f"{page} links to {target}: no such heading"


def test_the_pages_link_to_each_other_at_the_top():
    assert targets(TEXTS[ENGLISH].splitlines()[0], ENGLISH) == [CHINESE]
    assert targets(TEXTS[CHINESE].splitlines()[0], CHINESE) == [ENGLISH]


def prose_lines() -> list[tuple[int, str]]:
    """What a reader of the Chinese page sees, without code: a span of code is one letter x."""
    found = []
    for block in blocks(TEXTS[CHINESE]):
        if "code" not in block.kind and block.kind != "mark":
            for offset, line in enumerate(block.text.split("\n")):
                plain = LINK.sub(lambda link: link[2], CODE.sub("x", line))
                found.append((block.line + offset, plain.replace("**", "")))
    return found


def test_chinese_typography():
    """Full-width punctuation beside Chinese, a space between Chinese and Latin words or figures."""
    rules = {
        "no space between Chinese and Latin": rf"{HAN}[A-Za-z0-9%]|[A-Za-z0-9%]{HAN}",
        "half-width punctuation": rf"{HAN} ?[,.:;?!()]|[,.:;?!()] ?{HAN}",
        "a space beside full-width punctuation": r" [，。；：？！、（）]|[，。；：？！、（）] (?!\|)",
        "a space between Chinese words": rf"{HAN} +{HAN}",
    }
    for number, line in prose_lines():
        for rule, pattern in rules.items():
            wrong = re.search(f".{{0,12}}(?:{pattern}).{{0,12}}", line)
            assert not wrong, f"{CHINESE}:{number}: {rule}: {wrong[0]}"


def test_bold_words_end_where_markdown_sees_it():
    """Behind punctuation ** closes nothing unless a space or punctuation follows."""
    for number, line in enumerate(TEXTS[CHINESE].splitlines(), 1):
        for bold, after in re.findall(r"\*\*(.+?)\*\*(.?)", line):
            wrong = re.search(r"\W$", bold) and re.match(r"\w", after)
            assert not wrong, f"{CHINESE}:{number}: **{bold}**{after}"


def test_every_block_of_prose_is_in_chinese():
    for block in blocks(TEXTS[CHINESE]):
        if re.match(r"#|.*(paragraph|item)", block.kind):
            assert re.search(HAN, block.text), f"{CHINESE}:{block.line}: {block.text}"
