# SPDX-License-Identifier: Apache-2.0
"""Texts to send: made from fixed word lists and a seed, never the same one twice in a run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Each is one token of BERT's uncased vocabulary, so N words are N + 2 tokens (tests/perf).
_WORD_LIST = """
about above across action after again against air all almost also always among animal answer
apple area arm around art ask autumn away back bad ball bank base beach bear beautiful bed
before begin behind believe bell below best better between big bird black blood blue board boat
body book border both bottom box boy branch bread break bridge bright bring brother brown build
building burn business but buy by call camp captain car care carry castle cat catch cause cell
center century chair chance change check child church circle city class clean clear climb clock
close cloud coast coat cold color come common company complete computer cook cool copper corner
cost cotton country course cover cross crowd cry current cut dance danger dark daughter day deal
deep desert design doctor dog door double doubt down draw dream dress drink drive drop dry dust
early earth east easy eat edge effect egg eight electric empty end energy engine enough enter
evening every exact example eye face fact fall family famous far farm fast father field fight
figure final find finger finish fire first fish five flat floor flow flower fly follow food foot
force forest forget form forward four free fresh friend front fruit full game garden gas gate
gather general gentle girl give glass go gold good grand grass gray great green ground group
grow guess guide hair half hand happy harbor hard heart heat heavy help high hill history hold
home hope horse hospital hot hour house human hundred hunt ice idea inch industry insect iron
island job join journey judge jump keep key king kitchen knife know lake language large last
late laugh law lead leaf learn leave left leg letter level library life light line listen little
local long lost love low machine main make map mark market master matter measure meat metal
method middle milk mind minute mirror modern moment money month moon morning mother motion
mountain mouth move music name nation nature neck needle new night noise north note nothing
number ocean office oil old open orange order other over page paint paper parent park part party
pass past path pattern people piano picture piece place plain planet plant plate play point
police pool poor port position power present pretty problem produce proper provide pull pure
push question quick quiet race radio rain reach read real reason record red region rest rich
ride right ring river road rock roll roof room root rope round rule run safe sail salt same sand
say school science sea season seat second seed send sense service seven shade shape share sharp
ship shop short shoulder show side sign silver simple sister sleep slow small smell smile smoke
snow soap society soft soil soldier song sound south space speak special speed spend spring
square stage stand star station steam steel step stone stop store storm story street strong
student study sugar summer sun support surface system table tail talk teach teacher team test
thank theory thick thin thought three throw ticket time tiny together tool top touch tower town
trade train travel tree trip trouble truck true turn twelve uncle under unit use valley value
village visit voice wait walk wall war warm wash watch water wave weather week weight west wheel
white wide wife wild wind window wine winter wire wise wonder wood word work world write wrong
yard year yellow young
"""
WORDS = tuple(_WORD_LIST.split())

_HARD = (
    "",
    "?",
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "WHY IS EVERYTHING IN CAPITALS?!",
    "Prices rose 3.7 % to $1,299.99 (from €1,180) on 2024-02-29.",
    "def f(x): return {k: v for k, v in x.items() if v is not None}",
    "https://example.com/path?query=1&other=two#part",
    "naïve café, Ångström, Łódź, São Paulo, Zürich",
    "Пример предложения на русском языке",
    "これは日本語の文です。",
    "这是一个中文句子。",
    "هذه جملة باللغة العربية",
    "smile 😀 and wave 👋🏽 and a family 👨‍👩‍👧",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "tabs\tand\nline\r\nbreaks   and   blanks",
    "x" * 300,
)


class Texts:
    """A source of texts that repeats none, the same ones in every run."""

    def __init__(self, seed: int = 20) -> None:
        self._random = np.random.default_rng(seed)
        self._given: set[str] = set()

    def of_words(self, least: int, most: int | None = None) -> str:
        """A new text of `least` to `most` words (evenly spread), or of exactly `least`."""
        while True:
            count = int(self._random.integers(least, (most or least) + 1))
            text = " ".join(WORDS[i] for i in self._random.integers(0, len(WORDS), count))
            if text not in self._given:
                self._given.add(text)
                return text


def blanks(number: int) -> str:
    """A number as blanks and tabs: behind a text they change its bytes, and not its tokens."""
    return format(number, "b").replace("0", " ").replace("1", "\t")


def of_tokens(tokens: int) -> Callable[[Texts], str]:
    """Makes texts of exactly so many tokens, [CLS] and [SEP] included."""
    return lambda texts: texts.of_words(tokens - 2)


def mixed(texts: Texts) -> str:
    """A text of 5 to 60 words."""
    return texts.of_words(5, 60)


def for_quality(count: int = 200) -> list[str]:
    """Texts to compare vectors on: awkward ones, short to long, and some beyond any limit."""
    texts = Texts(seed=200)
    made = list(_HARD)
    while len(made) < count:
        # One in ten is far longer than the 256 tokens that the model reads.
        made.append(texts.of_words(300, 600) if len(made) % 10 == 0 else texts.of_words(1, 120))
    return made[:count]
