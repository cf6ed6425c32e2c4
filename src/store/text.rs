//! What a search looks for: the terms of a text, and whether a text has what a query names.
//!
//! Pure. MongoDB's own text index finds no parts of words in Korean, Japanese or Chinese; so every document has an array
//! `terms` with what it can be found by, in an ordinary index:
//! - scripts with spaces: words (UAX #29), split further at what is inside of `example.com` and `snake_case`;
//! - scripts without, and Hangul, whose words have endings: every two neighbouring characters of a run, and the run's last
//!   character. So a run in a query becomes pairs that must all be there, and a single character is the beginning of a term.
//!
//! Pairs may be there without standing together: [`Query::fits`] looks at the text itself afterwards.
//!
//! Terms are NFKC in lower case, Latin without diacritics: `Café` and `cafe` are one. Whoever changes what is a term changes
//! the schema's version (see `schema`): documents keep the terms they were written with.

use std::{borrow::Cow, collections::BTreeSet, fmt};

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use unicode_normalization::{UnicodeNormalization, char::is_combining_mark};
use unicode_segmentation::UnicodeSegmentation;

/// Longest query that is searched for, in characters: what comes after is not looked at.
pub const MAX_QUERY: usize = 256;

/// Most words, and runs of characters, of one query.
const MAX_PARTS: usize = 32;

/// How much of a message's text can be found, in bytes.
const MAX_TEXT: usize = 8 << 10;

/// Most terms of one message.
const MAX_TERMS: usize = 512;

/// Longest term, in bytes: a longer word is found by its beginning.
const MAX_TERM: usize = 64;

/// The text of a message's body as it is searched.
pub(super) struct Text(String);

/// What a search names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Query {
    words: BTreeSet<String>,
    runs: BTreeSet<String>,
}

/// What a term must be for a document to be a candidate.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Term {
    /// Exactly this.
    Is(String),
    /// Beginning with this.
    Begins(String),
}

/// A part of a text that can be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part<'a> {
    /// A word, or a pictogram.
    Word(&'a str),
    /// Characters of scripts that do not put spaces between words.
    Run(&'a str),
}

impl Text {
    /// The text of a body (JSON): itself if it is a string, its `text` if it has one, else all strings in it.
    pub(super) fn of(body: &str) -> Self {
        Self(normalised(&text_of(body)))
    }

    /// What it can be found by, each once.
    pub(super) fn terms(&self) -> BTreeSet<&str> {
        let mut terms = BTreeSet::new();
        for part in parts(&self.0) {
            match part {
                Part::Word(word) => {
                    terms.insert(word);
                }
                Part::Run(run) => terms.extend(pairs(run).chain(last(run))),
            }
            if terms.len() > MAX_TERMS {
                break;
            }
        }
        while terms.len() > MAX_TERMS {
            terms.pop_last();
        }
        terms
    }
}

impl Query {
    /// What `text` names: everything that is a word; nothing in it is an operator.
    pub(super) fn of(text: &str) -> Self {
        let end = text.char_indices().nth(MAX_QUERY);
        let text = normalised(end.and_then(|(end, _)| text.get(..end)).unwrap_or(text));
        let (mut words, mut runs) = (BTreeSet::new(), BTreeSet::new());
        for part in parts(&text).take(MAX_PARTS) {
            match part {
                Part::Word(word) => words.insert(word.to_owned()),
                Part::Run(run) => runs.insert(run.to_owned()),
            };
        }
        Self { words, runs }
    }

    /// Whether it names nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.words.is_empty() && self.runs.is_empty()
    }

    /// Terms that every text which fits has.
    pub(super) fn terms(&self) -> Vec<Term> {
        let words = self.words.iter().map(String::as_str);
        let exact: BTreeSet<&str> = words
            .chain(self.runs.iter().flat_map(|run| pairs(run)))
            .collect();
        let mut exact: Vec<&str> = exact.into_iter().collect();
        // The longest are the rarest, as a rule.
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

    /// Whether a body has everything that it names.
    pub(super) fn fits(&self, body: &str) -> bool {
        let text = Text::of(body);
        let words: BTreeSet<&str> = parts(&text.0)
            .filter_map(|part| match part {
                Part::Word(word) => Some(word),
                Part::Run(_) => None,
            })
            .collect();
        let has_words = self.words.iter().all(|word| words.contains(word.as_str()));
        has_words && self.runs.iter().all(|run| text.0.contains(run))
    }
}

/// Compatible forms as one, lower case, Latin without diacritics, without what can't be seen.
fn normalised(text: &str) -> String {
    if text.is_ascii() {
        return text.to_ascii_lowercase();
    }
    let mut after_latin = false;
    let unmarked = text.nfkd().filter(|c| {
        if is_invisible(*c) {
            return false;
        }
        if is_combining_mark(*c) {
            return !after_latin;
        }
        after_latin = matches!(c, 'A'..='Z' | 'a'..='z' | '\u{c0}'..='\u{24f}');
        true
    });
    let mut folded = String::with_capacity(text.len());
    for c in unmarked.flat_map(char::to_lowercase) {
        match c {
            // Letters that Unicode does not take apart.
            'ß' => folded.push_str("ss"),
            'æ' => folded.push_str("ae"),
            'œ' => folded.push_str("oe"),
            'ø' => folded.push('o'),
            'ł' => folded.push('l'),
            'đ' => folded.push('d'),
            'ı' => folded.push('i'),
            'ς' => folded.push('σ'),
            c => folded.push(c),
        }
    }
    folded.nfc().collect()
}

/// Soft hyphen, space without width, byte order mark, choice of a glyph, tone of a skin.
fn is_invisible(c: char) -> bool {
    matches!(
        c,
        '\u{ad}' | '\u{200b}' | '\u{feff}' | '\u{fe0e}' | '\u{fe0f}' | '\u{1f3fb}'..='\u{1f3ff}'
    )
}

/// Whether a character is of a script that is searched by pairs: Han, kana, bopomofo, Hangul, Thai, Lao, Myanmar, Khmer.
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
    let pictogram = matches!(c, '\u{2600}'..='\u{27bf}' | '\u{1f000}'..='\u{1faff}' | '\u{200d}');
    c.is_alphanumeric() || is_combining_mark(c) || pictogram
}

/// The parts of a normalised text.
fn parts(text: &str) -> impl Iterator<Item = Part<'_>> {
    let mut rest = text;
    let stretches = std::iter::from_fn(move || {
        let unspaced = is_unspaced(rest.chars().next()?);
        let end = rest.find(|c| is_unspaced(c) != unspaced);
        let (stretch, after) = rest.split_at(end.unwrap_or(rest.len()));
        rest = after;
        Some((unspaced, stretch))
    });
    stretches.flat_map(|(unspaced, stretch)| {
        let run = unspaced.then_some(Part::Run(stretch));
        let words = if unspaced { "" } else { stretch };
        let words = words
            .split_word_bounds()
            .flat_map(|word| word.split(|c| !is_of_word(c)))
            .filter(|word| {
                word.chars()
                    .any(|c| c != '\u{200d}' && !is_combining_mark(c))
            })
            .map(|word| Part::Word(beginning(word, MAX_TERM)));
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
    // What is no JSON to serde (nested deeper than it goes, half a surrogate pair) is searched up to there.
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
    /// All of them, with line ends between.
    strings: String,
    /// The `text` of the outermost object.
    text: Option<String>,
}

/// Collects strings; answers whether it was one.
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
        Query::of(query).fits(&body)
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
        assert_eq!(terms("👍🏽 ❤️ 👩‍👩‍👧"), ["❤", "👍", "👩\u{200d}👩\u{200d}👧"]);
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
        let terms = |query| Query::of(query).terms();
        let is = |term: &str| Term::Is(term.to_owned());
        assert_eq!(terms("안녕 hello"), [is("안녕"), is("hello")]);
        assert_eq!(terms("가나다"), [is("가나"), is("나다")]);
        assert_eq!(terms("가"), [Term::Begins("가".to_owned())]);
        assert_eq!(terms("가 나다"), [is("나다")]);
        assert!(Query::of("(.*) \"\" -").is_empty());
        assert!(terms(&"가나다라마바사아자차카타파하".repeat(500)).len() <= MAX_PARTS);
        assert!(fits("나다 hello", "hello, 가나다"));
        assert!(!fits("가나다", "나다 가나"));
        assert!(!fits("hell", "hello"));
    }

    proptest! {
        #[test]
        fn whatever_is_in_a_text_finds_it(text in "[가-갸a-cあ-う한東京A-C é.,'👍 ]{1,30}", from in 0..30_usize, len in 1..30_usize) {
            let chars: Vec<char> = text.chars().collect();
            let start = from.min(chars.len());
            // Whole words, and any part of a run.
            let cut: String = chars[start..].iter().take(len).collect();
            let before = chars[..start].last().is_some_and(|c| is_of_word(*c) && !is_unspaced(*c));
            let after = chars.get(start + len).is_some_and(|c| is_of_word(*c) && !is_unspaced(*c));
            prop_assume!(!before && !after);
            prop_assert!(fits(&cut, &text), "{cut:?} in {text:?}");
            let known = terms(&text);
            for term in Query::of(&cut).terms() {
                let found = match &term {
                    Term::Is(term) => known.contains(term),
                    Term::Begins(start) => known.iter().any(|known| known.starts_with(start.as_str())),
                };
                prop_assert!(found, "{term:?} of {cut:?} in {text:?}: {known:?}");
            }
        }

        #[test]
        fn any_query_and_any_body_are_harmless(query in "\\PC{0,300}", body in "\\PC{0,100}") {
            let _harmless = Query::of(&query).fits(&body);
            prop_assert!(Query::of(&query).terms().len() <= MAX_PARTS);
        }
    }
}
