//! Content of valid JSON that many clients can't read.

use std::fmt;

/// Maximum nesting of arrays and objects for which a payload is passed on as JSON, whatever `limits.json_depth` says: a
/// stored message keeps its form when that limit changes. Common parsers and MongoDB allow 100 levels or more, and a
/// page adds a few of its own.
pub const MAX_JSON_DEPTH: usize = 96;

/// The byte order mark that some programs write before a text.
const MARK: &str = "\u{feff}";

/// Why valid JSON is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    /// Arrays and objects are nested deeper than this number of levels.
    Deep(usize),
    /// A string has an escape such as `\ud83d` that is only half of a character.
    LoneSurrogate,
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Deep(most) => write!(f, "is nested deeper than {most} levels"),
            Self::LoneSurrogate => f.write_str(
                "has a lone surrogate: a \\u escape that is only half of a character, as \\ud83d",
            ),
        }
    }
}

/// Checks valid JSON for content that clients can't read: more than `most` levels, or lone surrogates in keys or other
/// strings. Uses neither recursion nor allocation.
#[must_use]
pub fn json_flaw(json: &[u8], most: usize) -> Option<Flaw> {
    // Nearly all bodies have few brackets and no such escape, which is checked quickly.
    if brackets(json) <= most && !has_unicode_escape(json) {
        return None;
    }
    let mut depth = 0;
    let mut bytes = json.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'{' | b'[' => {
                depth += 1;
                if depth > most {
                    return Some(Flaw::Deep(most));
                }
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            b'"' => {
                let (within, rest) = string(bytes.as_slice());
                if within.is_err() {
                    return Some(Flaw::LoneSurrogate);
                }
                bytes = rest.iter();
            }
            _ => {}
        }
    }
    None
}

/// The number of opening brackets, including those in strings.
fn brackets(json: &[u8]) -> usize {
    // Sums of one byte allow the compiler to process many bytes at once.
    let in_chunk = |chunk: &[u8]| {
        let opens = chunk.iter().map(|byte| u8::from(byte | 0x20 == b'{'));
        usize::from(opens.sum::<u8>())
    };
    json.chunks(usize::from(u8::MAX)).map(in_chunk).sum()
}

fn has_unicode_escape(json: &[u8]) -> bool {
    memchr::memchr_iter(b'\\', json).any(|at| json.get(at + 1) == Some(&b'u'))
}

/// A string has a lone surrogate.
struct Lone;

/// Skips a string after its opening quote, and its closing quote. Returns the rest.
fn string(mut text: &[u8]) -> (Result<(), Lone>, &[u8]) {
    while let Some(at) = text.iter().position(|byte| matches!(byte, b'"' | b'\\')) {
        let (_, rest) = text.split_at(at);
        match rest {
            [b'\\', b'u', escape @ ..] => {
                let Some(after) = unicode(escape) else {
                    return (Err(Lone), &[]);
                };
                text = after;
            }
            [b'\\', _, after @ ..] => text = after,
            [_quote, after @ ..] => return (Ok(()), after),
            [] => break,
        }
    }
    (Ok(()), &[])
}

/// Skips the four digits of an escape, and the second escape of a pair; `None` for half of a pair.
fn unicode(escape: &[u8]) -> Option<&[u8]> {
    let (first, rest) = digits(escape)?;
    match first {
        0xd800..=0xdbff => {
            let (second, rest) = digits(rest.strip_prefix(b"\\u")?)?;
            (0xdc00..=0xdfff).contains(&second).then_some(rest)
        }
        0xdc00..=0xdfff => None,
        _ => Some(rest),
    }
}

fn digits(text: &[u8]) -> Option<(u16, &[u8])> {
    let (digits, rest) = text.split_first_chunk::<4>()?;
    let mut value = 0;
    for digit in digits {
        let digit = char::from(*digit).to_digit(16)?;
        value = value << 4 | u16::try_from(digit).ok()?;
    }
    Some((value, rest))
}

/// `text` without a byte order mark before it.
#[must_use]
pub fn without_mark(text: &[u8]) -> &[u8] {
    text.strip_prefix(MARK.as_bytes()).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, value::RawValue};

    use super::*;

    fn nested(open: &str, inner: &str, close: &str, levels: usize) -> String {
        format!("{}{inner}{}", open.repeat(levels), close.repeat(levels))
    }

    #[test]
    fn depth_is_counted_outside_of_strings() {
        for (json, deep) in [
            (nested("[", "", "]", 64), false),
            (nested("[", "", "]", 65), true),
            (nested("{\"a\":", "1", "}", 64), false),
            (nested("{\"a\":", "1", "}", 65), true),
            (nested("[{\"[\":", "\"}\"", "}]", 32), false),
            (nested("[{\"[\":", "[]", "}]", 32), true),
            (nested("[ ", "\"\\\"\"", " ] ", 20_000), true),
            // Brackets side by side are not nested, and brackets in strings are text.
            (format!("[{}0]", "[[]],".repeat(1000)), false),
            (format!("\"{}\"", "[".repeat(1000)), false),
            (format!("{{\"\\\"{}\":1}}", "{".repeat(1000)), false),
            ("1".to_owned(), false),
        ] {
            assert!(serde_json::from_str::<&RawValue>(&json).is_ok(), "{json}");
            let expected = deep.then_some(Flaw::Deep(64));
            assert_eq!(json_flaw(json.as_bytes(), 64), expected, "{json}");
        }
    }

    #[test]
    fn half_a_pair_is_found_in_keys_and_values() {
        for (text, lone) in [
            (r"\ud83d", true),
            (r"\uD83D", true),
            (r"\udc4b", true),
            (r"\uDC00\ud83d", true),
            (r"a\udc4bb", true),
            (r"\ud83d\ud83d", true),
            (r"\ud83d\ud83d\udc4b", true),
            (r"\ud83dx\udc4b", true),
            (r"\ud83d \udc4b", true),
            (r"\ud83d\n", true),
            (r"\ud83d\\udc4b", true),
            (r"\ud83d\u0041", true),
            (r"\\\ud83d", true),
            (r"\ud83d\udc4b\ud83d", true),
            (r"\ud83d\udc4b", false),
            (r"\uD83D\uDC4B\ud83d\udc4b", false),
            (r"\\ud83d", false),
            (r"\\\\udc4b", false),
            (r"\ud7ff\ue000\uffff\u0000", false),
            ("👋 ud83d", false),
        ] {
            for json in [
                format!("\"{text}\""),
                format!("{{\"{text}\":1}}"),
                format!("[\"\\\\\",{{\"a\":[1,\"{text}\"]}}]"),
            ] {
                let expected = lone.then_some(Flaw::LoneSurrogate);
                assert_eq!(json_flaw(json.as_bytes(), 64), expected, "{json}");
                // A parser that decodes strings agrees.
                assert_eq!(
                    serde_json::from_str::<Value>(&json).is_err(),
                    lone,
                    "{json}"
                );
            }
        }
    }

    /// Strings and their escapes in any order, mostly not JSON.
    const SCRAPS: &str = "(\\\\u[dD][8-9a-fA-F][0-9a-f]{2}|\\\\u[0-9a-f]{4}|\\\\\\\\|\\\\\"|\"|[\\[\\]{}:, 1]|\\PC){0,40}";

    proptest! {
        /// For valid JSON, a parser that decodes all strings accepts exactly the texts without a flaw.
        #[test]
        fn what_has_no_flaw_can_be_read(scraps in SCRAPS) {
            for json in [format!("\"{scraps}\""), format!("[{scraps}]"), scraps] {
                let valid = serde_json::from_str::<serde::de::IgnoredAny>(&json).is_ok();
                let flaw = json_flaw(json.as_bytes(), MAX_JSON_DEPTH);
                if valid {
                    prop_assert_eq!(serde_json::from_str::<Value>(&json).is_err(), flaw.is_some(), "{}", json);
                }
            }
        }
    }
}
