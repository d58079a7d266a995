"""Outside data of RULER's tasks: essays of the haystack, SQuAD, HotpotQA, a long list of English words.

Each is read from a local file in the form its authors publish, or, asked for as `hub`, by lm-evaluation-harness from
where that downloads it.
"""

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from elastic.files import file_sha256

HUB = "hub"
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'\u2019\u201d)\]]*\s+(?=[\"'\u2018\u201c(\[]?[A-Z0-9])")

Questions = tuple[list[dict[str, Any]], list[str]]


@dataclass(frozen=True)
class RulerData:
    """Where the outside data is; None where it is not to be had.

    Attributes:
        essays: a text file, RULER's `PaulGrahamEssays.json`, a folder of text files, or `hub`.
        squad: `dev-v2.0.json` (or another file of SQuAD), or `hub`.
        hotpotqa: `hotpot_dev_distractor_v1.json`, or `hub`.
        words: RULER's `english_words.json` or a text file with a word a line; None takes the package `english-words`.
    """

    essays: str | None = None
    squad: str | None = None
    hotpotqa: str | None = None
    words: str | None = None

    def __post_init__(self) -> None:
        for name in ("essays", "squad", "hotpotqa", "words"):
            place = getattr(self, name)
            if place is not None and (place != HUB or name == "words") and not Path(place).exists():
                ways = "a file" if name == "words" else f"a file{' or folder' if name == 'essays' else ''}, or {HUB!r}"
                raise FileNotFoundError(f"{name}={place!r} does not exist; expected {ways}")

    def checksum(self, name: str) -> str | None:
        """sha256 of what is read as `name`; `hub` unchanged."""
        place: str | None = getattr(self, name)
        if place is None or place == HUB:
            return place
        return file_sha256(*(_files(Path(place)) if name == "essays" else [Path(place)]))

    @cached_property
    def haystack(self) -> list[str]:
        """Words of the essays."""
        if self.essays is None:
            raise ValueError("no essays were given; name a file or folder")
        if self.essays == HUB:
            from lm_eval.tasks.ruler.prepare_niah import get_haystack

            words = list(_downloaded("the essays", lambda: get_haystack("essay")))
        else:
            words = " ".join(_text(file) for file in _files(Path(self.essays))).split()
        if not words:
            raise ValueError(f"essays={self.essays!r} hold no words; expected English prose")
        return words

    @cached_property
    def long_words(self) -> list[str] | None:
        """The long list of words, sorted; None where there is none."""
        if self.words is not None:
            return _word_list(Path(self.words))
        if importlib.util.find_spec("english_words") is None:
            return None
        from english_words import get_english_words_set

        return sorted(get_english_words_set(["gcide"], alpha=True, lower=True))

    @cached_property
    def squad_questions(self) -> Questions:
        """Questions and documents of SQuAD, as the harness reads them."""
        from lm_eval.tasks.ruler import qa_utils

        return _questions("squad", self.squad, qa_utils.read_squad)

    @cached_property
    def hotpotqa_questions(self) -> Questions:
        """Questions and documents of HotpotQA, as the harness reads them."""
        from lm_eval.tasks.ruler import qa_utils

        return _questions("hotpotqa", self.hotpotqa, qa_utils.read_hotpotqa)


def sentences(text: str) -> list[str]:
    """Sentences of a text: cut after full stops, exclamation and question marks before a capital or a digit."""
    return [sentence for sentence in _SENTENCE_END.split(text.strip()) if sentence]


def _questions(name: str, place: str | None, read: Any) -> Questions:
    """The harness' own reader, with its download replaced by the local file."""
    from lm_eval.tasks.ruler import qa_utils

    if place is None:
        raise ValueError(f"no {name} was given; name its file")
    if place == HUB:
        found: Questions = _downloaded(name, read)
        return found
    download = qa_utils.download_json
    qa_utils.download_json = lambda url: _official_json(name, Path(url))
    try:
        questions, documents = read.__wrapped__(place)  # without its cache, which knows the path alone
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name}={place!r} is not in {name}'s published JSON format ({type(error).__name__}: {error}); "
            "fetch the official file"
        ) from error
    finally:
        qa_utils.download_json = download
    if not questions:
        raise ValueError(f"{name}={place!r} holds no question that has an answer")
    return questions, documents


def _official_json(name: str, file: Path) -> Any:
    data = _json(file)
    if name == "squad":  # version 1.1 has no unanswerable questions and does not say so
        for article in data["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    question.setdefault("is_impossible", False)
    return data


def _downloaded(what: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # hub, network and parser raise types of their own
        detail = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"{what} could not be downloaded ({type(error).__name__}: {detail}); "
            "fetch the file elsewhere and name it instead of 'hub'"
        ) from error


def _files(place: Path) -> list[Path]:
    if not place.is_dir():
        return [place]
    files = sorted(file for file in place.rglob("*") if file.suffix.lower() in (".txt", ".md", ".json"))
    if not files:
        raise ValueError(f"essays={str(place)!r} is a folder without .txt, .md or .json files")
    return files


def _text(file: Path) -> str:
    if file.suffix.lower() != ".json":
        return _read(file)
    data = _json(file)
    text = data.get("text") if isinstance(data, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{file} has no text under 'text', which RULER's essay file has")
    return text


def _word_list(file: Path) -> list[str]:
    if file.suffix.lower() != ".json":
        words = _read(file).split()
    else:
        data = _json(file)
        words = list(data.values()) if isinstance(data, dict) else data
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"words={str(file)!r} is not a JSON list or mapping of words")
    if not words:
        raise ValueError(f"words={str(file)!r} holds no words")
    return sorted(set(words))


def _json(file: Path) -> Any:
    try:
        return json.loads(_read(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not a complete JSON file ({error}); fetch it again") from error


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text (byte {error.start}); convert it, for example with `iconv -t utf-8`"
        ) from error
    except IsADirectoryError as error:
        raise ValueError(f"{file} is a folder; expected a file") from error
