import sys
import unicodedata
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from shopr1_rewards import Tokenizer, rouge_l_f1, similarity, tokenize
from tests.support.completions import slow_f1

REFERENCE = RougeScorer(["rougeL"], use_stemmer=False)


def reference_f1(predicted: str, truth: str) -> float:
    """Google's package. It takes the truth first."""
    return float(REFERENCE.score(truth, predicted)["rougeL"].fmeasure)


ASCII = st.text(st.characters(max_codepoint=127), max_size=40)
WORDS = st.sampled_from(["nav", "bar", "search", "Search", "input", "1", "0", "x2"])
SEPARATORS = st.sampled_from([".", "_", " ", "-", "+", "..", "\t"])
NAMES = st.lists(st.tuples(WORDS, SEPARATORS), max_size=12).map(lambda pairs: "".join(map("".join, pairs)))
TEXT = st.text(max_size=30) | NAMES
TOKENIZERS = pytest.mark.parametrize("tokenizer", list(Tokenizer))

# --- against Google's package -----------------------------------------------------------------------


def has_word(text: str) -> bool:
    return any(char.isascii() and char.isalnum() for char in text)


@given(ASCII | NAMES, ASCII | NAMES)
@example("", "")
@example("a\x00b\x7fc\x1f", "A B C")
@example("nav_bar.search_button", "nav_bar.search_input")
@example("+", "a + b")
@example("+", "+")
def test_unicode_equals_rouge_score_on_ascii(predicted: str, truth: str) -> None:
    if has_word(predicted) or has_word(truth):
        assert rouge_l_f1(predicted, truth) == pytest.approx(reference_f1(predicted, truth), abs=1e-12)
    else:  # Google's is 0, also of a value and itself, whose reward no answer could earn then
        alike = " ".join(predicted.split()) == " ".join(truth.split())
        assert rouge_l_f1(predicted, truth) == (alike and "" not in (predicted, truth))


SYMBOLS = st.characters(exclude_categories=["L", "M", "Nd"], min_codepoint=128) | st.sampled_from(
    "™®©℠№½¼¾⅓²³ªº°′″×–—’“”•…€£¥★☆✓🎁❤\ufe0f\u20e3\u200b\u200d\xad\xa0①⑩Ⅳ㎏㎝℃ⁿₓ❶🄋"
)
RETAIL = st.lists(WORDS | SEPARATORS | SYMBOLS | st.sampled_from(["Nike", "cup", "ml"]), max_size=12).map(
    "".join
)


@given(RETAIL, RETAIL)
@example("Nike™ Air", "Nike Air")
@example("1½ cups", "1 cup")
@example("1️⃣ pack", "1 pack")
@example("5 m²", "5 m")
@example("wire\u200bless", "wire less")
@example("Nº 5", "N° 5")
@example("$1\u03360\u0336", "$1 0")  # struck through, with marks that compose with no letter
@example("10\u0300", "10×")
def test_unicode_is_at_least_rouge_score_where_letters_and_digits_are_ascii(
    predicted: str, truth: str
) -> None:
    assert rouge_l_f1(predicted, truth) >= reference_f1(predicted, truth) - 1e-12


@given(TEXT, TEXT)
@example("İstanbul", "istanbul")  # lower() makes an "i" and a dot of the first letter
@example("5 \u212a", "5 K")  # the Kelvin sign's lower case is an ASCII "k"
def test_rouge_score_equals_rouge_score_on_any_text(predicted: str, truth: str) -> None:
    expected = pytest.approx(reference_f1(predicted, truth), abs=1e-12)
    assert rouge_l_f1(predicted, truth, Tokenizer.ROUGE_SCORE) == expected


# --- against a slow LCS -----------------------------------------------------------------------------

TOKENS = st.lists(st.sampled_from("abcdé"), max_size=30)


@given(TOKENS, TOKENS, st.integers(1, 6))
def test_f1_equals_that_of_a_slow_lcs(left: list[str], right: list[str], repeat: int) -> None:
    # Repeated, so that lists are longer than a machine word of bits, on which the fast LCS works.
    left, right = left * repeat, right * repeat
    expected = float(slow_f1(left, right))
    assert rouge_l_f1(" ".join(left), " ".join(right), Tokenizer.WHITESPACE) == expected


@given(TOKENS, TOKENS, st.integers(1, 6))
def test_the_lcs_is_googles(left: list[str], right: list[str], repeat: int) -> None:
    # Google's rounds precision and recall first; the LCS behind both is the same number.
    predicted, truth = (" ".join(tokens * repeat).replace("é", "e") for tokens in (left, right))
    lcs = rouge_l_f1(predicted, truth) * (len(left) + len(right)) * repeat / 2
    if left and right:
        score = REFERENCE.score(truth, predicted)["rougeL"]
        assert round(lcs) == round(score.precision * len(left) * repeat)
        assert lcs == pytest.approx(round(lcs), abs=1e-9)


@pytest.mark.parametrize(
    ("predicted", "truth", "f1"),
    [
        ("nav_bar.search_button", "nav_bar.search_input", 0.75),  # LCS 3 of 4 and 4: 6/8
        ("refinements.customer_reviews", "add_to_cart.buy_now", 0.0),  # nothing in common: 0/8
        ("disney gift", "disney gift card", 0.8),  # LCS 2 of 2 and 3: 4/5
        ("a b c d", "d c b a", 0.25),  # in order, only one: 2/8
        ("a a a", "a", 0.5),  # repetition does not pay: 2/4
        ("a x b y c", "a b c", 0.75),  # gaps are allowed: 6/8
        ("Search-Input", "search input", 1.0),
        ("平安扣", "平安扣", 1.0),
        ("玉佩 silver", "平安扣 silver", 2 / 7),  # 玉 佩 silver / 平 安 扣 silver: LCS 1 of 3 and 4
        ("平安", "平安扣", 0.8),  # 4/5
        ("", "", 0.0),
        ("", "tea", 0.0),
        ("tea", "", 0.0),
        # Without letters and digits the value is one token.
        ("…", "…", 1.0),
        ("👍", "👍", 1.0),
        ("❤\ufe0f", "❤", 1.0),
        ("★★★★☆", "★★★★☆", 1.0),
        ("★★★★☆", "★★★★★", 0.0),
        ("+", "＋", 1.0),
        (" + ", "+", 1.0),
        ("+", "-", 0.0),
        ("+", "tea", 0.0),
        ("🎁 tea", "tea", 1.0),
        (" ", "\u200b", 1.0),
        ("", " ", 0.0),
        # Symbols that mean letters or digits: as such, or as nothing.
        ("Nike™", "Nike", 1.0),
        ("Nike™", "nike tm", 2 / 3),  # as nike / nike tm
        ("Nike™", "NikeTM", 1.0),
        ("™", "tm", 1.0),
        ("Nestlé™ KitKat®", "nestlé kitkat", 1.0),
        ("华为™ 手机", "华为手机", 1.0),
        ("1½ cups", "1 1/2 cups", 1.0),
        ("1½ cups", "11/2 cups", 4 / 7),  # 1 cups / 11 2 cups as 1 1 2 cups / 11 2 cups: 2 · 2/(4 + 3)
        ("½ inch", "¼ inch", 1.0),  # as Google's; 1 2 inch / 1 4 inch would be 2/3
        ("½", "¼", 0.5),  # 1 2 / 1 4
        ("10²", "102", 0.0),
        ("x²", "x2", 1.0),
        ("H₂O", "h2o", 1.0),
        ("①②", "1 2", 1.0),
        ("500㎖", "500ml", 1.0),
        ("500㎖", "500", 1.0),
        ("№ 5", "No 5", 1.0),
        # Numbers of a script are no symbols.
        ("二〇二四", "二二四", 6 / 7),
        ("፩ ሰዓት", "፪ ሰዓት", 0.5),
        # Full-width letters are letters.
        ("ＵＳＢ cable", "ＨＤＭＩ cable", 0.5),
    ],
)
def test_hand_computed(predicted: str, truth: str, f1: float) -> None:
    assert rouge_l_f1(predicted, truth) == f1


# --- similarity --------------------------------------------------------------------------------------


@TOKENIZERS
@given(left=TEXT, right=TEXT)
def test_bounds_and_symmetry(tokenizer: Tokenizer, left: str, right: str) -> None:
    similarity = rouge_l_f1(left, right, tokenizer)
    assert 0.0 <= similarity <= 1.0
    assert similarity == rouge_l_f1(right, left, tokenizer)
    is_alike = tokenize(left, tokenizer) == tokenize(right, tokenizer) != []
    # The default also reads symbols as separators, so that values with other tokens can be alike.
    assert (similarity == 1.0) == is_alike or (tokenizer is Tokenizer.UNICODE and not is_alike)


@TOKENIZERS
@given(text=TEXT | RETAIL)
@example("™")
@example("½")
@example("\u200b")
@example("\u0301")
@example("\ud800")
def test_identity(tokenizer: Tokenizer, text: str) -> None:
    assert rouge_l_f1(text, text, tokenizer) == bool(tokenize(text, tokenizer))
    # Google's package drops all but a-z and 0-9, also from a value and itself.
    assert bool(tokenize(text, tokenizer)) == (text != "") or tokenizer is Tokenizer.ROUGE_SCORE


# --- tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        pytest.param("nav_bar.Search-INPUT", ["nav", "bar", "search", "input"], id="name"),
        pytest.param('1/4" TRS', ["1", "4", "trs"], id="measure"),
        pytest.param("café", ["café"], id="accent"),
        pytest.param("cafe\u0301", ["café"], id="accent, decomposed"),
        pytest.param("x\u0301 y", ["x\u0301", "y"], id="accent without a composed form"),
        pytest.param("\u0301a .\u0301b", ["a", "b"], id="accent on nothing"),
        pytest.param("STRASSE Straße", ["strasse", "strasse"], id="sharp s"),
        pytest.param("ΣΟΦΟΣ σοφος σοφοσ", ["σοφοσ"] * 3, id="final sigma"),
        pytest.param("чай Чёрный", ["чай", "чёрный"], id="Cyrillic"),
        pytest.param("حقيبة يد", ["حقيبة", "يد"], id="Arabic"),
        pytest.param("한국 인삼", ["한국", "인삼"], id="Hangul"),
        pytest.param(unicodedata.normalize("NFD", "한국"), ["한국"], id="Hangul, decomposed"),
        pytest.param("नमस्ते दुनिया", ["नमस्ते", "दुनिया"], id="Devanagari keeps its marks"),
        pytest.param("ที่นี่", ["ที่", "นี่"], id="Thai by character, with its marks"),
        pytest.param("お茶カップ", [*"お茶カップ"], id="Kana and Han"),
        pytest.param("ガ", ["ガ"], id="half-width Kana with its voicing mark"),
        pytest.param("カ\u3099", ["ガ"], id="Kana, decomposed"),
        pytest.param("𠮷野家", [*"𠮷野家"], id="Han beyond the BMP"),
        pytest.param("人々ー", [*"人々ー"], id="iteration and length marks"),
        pytest.param("watch表带silver", ["watch", "表", "带", "silver"], id="scripts side by side"),
        pytest.param("ＵＳＢ－Ｃ　２ｍ", ["usb", "c", "2m"], id="full-width"),
        pytest.param("ﬁne", ["fine"], id="ligature"),
        pytest.param("360\u200b\u200b AIO", ["360", "aio"], id="zero-width spaces"),
        pytest.param("ka\u00adffee\ufeff", ["kaffee"], id="soft hyphen, byte order mark"),
        pytest.param("می\u200cخواهم", ["میخواهم"], id="zero-width non-joiner"),
        pytest.param("❤\ufe0f tea", ["tea"], id="emoji with a variation selector"),
        pytest.param("x² ½", ["x2", "1", "2"], id="compatibility digits"),
        pytest.param(
            "1½ 10² x²y", ["1", "1", "2", "10", "2", "x2y"], id="compatibility digits beside digits"
        ),
        pytest.param("1\ufe0f\u20e32\ufe0f\u20e3", ["1", "2"], id="keycaps"),
        pytest.param("葛\U000e0100飾", ["葛", "飾"], id="variant of an ideograph"),
        pytest.param("", [], id="empty"),
        pytest.param("…—👍\u200b", ["...—👍"], id="no word"),
        pytest.param(" + \t +\n", ["+ +"], id="no word, ASCII"),
        pytest.param(" \u200b", [" "], id="blank"),
    ],
)
def test_unicode_tokens(text: str, tokens: list[str]) -> None:
    assert tokenize(text) == tokens


# Letters and digits from both ends of each block.
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("กฮ๙", id="Thai"),
        pytest.param("ກ໙", id="Lao"),
        pytest.param("ༀཀཬ", id="Tibetan"),
        pytest.param("ကဿ႙", id="Myanmar"),
        pytest.param("កឳ៹", id="Khmer"),
        pytest.param("々ぁん", id="Hiragana"),
        pytest.param("ァヺー", id="Katakana"),
        pytest.param("ㇰㇿ", id="Katakana, Ainu letters"),
        pytest.param("\u3400\u4dbf\u4e00\u9fff", id="Han"),
        pytest.param("\U00020000\U0002a6df\U0002b740\U00030000\U0003134a", id="Han, extensions"),
    ],
)
def test_scripts_without_spaces_are_cut_by_character(text: str) -> None:
    assert tokenize(text) == list(text)


@pytest.mark.parametrize("text", ["ƀʯ", "කෆ", "აჰ", "ሀፚ", "ꀀꒌ", "𐀀𐀁"])
def test_scripts_with_spaces_are_cut_by_word(text: str) -> None:
    assert tokenize(text) == [text]


@pytest.mark.parametrize(
    ("tokenizer", "text", "tokens"),
    [
        (Tokenizer.ROUGE_SCORE, "Nav_bar café 平安扣 2", ["nav", "bar", "caf", "2"]),
        (Tokenizer.WHITESPACE, " Nav_bar.x,  tea\n平安扣 ", ["Nav_bar.x,", "tea", "平安扣"]),
        (Tokenizer.WHITESPACE, " \n", [" \n"]),
        (Tokenizer.WHITESPACE, "", []),
        (Tokenizer.ROUGE_SCORE, "🎁 +", []),
        (Tokenizer.EXACT, " Nav bar ", [" Nav bar "]),
        (Tokenizer.EXACT, " ", [" "]),
        (Tokenizer.EXACT, "", []),
    ],
)
def test_other_tokens(tokenizer: Tokenizer, text: str, tokens: list[str]) -> None:
    assert tokenize(text, tokenizer) == tokens


@given(TEXT, TEXT)
def test_exact_is_equality(left: str, right: str) -> None:
    assert rouge_l_f1(left, right, Tokenizer.EXACT) == (left == right != "")


@given(ASCII | NAMES)
def test_zero_width_spaces_and_width_do_not_matter(text: str) -> None:
    full_width = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)
    assert tokenize("\u200b".join(text)) == tokenize(full_width) == tokenize(text)


@given(TEXT)
def test_composition_does_not_matter(text: str) -> None:
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    assert tokenize(forms[0]) == tokenize(forms[1]) == tokenize(text)


@given(TEXT, TEXT)
def test_words_of_parts(left: str, right: str) -> None:
    # Only words: a value without any is one token as a whole.
    tokens = [text for text in (left, right) if has_letter_or_digit(text)]
    if tokens:
        assert tokenize(f"{left} \n{right}") == [token for text in tokens for token in tokenize(text)]


def has_letter_or_digit(text: str) -> bool:
    return any(
        unicodedata.category(char)[0] in "LN" for char in unicodedata.normalize("NFKC", text).casefold()
    )


@given(TEXT | RETAIL)
def test_tokens_are_made_of_letters_marks_and_numbers(text: str) -> None:
    tokens = tokenize(text)
    assert all(tokens)
    if not has_letter_or_digit(text):
        assert len(tokens) == (text != "")
        return
    assert {unicodedata.category(char)[0] for char in "".join(tokens)} <= set("LMN")
    assert not any(unicodedata.category(token[0])[0] == "M" for token in tokens)


# --- work --------------------------------------------------------------------------------------------

MARKS = "\u0301\u0316"  # of two classes, in the wrong order
LONG = {
    "words": "a b ",
    "one word": "é",
    "marks": f"e{MARKS}",
    "marks only": MARKS,
    "ideographs": "茶",
    "numbers": "1½",
    "symbols": "™ ",
    "joiners": "a\u200d",
    "blank": "\u2003",
}


def lines(work: Callable[[], object]) -> int:
    """Lines of Python that run."""
    counted = 0

    def count(frame: Any, event: str, argument: object) -> Any:
        nonlocal counted
        counted += event == "line"
        return count

    sys.settrace(count)
    try:
        work()
    finally:
        sys.settrace(None)
    return counted


@pytest.mark.parametrize("piece", LONG.values(), ids=list(LONG))
def test_work_is_linear_in_the_predicted_value(piece: str) -> None:
    # Counted, not timed. The library's sorting of marks has a test of its own.
    truth = piece * 20
    short, long = (lines(lambda: rouge_l_f1(piece * n, truth)) for n in (1000, 2000))  # noqa: B023
    assert long <= 2.2 * short + 1000


@given(st.text(st.sampled_from("e茶 한가ﬁ½" + MARKS + "\u0344\u0345\u0327"), max_size=600))
@example("e" + MARKS * 200)
@example("\u0344" + MARKS * 200)
def test_marks_in_order_are_normalised_alike(text: str) -> None:
    for form in ("NFC", "NFKC"):
        ordered = similarity._ordered(form, text)
        assert unicodedata.normalize(form, ordered) == unicodedata.normalize(form, text)


def test_marks_are_sorted_before_they_are_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    # The library's own sorting is quadratic: 200,000 marks took half a minute, without another thread's turn.
    given: list[str] = []

    def normalize(form: Any, text: str) -> str:
        given.append(text)
        return unicodedata.normalize(form, text)

    library = SimpleNamespace(**vars(unicodedata) | {"normalize": normalize})
    monkeypatch.setattr(similarity, "unicodedata", library)
    tokenize("e" + MARKS * 1000)
    classes = [unicodedata.combining(char) for char in max(given, key=len)]
    assert len(classes) == 2001
    assert classes == sorted(classes)
