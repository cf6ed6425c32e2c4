//! Reactions and annotations: the meaning of their bodies, and their limits.
//!
//! The limits are not configurable: what is kept of a message must be the same wherever it is folded.

use std::{borrow::Cow, collections::BTreeMap};

use serde_json::value::RawValue;
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

/// Longest reaction, in bytes.
pub const MAX_REACTION: usize = 64;

/// Maximum number of annotations in one message, and of one user's annotations about one message.
pub const MAX_ANNOTATIONS: usize = 32;

/// Longest name of an annotation, in bytes.
pub const MAX_ANNOTATION_NAME: usize = 64;

/// Largest annotation, in bytes of its JSON.
pub const MAX_ANNOTATION: usize = 8 << 10;

/// A body that is not a reaction, or not annotations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BadRemark {
    /// It has another form.
    OtherForm,
    /// It has the right form but exceeds a limit, which is named.
    TooLarge(String),
}

/// The reaction in a body, and whether it is set or removed: a string, or `{"key": …}` (also `text`), with `"remove":
/// true` to remove it.
///
/// # Errors
/// [`BadRemark`].
pub fn reaction(body: &str) -> Result<(String, bool), BadRemark> {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Body {
        Plain(String),
        Full {
            #[serde(alias = "text")]
            key: String,
            #[serde(default)]
            remove: bool,
        },
    }
    let other = |_error| BadRemark::OtherForm;
    let (key, on) = match serde_json::from_str(body).map_err(other)? {
        Body::Plain(key) => (key, true),
        Body::Full { key, remove } => (key, !remove),
    };
    if key.len() > MAX_REACTION {
        let text = format!("a reaction has at most {MAX_REACTION} bytes");
        return Err(BadRemark::TooLarge(text));
    }
    if normal_reaction(&key).is_empty() {
        return Err(BadRemark::OtherForm);
    }
    Ok((key, on))
}

/// The annotations in a body, by name, each a JSON text: the fields of an object.
///
/// # Errors
/// [`BadRemark`].
pub fn annotations(body: &str) -> Result<Vec<(String, String)>, BadRemark> {
    let other = |_error| BadRemark::OtherForm;
    let fields: BTreeMap<String, Box<RawValue>> = serde_json::from_str(body).map_err(other)?;
    if fields.is_empty() || fields.contains_key("") {
        return Err(BadRemark::OtherForm);
    }
    let few = fields.len() <= MAX_ANNOTATIONS;
    let short = fields.iter().all(|(name, json)| {
        name.len() <= MAX_ANNOTATION_NAME && json.get().len() <= MAX_ANNOTATION
    });
    if !few || !short {
        return Err(BadRemark::TooLarge(format!(
            "at most {MAX_ANNOTATIONS} annotations, with names of at most {MAX_ANNOTATION_NAME} bytes and at most \
             {MAX_ANNOTATION} bytes each"
        )));
    }
    let fields = fields.into_iter();
    Ok(fields
        .map(|(name, json)| (name, json.get().to_owned()))
        .collect())
}

/// The form in which reactions are compared: NFC, without variation selectors 15 and 16, which only choose between two
/// pictures of one character. Skin tones and everything else that is visible are kept.
#[must_use]
pub fn normal_reaction(key: &str) -> Cow<'_, str> {
    let selector = |c: char| matches!(c, '\u{fe0e}' | '\u{fe0f}');
    if !key.contains(selector) && is_nfc_quick(key.chars()) == IsNormalized::Yes {
        return Cow::Borrowed(key);
    }
    Cow::Owned(key.chars().filter(|c| !selector(*c)).nfc().collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bodies_of_reactions() {
        let is = |key: &str, on| Ok((key.to_owned(), on));
        assert_eq!(reaction(r#""👍""#), is("👍", true));
        assert_eq!(reaction(r#"{"key":"👍","remove":true}"#), is("👍", false));
        assert_eq!(reaction(r#"{"text":"👍"}"#), is("👍", true));
        let others = [
            "7",
            "\"\"",
            "\"\u{fe0f}\"",
            "{}",
            "{\"key\":7}",
            "[]",
            "{",
            "null",
        ];
        for other in others {
            assert_eq!(reaction(other), Err(BadRemark::OtherForm), "{other}");
        }
        let body = |bytes: usize| format!("{{\"key\":\"{}\"}}", "x".repeat(bytes));
        assert!(reaction(&body(64)).is_ok());
        for bytes in [65, 1000, 60_000] {
            let refused = reaction(&body(bytes));
            assert!(matches!(refused, Err(BadRemark::TooLarge(_))), "{bytes}");
        }
    }

    #[test]
    fn bodies_of_annotations() {
        let found = Ok(vec![(
            "translation".to_owned(),
            r#"{ "ko" : "안녕" }"#.to_owned(),
        )]);
        assert_eq!(annotations(r#"{"translation": { "ko" : "안녕" }}"#), found);
        for other in ["7", "{}", "[]", "\"x\"", r#"{"":1}"#, "null", "{"] {
            assert_eq!(annotations(other), Err(BadRemark::OtherForm), "{other}");
        }
        let names = |count: usize| {
            let fields: Vec<String> = (0..count).map(|n| format!("\"n{n}\":1")).collect();
            format!("{{{}}}", fields.join(","))
        };
        let name = |bytes: usize| format!("{{\"{}\":1}}", "n".repeat(bytes));
        // The quotes are two bytes.
        let value = |bytes: usize| format!("{{\"n\":\"{}\"}}", "x".repeat(bytes - 2));
        for fits in [names(32), name(64), value(8192)] {
            assert!(annotations(&fits).is_ok());
        }
        for large in [names(33), names(480), name(65), value(8193), value(60_000)] {
            let refused = annotations(&large);
            assert!(matches!(refused, Err(BadRemark::TooLarge(_))));
        }
    }

    #[test]
    fn what_looks_the_same_is_one_reaction_and_what_does_not_is_not() {
        let same = [
            ("👍", "👍\u{fe0f}"),
            ("❤", "❤\u{fe0f}"),
            ("❤\u{fe0e}", "❤\u{fe0f}"),
            ("1\u{20e3}", "1\u{fe0f}\u{20e3}"),
            ("❤\u{200d}🔥", "❤\u{fe0f}\u{200d}🔥"),
            ("👁\u{200d}🗨", "👁\u{fe0f}\u{200d}🗨\u{fe0f}"),
            ("é", "e\u{301}"),
            ("각", "\u{1100}\u{1161}\u{11a8}"),
            ("e\u{fe0f}\u{301}", "é"),
        ];
        for (a, b) in same {
            assert_eq!(normal_reaction(a), normal_reaction(b), "{a} {b}");
        }
        let others = [
            "👍",
            "👍🏽",
            "👍🏿",
            "👎",
            "❤",
            "💙",
            "1\u{20e3}",
            "2\u{20e3}",
            "1",
            "❤\u{200d}🔥",
            "e",
            "é",
            "É",
            "👨\u{200d}👩",
            "👨👩",
        ];
        for (at, a) in others.iter().enumerate() {
            for b in others.iter().skip(at + 1) {
                assert_ne!(normal_reaction(a), normal_reaction(b), "{a} {b}");
            }
        }
    }

    proptest! {
        #[test]
        fn a_normal_form_is_its_own(key in "[\\PC\u{fe0f}\u{fe0e}\u{301}\u{200d}❤]{0,12}") {
            let normal = normal_reaction(&key).into_owned();
            prop_assert_eq!(normal_reaction(&normal), normal.as_str());
        }

        #[test]
        fn any_body_is_something_or_refused(body in "\\PC{0,40}") {
            if let Ok((key, _)) = reaction(&body) {
                prop_assert!(!key.is_empty());
            }
            if let Ok(fields) = annotations(&body) {
                prop_assert!(!fields.is_empty());
            }
        }
    }
}
