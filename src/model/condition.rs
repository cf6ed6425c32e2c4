//! Conditions on JSON: `sentiment.score < -0.5`.

use std::{cmp::Ordering, fmt};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Longest text of a condition, in bytes.
const MAX_TEXT: usize = 256;

/// A path into an object, a comparison, and a value.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Condition {
    text: String,
    path: Vec<String>,
    is: Comparison,
    value: Value,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comparison {
    Less,
    AtMost,
    More,
    AtLeast,
    Equal,
    Unequal,
}

/// A text is not a condition.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "must be like \"sentiment.score < -0.5\": a path of names, one of < <= > >= = !=, and a number, or, after = and !=, \
     a text in quotes, true or false; {MAX_TEXT} bytes at most; {0:?} is not"
)]
pub struct BadCondition(String);

impl Condition {
    /// The first name of the path.
    #[must_use]
    pub fn name(&self) -> &str {
        self.path.first().map_or("", |name| name)
    }

    /// Whether `json` fulfils the condition; `None` if the value is not in it. A value of another type fulfils none, not
    /// even `!=`.
    #[must_use]
    pub fn holds(&self, json: &Value) -> Option<bool> {
        let found = self.path.iter().try_fold(json, |at, name| at.get(name))?;
        if let (Some(found), Some(value)) = (found.as_f64(), self.value.as_f64()) {
            return Some(match self.is {
                Comparison::Less => found < value,
                Comparison::AtMost => found <= value,
                Comparison::More => found > value,
                Comparison::AtLeast => found >= value,
                // As numbers: -0.0 is 0. JSON has no NaN.
                Comparison::Equal => found.partial_cmp(&value) == Some(Ordering::Equal),
                Comparison::Unequal => found.partial_cmp(&value) != Some(Ordering::Equal),
            });
        }
        let same_type = std::mem::discriminant(found) == std::mem::discriminant(&self.value);
        let holds = match self.is {
            Comparison::Equal => *found == self.value,
            Comparison::Unequal => *found != self.value,
            Comparison::Less | Comparison::AtMost | Comparison::More | Comparison::AtLeast => false,
        };
        Some(same_type && holds)
    }

    fn parse(text: &str) -> Option<Self> {
        if text.len() > MAX_TEXT {
            return None;
        }
        let (path, rest) = text.split_at(text.find(['<', '>', '=', '!'])?);
        let end = rest.find(|c| !"<>=!".contains(c))?;
        let (word, value) = rest.split_at(end);
        let is = match word {
            "<" => Comparison::Less,
            "<=" => Comparison::AtMost,
            ">" => Comparison::More,
            ">=" => Comparison::AtLeast,
            "=" | "==" => Comparison::Equal,
            "!=" => Comparison::Unequal,
            _ => return None,
        };
        let path: Vec<String> = path.trim().split('.').map(str::to_owned).collect();
        let is_path = path
            .iter()
            .all(|name| !name.is_empty() && !name.contains(char::is_whitespace));
        let value: Value = serde_json::from_str(value.trim()).ok()?;
        let fits = match value {
            Value::Number(_) => true,
            Value::String(_) | Value::Bool(_) => {
                matches!(is, Comparison::Equal | Comparison::Unequal)
            }
            Value::Null | Value::Array(_) | Value::Object(_) => false,
        };
        (is_path && fits).then(|| Self {
            text: text.to_owned(),
            path,
            is,
            value,
        })
    }
}

impl TryFrom<String> for Condition {
    type Error = BadCondition;

    fn try_from(text: String) -> Result<Self, BadCondition> {
        Self::parse(&text).ok_or_else(|| BadCondition(text.chars().take(80).collect()))
    }
}

impl From<Condition> for String {
    fn from(condition: Condition) -> Self {
        condition.text
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn condition(text: &str) -> Result<Condition, BadCondition> {
        Condition::try_from(text.to_owned())
    }

    #[test]
    fn conditions_are_true_of_what_they_say() {
        let json = json!({
            "sentiment": { "score": -0.7, "mood": "angry", "sure": true, "words": ["no"] },
            "lang": "a = b",
            "n": 1,
            "none": null,
        });
        for (text, expected) in [
            ("sentiment.score < -0.5", Some(true)),
            ("sentiment.score<-0.5", Some(true)),
            ("sentiment.score < -0.7", Some(false)),
            ("sentiment.score <= -0.7", Some(true)),
            ("sentiment.score > -0.7", Some(false)),
            ("sentiment.score >= -0.7", Some(true)),
            ("sentiment.score = -0.7", Some(true)),
            ("sentiment.score == -0.7", Some(true)),
            ("sentiment.score != -0.7", Some(false)),
            ("sentiment.score > -1", Some(true)),
            ("sentiment.mood = \"angry\"", Some(true)),
            ("sentiment.mood != \"glad\"", Some(true)),
            ("sentiment.sure = true", Some(true)),
            ("sentiment.sure != true", Some(false)),
            ("sentiment.sure = false", Some(false)),
            ("lang == \"a = b\"", Some(true)),
            ("n = 1.0", Some(true)),
            // Another type.
            ("sentiment.mood < 1", Some(false)),
            ("sentiment.mood != 1", Some(false)),
            ("sentiment.words != \"no\"", Some(false)),
            ("none != 1", Some(false)),
            // Nothing at all.
            ("sentiment.nothing != 1", None),
            ("sentiment.score.deeper < 1", None),
            ("score < 1", None),
        ] {
            assert_eq!(condition(text).unwrap().holds(&json), expected, "{text}");
        }
        assert_eq!(condition("a < 1").unwrap().holds(&json!(7)), None);
        assert_eq!(condition("a.b < 1").unwrap().name(), "a");
    }

    #[test]
    fn what_is_no_condition_is_named() {
        let long = format!("{} < 1", "a".repeat(MAX_TEXT));
        for text in [
            "",
            "a",
            "a <",
            "< 1",
            "a < b",
            "a << 1",
            "a => 1",
            "a <> 1",
            "a = null",
            "a = {}",
            "a = [1]",
            "a..b < 1",
            "a b < 1",
            "a < \"x\"",
            "a > true",
            ".a < 1",
            "a < 1 2",
            &long,
        ] {
            let error = condition(text).unwrap_err().to_string();
            assert!(error.contains("must be like"), "{text}: {error}");
        }
        assert_eq!(condition("a.b < -1").unwrap().to_string(), "a.b < -1");
    }
}
