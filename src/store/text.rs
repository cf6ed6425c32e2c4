//! Search: the terms of a text, and whether a text matches a query.
//!
//! This module does no I/O. MongoDB's own text index finds no parts of words in Korean, Japanese or Chinese. So every
//! document has an array `terms` by which it can be found, with an ordinary index:
//! - scripts with spaces: words (UAX #29), split further at punctuation inside of words such as `example.com` and
//!   `snake_case`;
//! - scripts without spaces, and Hangul, whose words have endings: every two neighbouring characters of a run, and the
//!   run's last character. A run in a query becomes pairs that must all be present, and a single character is the
//!   beginning of a term;
//! - emoji, and all symbols that are not ASCII: each is a term (UAX #29 grapheme), and so is the first emoji of a
//!   sequence: `🤷` finds `🤷‍♀️`.
//!
//! All pairs may be present without being adjacent, so [`Query::fits`] checks the text itself afterwards. It also
//! checks for parts without terms: `&` or `->` between spaces in a query must occur in the text.
//!
//! Texts and queries are compared in the form that [`folded`] returns. A change of what is a term needs a new version
//! of the schema (see `schema`), since documents keep the terms they were written with.

use std::{borrow::Cow, collections::BTreeSet, fmt};

use icu_properties::{
    CodePointMapData, CodePointSetData,
    props::{DefaultIgnorableCodePoint, ExtendedPictographic, GeneralCategory, Script},
};
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use unicode_normalization::{
    UnicodeNormalization,
    char::{decompose_compatible, is_combining_mark},
};
use unicode_segmentation::UnicodeSegmentation;

/// Longest query, in characters. A longer one is refused.
pub const MAX_QUERY: usize = 256;

/// Maximum number of different words and runs in a query. A query with more is refused.
const MAX_PARTS: usize = 32;

/// Bytes of a message's text that are searchable.
const MAX_TEXT: usize = 8 << 10;

/// Maximum number of terms of a message. Further terms are not searchable.
const MAX_TERMS: usize = 512;

/// Longest term, in bytes. A longer word is found by its beginning.
const MAX_TERM: usize = 64;

/// Joins several emoji into one. Elsewhere it has no meaning for a search.
const JOINER: char = '\u{200d}';

/// Turns `#`, `*` or a digit into a keycap.
const KEYCAP: char = '\u{20e3}';

/// Stretches an Arabic word.
const TATWEEL: char = '\u{640}';

/// The only emoji that accepts tags: the flags of England, Scotland and Wales.
const BLACK_FLAG: char = '\u{1f3f4}';

/// Why a text can't be searched for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueryError {
    /// It is longer than [`MAX_QUERY`].
    #[error("at most {MAX_QUERY} characters can be searched for")]
    TooLong,
    /// It has more words than a query may have.
    #[error("at most {MAX_PARTS} different words can be searched for")]
    TooManyParts,
    /// Nothing in it is a term.
    #[error("nothing in {0:?} can be searched for: it has no letter, digit, emoji or symbol")]
    Nothing(String),
}

/// The searchable text of a message's body.
pub(super) struct Text(String);

/// A parsed query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Query {
    words: BTreeSet<String>,
    runs: BTreeSet<String>,
    /// Parts between spaces without a term. They must occur as they are.
    marks: BTreeSet<String>,
}

/// The condition on the terms of a candidate.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Term {
    /// Exactly this.
    Is(String),
    /// Beginning with this.
    Begins(String),
}

/// A searchable part of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part<'a> {
    /// A word, an emoji or another symbol.
    Word(&'a str),
    /// Characters of scripts that do not put spaces between words.
    Run(&'a str),
}

impl Text {
    /// The text of a body (JSON): itself if it is a string, its `text` if it has one, else all strings in it.
    pub(super) fn of(body: &str) -> Self {
        Self(folded(&text_of(body)))
    }

    /// Its terms, each once.
    pub(super) fn terms(&self) -> BTreeSet<&str> {
        let mut terms = BTreeSet::new();
        for part in parts(&self.0) {
            let (word, run) = match part {
                Part::Word(word) => (Some(word), ""),
                Part::Run(run) => (None, run),
            };
            for term in word.into_iter().chain(pairs(run)).chain(last(run)) {
                if terms.len() == MAX_TERMS {
                    return terms;
                }
                terms.insert(term);
            }
        }
        terms
    }
}

impl Query {
    /// Parses a query. There are no operators. An empty text gives an empty query.
    ///
    /// # Errors
    /// [`QueryError`]. No part of a query is ignored silently.
    pub(super) fn of(text: &str) -> Result<Self, QueryError> {
        if text.chars().nth(MAX_QUERY).is_some() {
            return Err(QueryError::TooLong);
        }
        let mut query = Self {
            words: BTreeSet::new(),
            runs: BTreeSet::new(),
            marks: BTreeSet::new(),
        };
        for chunk in folded(text).split_whitespace() {
            let mut found = false;
            for part in parts(chunk) {
                found = true;
                match part {
                    Part::Word(word) => query.words.insert(word.to_owned()),
                    Part::Run(run) => query.runs.insert(run.to_owned()),
                };
            }
            if !found {
                query.marks.insert(chunk.to_owned());
            }
        }
        if query.is_empty() && !text.trim().is_empty() {
            return Err(QueryError::Nothing(text.to_owned()));
        }
        if query.words.len() + query.runs.len() + query.marks.len() > MAX_PARTS {
            return Err(QueryError::TooManyParts);
        }
        Ok(query)
    }

    /// Whether it has no words and no runs.
    pub(super) fn is_empty(&self) -> bool {
        self.words.is_empty() && self.runs.is_empty()
    }

    /// Terms that every matching text has.
    pub(super) fn terms(&self) -> Vec<Term> {
        let words = self.words.iter().map(String::as_str);
        let exact: BTreeSet<&str> = words
            .chain(self.runs.iter().flat_map(|run| pairs(run)))
            .collect();
        let mut exact: Vec<&str> = exact.into_iter().collect();
        // The longest terms are usually the rarest.
        exact.sort_by_key(|term| std::cmp::Reverse(term.len()));
        exact.truncate(MAX_PARTS);
        if !exact.is_empty() {
            return exact
                .into_iter()
                .map(|term| Term::Is(term.to_owned()))
                .collect();
        }
        let single = self.runs.iter().next();
        single
            .map(|run| Term::Begins(run.clone()))
            .into_iter()
            .collect()
    }

    /// Whether a body contains everything in the query.
    pub(super) fn fits(&self, body: &str) -> bool {
        let text = Text::of(body);
        let words: BTreeSet<&str> = parts(&text.0)
            .filter_map(|part| match part {
                Part::Word(word) => Some(word),
                Part::Run(_) => None,
            })
            .collect();
        let has_words = self.words.iter().all(|word| words.contains(word.as_str()));
        let mut as_they_are = self.runs.iter().chain(&self.marks);
        has_words && as_they_are.all(|part| text.0.contains(part))
    }
}

/// The form in which texts are compared:
/// - without invisible characters, the Arabic tatweel, and skin tones;
/// - compatible forms as one (NFKC), except emoji; a single Hangul letter stays single;
/// - without case (full case folding; `ı` and `i` are the same, so that a text in capitals equals the text);
/// - without the marks that are accents or vowel signs in their script, see [`is_kept`];
/// - stroked Latin letters and ligatures, which Unicode does not decompose, as plain letters.
fn folded(text: &str) -> String {
    if text.is_ascii() {
        return text.to_ascii_lowercase();
    }
    let mut folded = String::with_capacity(text.len());
    let mut base = None;
    // Composed first, so that characters that belong together are together, and no Hangul letter is left that is part
    // of a syllable.
    for c in visible(text).nfc() {
        if is_pictograph(c) || matches!(c, '\u{ac00}'..='\u{d7a3}') {
            base = Some(c);
            folded.push(c);
            continue;
        }
        let alone = is_letter_of_hangul(c);
        decompose_compatible(c, |c| {
            if c == TATWEEL {
                return;
            }
            if is_combining_mark(c) {
                if base.is_some_and(|base| is_kept(c, base)) {
                    folded.push(c);
                }
                return;
            }
            base = Some(c);
            match alone {
                true => folded.push(compatible_letter(c)),
                false => fold_case(c, &mut folded),
            }
        });
    }
    folded.nfc().collect()
}

/// A text without invisible characters, and without what only changes the look of an emoji.
fn visible(text: &str) -> impl Iterator<Item = char> {
    let mut emoji = None;
    let mut joined = false;
    text.chars().flat_map(move |c| {
        let shown = if c.is_ascii() {
            true
        } else if is_pictograph(c) {
            let joiner = std::mem::take(&mut joined).then_some(JOINER);
            emoji = Some(c);
            return joiner.into_iter().chain(Some(c));
        } else if c == JOINER && emoji.is_some() {
            joined = true;
            false
        } else if is_skin_tone(c) {
            emoji.is_none()
        } else if is_tag(c) && emoji == Some(BLACK_FLAG) {
            return None.into_iter().chain(Some(c));
        } else {
            !CodePointSetData::new::<DefaultIgnorableCodePoint>().contains(c)
        };
        if shown {
            (emoji, joined) = (None, false);
        }
        None.into_iter().chain(shown.then_some(c))
    })
}

/// Whether a mark makes another letter of its base. Marks that are dropped: accents of Latin, Greek and Cyrillic,
/// except the breve of `й`; vowel signs of Arabic and Hebrew, and a hamza or madda on an alef; marks foreign to Korean,
/// Japanese and Chinese, except the dakuten of `が`. In other scripts (Devanagari, Thai, ...) all marks are kept, since
/// they are letters.
fn is_kept(mark: char, base: char) -> bool {
    match CodePointMapData::<Script>::new().get(base) {
        Script::Latin | Script::Greek | Script::Hebrew => false,
        Script::Cyrillic => mark == '\u{306}' && matches!(base, 'И' | 'и'),
        Script::Arabic => matches!(mark, '\u{653}'..='\u{655}') && base != '\u{627}',
        Script::Hangul | Script::Han | Script::Hiragana | Script::Katakana | Script::Bopomofo => {
            matches!(mark, '\u{3099}' | '\u{309a}')
        }
        Script::Common => mark == KEYCAP && matches!(base, '0'..='9' | '#' | '*'),
        _ => true,
    }
}

/// Whether a character is a single Hangul letter: conjoining, compatible, half-width, in brackets or in a circle. Such
/// letters next to each other do not form a syllable: `ㅋㅠ` is not `큐`.
fn is_letter_of_hangul(c: char) -> bool {
    matches!(c,
        '\u{1100}'..='\u{11ff}'
        | '\u{3131}'..='\u{318e}'
        | '\u{3200}'..='\u{320d}'
        | '\u{3260}'..='\u{326d}'
        | '\u{ffa0}'..='\u{ffdc}')
}

/// The compatible letter, as typed, for a conjoining one, which would join its neighbours. Obsolete letters without one
/// do not join in NFC.
fn compatible_letter(c: char) -> char {
    const FIRST: &str = "ㄱㄲㄴㄷㄸㄹㅁㅂㅃㅅㅆㅇㅈㅉㅊㅋㅌㅍㅎ";
    const VOWELS: &str = "ㅏㅐㅑㅒㅓㅔㅕㅖㅗㅘㅙㅚㅛㅜㅝㅞㅟㅠㅡㅢㅣ";
    const LAST: &str = "ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ";
    let (letters, first) = match c {
        '\u{1100}'..='\u{1112}' => (FIRST, '\u{1100}'),
        '\u{1161}'..='\u{1175}' => (VOWELS, '\u{1161}'),
        '\u{11a8}'..='\u{11c2}' => (LAST, '\u{11a8}'),
        // First letters of obsolete syllables that are last letters today.
        '\u{111a}' => return 'ㅀ',
        '\u{1121}' => return 'ㅄ',
        _ => return c,
    };
    letters.chars().nth((first..c).count()).unwrap_or(c)
}

/// Adds a character without its case, by converting to upper case and back: capitals differ less than small letters
/// (`ß`, `ς`, `ı`).
fn fold_case(c: char, folded: &mut String) {
    if c.is_ascii() {
        folded.push(c.to_ascii_lowercase());
        return;
    }
    // Lower case first, since the capital `ẞ` has no upper case.
    let capitals = c.to_lowercase().flat_map(char::to_uppercase);
    for c in capitals.flat_map(char::to_lowercase) {
        match c {
            'æ' => folded.push_str("ae"),
            'œ' => folded.push_str("oe"),
            'ø' => folded.push('o'),
            'ł' => folded.push('l'),
            'đ' => folded.push('d'),
            'ħ' => folded.push('h'),
            'ŧ' => folded.push('t'),
            c => folded.push(c),
        }
    }
}

/// Whether a character is an emoji, including those of later Unicode versions. Not keycaps and flags, which are made of
/// other characters.
fn is_pictograph(c: char) -> bool {
    !c.is_ascii() && CodePointSetData::new::<ExtendedPictographic>().contains(c)
}

fn is_skin_tone(c: char) -> bool {
    matches!(c, '\u{1f3fb}'..='\u{1f3ff}')
}

fn is_tag(c: char) -> bool {
    matches!(c, '\u{e0020}'..='\u{e007f}')
}

/// How a stretch of a folded text is split into parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Each grapheme is a part.
    Symbols,
    /// It is one run.
    Unspaced,
    /// It is split into words.
    Spaced,
}

impl Kind {
    fn of(c: char, next: Option<char>) -> Self {
        if is_symbol(c) || next == Some(KEYCAP) {
            Self::Symbols
        } else if is_unspaced(c) {
            Self::Unspaced
        } else {
            Self::Spaced
        }
    }
}

/// Whether a character is a symbol, or part of an emoji in a folded text. ASCII symbols count as punctuation: a `+` in
/// the index would find too much.
fn is_symbol(c: char) -> bool {
    if c.is_ascii() {
        return false;
    }
    let category = CodePointMapData::<GeneralCategory>::new().get(c);
    matches!(
        category,
        GeneralCategory::OtherSymbol
            | GeneralCategory::MathSymbol
            | GeneralCategory::CurrencySymbol
    ) || is_pictograph(c)
        || is_skin_tone(c)
        || is_tag(c)
        || matches!(c, JOINER | KEYCAP)
}

/// Whether a character is of a script that is searched by pairs: Han, kana, bopomofo, Hangul, Thai, Lao, Myanmar,
/// Khmer.
fn is_unspaced(c: char) -> bool {
    matches!(c,
        '\u{e01}'..='\u{eff}'
        | '\u{1000}'..='\u{109f}'
        | '\u{1100}'..='\u{11ff}'
        | '\u{1780}'..='\u{17d3}'
        | '\u{3005}'..='\u{3007}'
        | '\u{3041}'..='\u{309f}'
        | '\u{30a1}'..='\u{30fa}'
        | '\u{30fc}'..='\u{30ff}'
        | '\u{3105}'..='\u{318e}'
        | '\u{31a0}'..='\u{31ff}'
        | '\u{3400}'..='\u{4dbf}'
        | '\u{4e00}'..='\u{9fff}'
        | '\u{a960}'..='\u{a97c}'
        | '\u{ac00}'..='\u{d7fb}'
        | '\u{f900}'..='\u{faff}'
        | '\u{20000}'..='\u{3ffff}')
}

/// Whether a character can be part of a word.
fn is_of_word(c: char) -> bool {
    c.is_alphanumeric() || is_combining_mark(c)
}

/// The parts of a folded text.
fn parts(text: &str) -> impl Iterator<Item = Part<'_>> {
    let mut rest = text;
    let stretches = std::iter::from_fn(move || {
        let mut chars = rest.chars().peekable();
        let mut kind = None;
        let mut end = 0;
        while let Some(c) = chars.next() {
            let this = Kind::of(c, chars.peek().copied());
            if *kind.get_or_insert(this) != this {
                break;
            }
            end += c.len_utf8();
        }
        let (stretch, after) = rest.split_at_checked(end)?;
        rest = after;
        Some((kind?, stretch))
    });
    stretches.flat_map(|(kind, stretch)| {
        let of = |wanted: Kind| if kind == wanted { stretch } else { "" };
        let run = (kind == Kind::Unspaced).then_some(Part::Run(stretch));
        let symbols = of(Kind::Symbols).graphemes(true).flat_map(|symbol| {
            let first = symbol.split(|c| c == JOINER || is_tag(c)).next();
            let first = first.filter(|first| *first != symbol);
            first.into_iter().chain([symbol])
        });
        let words = of(Kind::Spaced)
            .split_word_bounds()
            .flat_map(|word| word.split(|c| !is_of_word(c)))
            .filter(|word| !word.chars().all(is_combining_mark));
        let words = symbols.chain(words);
        let words = words.map(|word| Part::Word(beginning(word, MAX_TERM)));
        run.into_iter().chain(words)
    })
}

/// Every two neighbouring characters.
fn pairs(run: &str) -> impl Iterator<Item = &str> {
    let ends = run.char_indices().skip(1).map(|(at, c)| at + c.len_utf8());
    run.char_indices()
        .zip(ends)
        .filter_map(|((start, _), end)| run.get(start..end))
}

/// The last character.
fn last(run: &str) -> Option<&str> {
    run.get(run.char_indices().next_back()?.0..)
}

/// At most `len` bytes of a text.
fn beginning(text: &str, len: usize) -> &str {
    text.get(..text.floor_char_boundary(len)).unwrap_or(text)
}

fn text_of(body: &str) -> Cow<'_, str> {
    let mut found = Found::default();
    // A text that serde does not accept as JSON (nested too deep, half a surrogate pair) is searchable up to that
    // point.
    let _incomplete = Strings {
        found: &mut found,
        depth: 0,
    }
    .deserialize(&mut serde_json::Deserializer::from_str(body));
    Cow::Owned(found.text.unwrap_or(found.strings))
}

/// Strings of a JSON text.
#[derive(Default)]
struct Found {
    /// All of them, separated by line ends.
    strings: String,
    /// The `text` of the outermost object.
    text: Option<String>,
}

/// Collects the strings of a JSON text.
struct Strings<'a> {
    found: &'a mut Found,
    depth: usize,
}

impl<'de> DeserializeSeed<'de> for Strings<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strings<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        let strings = &mut self.found.strings;
        let room = MAX_TEXT.saturating_sub(strings.len());
        strings.push_str(beginning(text, room));
        if strings.len() < MAX_TEXT {
            strings.push('\n');
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let depth = self.depth + 1;
        while let Some(key) = map.next_key::<Cow<'de, str>>()? {
            if self.depth > 0 || key != "text" {
                map.next_value_seed(Strings {
                    found: self.found,
                    depth,
                })?;
                continue;
            }
            let mut own = Found::default();
            let value: &serde_json::value::RawValue = map.next_value()?;
            let _incomplete = Strings {
                found: &mut own,
                depth,
            }
            .deserialize(&mut serde_json::Deserializer::from_str(value.get()));
            if value.get().starts_with('"') {
                self.found.text = Some(own.strings);
            } else {
                self.found.strings.push_str(&own.strings);
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let depth = self.depth + 1;
        while seq
            .next_element_seed(Strings {
                found: self.found,
                depth,
            })?
            .is_some()
        {
            if self.found.strings.len() >= MAX_TEXT {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
            }
        }
        Ok(())
    }

    fn visit_bool<E>(self, _value: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _value: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _value: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _value: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn terms(text: &str) -> Vec<String> {
        let body = serde_json::Value::from(text).to_string();
        Text::of(&body)
            .terms()
            .into_iter()
            .map(String::from)
            .collect()
    }

    fn fits(query: &str, text: &str) -> bool {
        let body = serde_json::Value::from(text).to_string();
        Query::of(query).unwrap().fits(&body)
    }

    /// Whether a query finds a text: by its terms, and in the text itself.
    fn finds(query: &str, text: &str) -> bool {
        let known = terms(text);
        let asked = Query::of(query).unwrap();
        let in_index = asked.terms().iter().all(|term| match term {
            Term::Is(term) => known.contains(term),
            Term::Begins(start) => known.iter().any(|known| known.starts_with(start.as_str())),
        });
        in_index && fits(query, text)
    }

    #[test]
    fn terms_are_words_or_pairs() {
        assert_eq!(
            terms("The Café, isn't it?"),
            ["cafe", "isn", "it", "t", "the"]
        );
        assert_eq!(
            terms("snake_case a.example.com"),
            ["a", "case", "com", "example", "snake"]
        );
        assert_eq!(terms("안녕하세요"), ["녕하", "세요", "안녕", "요", "하세"]);
        assert_eq!(
            terms("東京タワー go"),
            ["go", "タワ", "ワー", "ー", "京タ", "東京"]
        );
        assert_eq!(terms("한 v2"), ["v2", "한"]);
        assert_eq!(terms("ﾊﾝｶｸ ＡＢＣ"), terms("ハンカク abc"));
        assert_eq!(
            terms("한글"),
            terms("\u{1112}\u{1161}\u{11ab}\u{1100}\u{1173}\u{11af}")
        );
        assert_eq!(
            terms("👍🏽 ❤️ 👩‍👩‍👧"),
            ["❤", "👍", "👩", "👩\u{200d}👩\u{200d}👧"]
        );
        assert_eq!(
            terms("Straße ΣΟΦΟΣ Łódź İI"),
            ["ii", "lodz", "strasse", "σοφοσ"]
        );
        assert_eq!(terms("हिन्दी"), ["हिन्दी"]);
        assert_eq!(terms("... --- \u{0} \u{301} $!"), Vec::<String>::new());
    }

    #[test]
    fn a_text_has_bounded_terms() {
        let words: String = (0..2000).map(|n| format!("w{n} ")).collect();
        assert_eq!(terms(&words).len(), MAX_TERMS);
        let long = "x".repeat(MAX_TEXT * 2);
        assert_eq!(terms(&long), ["x".repeat(MAX_TERM)]);
        assert!(fits(&"x".repeat(200), &long));
        let body = format!("[{}]", vec!["\"가나다\""; 10_000].join(","));
        assert!(Text::of(&body).0.len() <= MAX_TEXT);
    }

    #[test]
    fn the_text_of_a_body() {
        for (body, text) in [
            (r#""Hi\n""#, "hi\n\n"),
            (r#"{"a":["b",{"c":"d"}],"n":1.0e3}"#, "b\nd\n"),
            (r#"{"a":"b","text":"c","d":"e"}"#, "c\n"),
            (r#"{"text":["a"],"b":{"text":"c"}}"#, "a\nc\n"),
            ("null", ""),
            ("17", ""),
            (r#"["a","\ud800","b"]"#, "a\n"),
            ("[\"a\",", "a\n"),
            ("", ""),
        ] {
            assert_eq!(Text::of(body).0, text, "{body}");
        }
        let deep = format!("[\"a\",{}{}]", "[".repeat(5_000), "]".repeat(5_000));
        assert_eq!(Text::of(&deep).0, "a\n");
    }

    #[test]
    fn a_query_asks_for_what_is_rare_and_looks_at_the_rest() {
        let terms = |query| Query::of(query).unwrap().terms();
        let is = |term: &str| Term::Is(term.to_owned());
        assert_eq!(terms("안녕 hello"), [is("안녕"), is("hello")]);
        assert_eq!(terms("가나다"), [is("가나"), is("나다")]);
        assert_eq!(terms("가"), [Term::Begins("가".to_owned())]);
        assert_eq!(terms("가 나다"), [is("나다")]);
        assert!(terms(&"가나다라마바사아자차카타파하".repeat(18)).len() <= MAX_PARTS);
        assert!(fits("나다 hello", "hello, 가나다"));
        assert!(!fits("가나다", "나다 가나"));
        assert!(!fits("hell", "hello"));
    }

    #[test]
    fn letters_of_hangul_that_stand_alone_are_not_glued() {
        for (query, text) in [
            ("ㅋㅋ", "ㅋㅋㅠㅠ"),
            ("ㅠㅠ", "ㅋㅋㅠㅠ"),
            ("ㅋㅠ", "ㅋㅋㅠㅠ"),
            ("ㅠㅠ", "아ㅠㅠㅠ 진짜"),
            ("네", "네ㄳ"),
            ("ㄳ", "네ㄳ"),
            ("ㄱㄱ", "집에ㄱㄱ"),
            ("ㅇㅇ", "ㅇㅇ 그래"),
            ("ㄴㄴ", "ㄴㄴ아니"),
            ("하ㅏ", "하ㅏㅏ"),
            // Half-width, conjoining, in circles and brackets: the same letters.
            ("ㅋㅋㅠ", "\u{ffbb}\u{ffbb}\u{ffd7}"),
            ("\u{ffbb}\u{ffd7}", "ㅋㅋㅠㅠ"),
            ("ㅋㅋ", "\u{110f}\u{110f}"),
            ("\u{110f}", "ㅋㅋ"),
            ("ㄳ", "\u{11aa}"),
            ("ㄱㄴ", "㉠㉡"),
            ("ㄱ", "㈀"),
            // A syllable stays one, however it is written.
            ("가", "㉮"),
            ("가", "㈎"),
            ("큐", "\u{110f}\u{1172}"),
            ("\u{1102}\u{1166}", "네ㄳ"),
            ("넧", "\u{1102}\u{1166}\u{11aa}"),
            // Obsolete letters.
            ("ㆍㅸ", "ㆍㅸ"),
        ] {
            assert!(finds(query, text), "{query} in {text}: {:?}", terms(text));
        }
        for (query, text) in [
            ("큐", "ㅋㅋㅠㅠ"),
            ("넧", "네ㄳ"),
            ("ㅋ", "큐"),
            ("가", "ㄱㅏ"),
        ] {
            assert!(!finds(query, text), "{query} in {text}");
        }
        assert_eq!(terms("ㅋㅋㅠㅠ"), ["ㅋㅋ", "ㅋㅠ", "ㅠ", "ㅠㅠ"]);
    }

    #[test]
    fn case_and_accents_are_folded_as_is_right_for_the_script() {
        for (one, other) in [
            ("ΚΑΛΗΜΕΡΑ", "Καλημέρα"),
            ("ΟΔΟΣ", "οδός"),
            ("ᾆδε Τῷ", "αδε τω"),
            ("ΑΫΠΝΊΑ", "αϋπνια"),
            ("Ёлка ещё", "ЕЛКА еще"),
            ("за́мок", "замок"),
            ("Їжак", "іжак"),
            ("Straße", "STRASSE"),
            ("STRAẞE", "straße"),
            ("İstanbul ISPARTA", "istanbul ısparta"),
            ("Việt Nam", "viet nam"),
            ("Łódź Ærø Ħal Đà", "lodz aero hal da"),
            ("ﬁnden ŉ", "FINDEN ʼN"),
            ("և", "ԵՒ"),
            ("ᏣᎳᎩ", "ꮳꮃꭹ"),
            ("მთავრული", "ᲛᲗᲐᲕᲠᲣᲚᲘ"),
            ("مُحَمَّد", "محمد"),
            ("العـــربية", "العربية"),
            ("أحمد آمن إلى", "احمد امن الى"),
            ("ﷲ", "الله"),
            ("שָׁלוֹם", "שלום"),
            ("שׁ", "ש"),
            ("Ｆｕｌｌ ﾊﾝｶｸ ｶﾞ", "full ハンカク ガ"),
            ("か\u{3099}", "が"),
            ("x² № ½ ﹩", "x2 no 1⁄2 $"),
            // Invisible characters.
            ("می\u{200c}خواهم", "میخواهم"),
            ("क्\u{200d}ष", "क्ष"),
            ("wo\u{200b}rd", "word"),
            ("wo\u{2060}\u{feff}rd", "word"),
            ("\u{202b}w\u{200f}ord\u{202c}", "word"),
            ("hy\u{ad}phen", "hyphen"),
            ("葛\u{e0100}", "葛"),
            ("❤\u{fe0f}", "❤\u{fe0e}"),
            ("a\u{200d}b", "ab"),
            ("안\u{200b}녕", "안녕"),
        ] {
            assert_eq!(folded(one), folded(other));
            assert!(finds(one, other) && finds(other, one), "{one} {other}");
        }
        for (one, other) in [
            ("мой", "мои"),
            ("か", "が"),
            ("ハ", "パ"),
            ("कि", "क"),
            ("हिन्दी", "हनद"),
            ("ก้", "ก"),
            ("ဗမာ", "ဗမ"),
            ("سؤال", "سوال"),
            ("ة", "ه"),
            ("한", "하"),
            ("þ", "th"),
        ] {
            assert_ne!(folded(one), folded(other));
        }
        // A mark without a letter can't be searched for.
        assert_eq!(folded("\u{301}x \u{20e3} ´"), "x   ");
    }

    #[test]
    fn every_emoji_is_a_term() {
        for emoji in [
            "⭐",
            "⏰",
            "⬆️",
            "©",
            "™️",
            "ℹ️",
            "Ⓜ️",
            "㊗️",
            "🅰️",
            "🈁",
            "‼️",
            "〰️",
            "▶️",
            "↔️",
            "✅",
            "❤️",
            "☎",
            "🀄",
            "🫠",
            "🪿",
            "1️⃣",
            "#️⃣",
            "*⃣",
            "🇰🇷",
            "🇰",
            "👍🏽",
            "🤷🏽\u{200d}♀️",
            "👩\u{200d}👩\u{200d}👧",
            "❤️\u{200d}🔥",
            "🏳️\u{200d}🌈",
            "🏴\u{e0067}\u{e0062}\u{e0065}\u{e006e}\u{e0067}\u{e007f}",
            // Other symbols.
            "☆",
            "→",
            "♪",
            "€",
            "￦",
            "∞",
            "🄪",
            "⠓",
            "\u{1faff}",
        ] {
            for text in [
                emoji.to_owned(),
                format!("{emoji} 회의"),
                format!("회의{emoji}"),
                format!("a{emoji}b"),
                format!("😀{emoji}1"),
            ] {
                assert!(finds(emoji, &text), "{emoji} in {text}: {:?}", terms(&text));
            }
            for text in ["회의", "word 17 # *", "😀"] {
                assert!(!finds(emoji, text), "{emoji} in {text}");
                assert!(
                    !finds(&format!("{emoji} {text}"), text),
                    "{emoji} in {text}"
                );
            }
        }
        for (query, text) in [
            ("👍", "👍🏽"),
            ("👍🏿", "👍🏽"),
            ("👍🏽", "👍"),
            ("🤷", "🤷🏽\u{200d}♀️"),
            ("👩", "👩\u{200d}💻"),
            (
                "🏴",
                "🏴\u{e0067}\u{e0062}\u{e0065}\u{e006e}\u{e0067}\u{e007f}",
            ),
            ("🇯🇵", "🇰🇷🇯🇵🇨🇳"),
            ("2️⃣", "1️⃣2️⃣3️⃣"),
            ("2⃣", "2️⃣"),
            ("🏽", "🏽"),
        ] {
            assert!(finds(query, text), "{query} in {text}: {:?}", terms(text));
        }
        for (query, text) in [
            ("👩\u{200d}💻", "👩💻"),
            ("💻", "👩\u{200d}💻"),
            ("🇷🇯", "🇰🇷🇯🇵"),
            ("1️⃣", "1"),
            ("1️⃣", "11 2️⃣"),
            ("i", "ℹ️"),
        ] {
            assert!(!finds(query, text), "{query} in {text}");
        }
        assert_eq!(terms("👩\u{200d}"), ["👩"]);
        assert_eq!(terms("👩\u{200d}a"), ["a", "👩"]);
    }

    #[test]
    fn no_part_of_a_query_is_ignored_without_a_word() {
        for nothing in [
            "&",
            "(.*) \"\" -",
            "...",
            "\0",
            "\u{200b}",
            "\u{301}",
            "$ + <",
            "\u{f8ff}",
            "、。",
        ] {
            let error = Query::of(nothing).unwrap_err();
            assert_eq!(error, QueryError::Nothing(nothing.to_owned()));
            assert!(
                error.to_string().contains(&format!("{nothing:?}")),
                "{error}"
            );
        }
        for nothing in ["", " ", "\n\t"] {
            assert!(Query::of(nothing).unwrap().is_empty());
        }
        // Parts without terms are checked in the text.
        for (query, text) in [
            ("fish & chips", "Fish & Chips!"),
            ("x -> y", "x -> y"),
            ("bonjour !", "Bonjour !"),
            ("회의 \u{200b} now", "회의 now"),
        ] {
            assert!(finds(query, text), "{query} in {text}");
        }
        for (query, text) in [
            ("fish & chips", "Fish and Chips"),
            ("x -> y", "y, x"),
            ("⭐ 회의", "회의"),
            ("⏰ ⭐", "⏰"),
            ("회의 \u{f8ff}", "회의"),
        ] {
            assert!(!finds(query, text), "{query} in {text}");
        }
        let words = |count: usize| (0..count).map(|n| format!("w{n} ")).collect::<String>();
        assert!(Query::of(&words(MAX_PARTS)).is_ok());
        let error = Query::of(&words(MAX_PARTS + 1)).unwrap_err();
        assert_eq!(error, QueryError::TooManyParts);
        assert!(Query::of(&"가 ".repeat(MAX_QUERY / 2)).is_ok());
        let error = Query::of(&"가".repeat(MAX_QUERY + 1)).unwrap_err();
        assert_eq!(error, QueryError::TooLong);
    }

    /// Upper case writes out the iota subscript, which is dropped here.
    fn has_iota_below(text: &str) -> bool {
        text.nfd().any(|c| c == '\u{345}')
    }

    #[test]
    fn every_character_is_folded_once_whatever_its_case_and_form() {
        for c in '\0'..=char::MAX {
            let text = String::from(c);
            let one = folded(&text);
            assert_eq!(folded(&one), one, "{c} {:x}", u32::from(c));
            assert_eq!(
                folded(&text.nfd().collect::<String>()),
                one,
                "{c} {:x}",
                u32::from(c)
            );
            // `Ⓜ` is an emoji, its lower case is not.
            let capitals = text.to_uppercase();
            if !has_iota_below(&text) && !capitals.chars().any(is_pictograph) {
                assert_eq!(folded(&capitals), one, "{c} {:x}", u32::from(c));
                assert_eq!(folded(&text.to_lowercase()), one, "{c} {:x}", u32::from(c));
            }
            if !is_pictograph(c) && !is_letter_of_hangul(c) {
                assert_eq!(
                    folded(&text.nfkc().collect::<String>()),
                    one,
                    "{c} {:x}",
                    u32::from(c)
                );
            }
        }
    }

    /// Words of several scripts, each with its own letters and marks, emoji, and separators.
    fn any_text() -> impl Strategy<Value = String> {
        let word = prop_oneof![
            "[a-zA-ZéÅßıİæøŁﬁĳǆ\u{301}\u{308}\u{323}]{1,8}",
            "[α-ωΑ-Ωάΐϋώἄῥ\u{301}\u{308}]{1,8}",
            "[а-яА-ЯйЙёЁїў\u{301}\u{306}]{1,8}",
            "[ا-يآأإؤئ\u{64b}-\u{655}\u{640}\u{670}]{1,8}",
            "[א-ת\u{5b0}-\u{5bc}\u{5c1}\u{5c2}\u{fb2a}-\u{fb36}]{1,8}",
            "[क-हा-्\u{200d}]{1,8}",
            "[ก-ฮะ-ู่-์]{1,8}",
            "[가-힣ㄱ-ㅣ]{1,8}",
            "[ぁ-んァ-ヶー一-七゛ｱ-ﾝﾞ]{1,8}",
            "[0-9Ａ-Ｚａ-ｚ²№]{1,8}",
            "[😀👍🏽\u{200d}👩❤\u{fe0f}⭐©™🇰🇷🏴\u{e0067}→€1\u{20e3}]{1,8}",
            "[!-/:-@、。…「」]{1,3}",
            "[a가\u{200b}\u{ad}\u{feff}\u{2060}]{1,8}",
        ];
        let space = prop_oneof![Just(" "), Just("\n"), Just("\u{3000}"), Just(", ")];
        let words = prop::collection::vec((word, space), 1..8);
        words.prop_map(|words| {
            words
                .into_iter()
                .flat_map(|(word, space)| [word, space.to_owned()])
                .collect()
        })
    }

    proptest! {
        #[test]
        fn a_text_is_found_by_itself_and_its_words_in_any_case_and_form(text in any_text()) {
            let words = text.split(|c: char| c.is_whitespace() || c == ',');
            let known = terms(&text);
            for named in words.chain([text.as_str()]) {
                let mut forms = vec![
                    named.to_owned(),
                    named.to_uppercase(),
                    named.to_lowercase(),
                    named.nfc().collect(),
                    named.nfd().collect(),
                ];
                // They combine Hangul letters, and make words of `™`.
                if !named.chars().any(|c| is_letter_of_hangul(c) || is_pictograph(c)) {
                    forms.extend([named.nfkc().collect(), named.nfkd().collect()]);
                }
                for form in forms {
                    match Query::of(&form) {
                        Ok(query) if query.is_empty() => {}
                        Ok(_) => prop_assert!(finds(&form, &text), "{form:?} in {text:?}: {known:?}"),
                        Err(QueryError::Nothing(_)) => {
                            prop_assert_eq!(terms(named), Vec::<String>::new(), "{:?}", form);
                        }
                        Err(QueryError::TooLong | QueryError::TooManyParts) => {}
                    }
                }
            }
        }

        #[test]
        fn whatever_is_in_a_text_finds_it(text in "[가-갸a-cあ-う한東京A-C é.,'👍 ]{1,30}", from in 0..30_usize, len in 1..30_usize) {
            let chars: Vec<char> = text.chars().collect();
            let start = from.min(chars.len());
            // Whole words, and any part of a run.
            let cut: String = chars[start..].iter().take(len).collect();
            let before = chars[..start].last().is_some_and(|c| is_of_word(*c) && !is_unspaced(*c));
            let after = chars.get(start + len).is_some_and(|c| is_of_word(*c) && !is_unspaced(*c));
            prop_assume!(!before && !after);
            prop_assume!(Query::of(&cut).is_ok());
            prop_assert!(finds(&cut, &text), "{cut:?} in {text:?}: {:?}", terms(&text));
        }

        #[test]
        fn any_query_and_any_body_are_harmless(query in "\\PC{0,300}", body in "\\PC{0,100}") {
            if let Ok(query) = Query::of(&query) {
                let _harmless = query.fits(&body);
                prop_assert!(query.terms().len() <= MAX_PARTS);
            }
        }
    }
}
