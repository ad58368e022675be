"""Sentences, words in capitals and the language of a text, as IFEval's rules count them.

The reference implementation uses nltk and langdetect, so these do too (extra ``graders``), with nothing downloaded and
nothing random: Punkt runs on the parameters below instead of its trained English ones, langdetect from a fixed seed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from understudy.tasks.imports import require

# What Punkt has to know about English, without the final period. Its own parameters are a download.
_ABBREVIATIONS = """
a.d a.k.a a.m al approx apr assoc aug ave b.a b.c b.s blvd bros c.e capt cf co col corp d.c dec dept dr e.g esq est
etc feb fig figs ft gen gov hon i.e inc jan jr lt ltd m.d messrs mr mrs ms mt nov oct p.m p.p.s p.s ph.d pp prof rep
rev sen sept sgt sr st u.k u.n u.s u.s.a univ viz vol vols vs
"""
# Capitalised after an abbreviation or an ellipsis, these open a new sentence; another capital may belong to a name.
_OPENERS = """
a after all also although an and another any are as at because before both but by can do does each every few finally
first for from he her here his how however i if in is it its let many maybe meanwhile more most my next no not now on
once one or other our perhaps please second she since so some such that the their then there therefore these they
third this those though thus to we well what when where while who why with yes you your
"""
# langdetect draws at random; any fixed seed makes the same text the same language every time.
_SEED = 0


def count_sentences(text: str) -> int:
    """Sentences by Punkt: a new line alone ends none, and the number of a list item ("1.") is one."""
    return sum(1 for _ in load_sentences().span_tokenize(text))


def count_capital_words(text: str) -> int:
    """Words without a lower-case letter and with a capital. Hyphenated words are one, contractions are two."""
    from nltk.tokenize import NLTKWordTokenizer

    words, sentences = NLTKWordTokenizer(), load_sentences().tokenize(text)
    return sum(word.isupper() for sentence in sentences for word in words.tokenize(sentence))


def language_of(text: str) -> str | None:
    """langdetect's code ("en", "zh-cn"), or None for a text without anything to go by, such as digits."""
    from langdetect import LangDetectException

    detector = load_languages().create()
    detector.append(text)
    try:
        return detector.detect()
    except LangDetectException:
        return None


@lru_cache(maxsize=1)
def load_sentences() -> Any:
    """The sentence tokenizer. Raises ConfigError without nltk."""
    require("nltk", "grader ifeval")
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    parameters = PunktParameters()
    parameters.abbrev_types = set(_ABBREVIATIONS.split())
    parameters.sent_starters = set(_OPENERS.split())
    return PunktSentenceTokenizer(parameters)


@lru_cache(maxsize=1)
def load_languages() -> Any:
    """A factory of language detectors, with a seed of its own. Raises ConfigError without langdetect."""
    require("langdetect", "grader ifeval")
    from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.set_seed(_SEED)
    return factory
