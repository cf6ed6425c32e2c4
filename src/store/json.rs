//! JSON texts as BSON values, and back.
//!
//! A text is stored as its value, so that people can query it. If the value does not give back the text exactly, the
//! text is stored beside it; this is determined by writing the value as JSON again.
//!
//! The value leaves out what BSON or MongoDB does not accept: members whose names begin with `$` or contain NUL; of
//! several members with the same name, all but the last. There is no value for a text that is nested deeper than
//! [`MAX_DEPTH`], would take much more room than its text, or is not strict JSON.

use std::fmt;

use indexmap::IndexMap;
use mongodb::bson::{
    RawArrayBuf, RawDocumentBuf,
    raw::{CString, RawBson, RawBsonRef},
};
use serde::{
    Serialize, Serializer,
    de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor},
    ser::{SerializeMap as _, SerializeSeq as _},
};

/// Maximum nesting of a value. MongoDB allows 100, including the document around it.
const MAX_DEPTH: usize = 64;

/// A value may take [`MAX_GROWTH`] times the bytes of its text plus [`MAX_GROWTH_FREE`], but at most [`MAX_VALUE`]. In
/// BSON each array element has its index as a name.
const MAX_GROWTH: usize = 2;
const MAX_GROWTH_FREE: usize = 1 << 10;
const MAX_VALUE: usize = 4 << 20;

/// A JSON text as it is stored.
#[derive(Debug)]
pub(super) struct Stored<'a> {
    /// Its value, if it has one.
    pub(super) value: Option<RawBson>,
    /// The text, if the value does not give it back exactly.
    pub(super) text: Option<&'a str>,
}

impl<'a> Stored<'a> {
    pub(super) fn of(text: &'a str) -> Self {
        let value = parse(text).filter(|value| {
            let most = text.len() * MAX_GROWTH + MAX_GROWTH_FREE;
            bytes(value) <= most.min(MAX_VALUE)
        });
        let exact = value
            .as_ref()
            .is_some_and(|value| write(value.as_raw_bson_ref()) == text);
        Self {
            value,
            text: (!exact).then_some(text),
        }
    }
}

/// The JSON of a value, without white space.
pub(super) fn write(value: RawBsonRef<'_>) -> String {
    serde_json::to_string(&Written(value)).unwrap_or_else(|_no_json| "null".to_owned())
}

fn bytes(value: &RawBson) -> usize {
    match value {
        RawBson::Document(document) => document.as_bytes().len(),
        RawBson::Array(array) => array.as_bytes().len(),
        RawBson::String(text) => text.len(),
        _ => 8,
    }
}

fn parse(text: &str) -> Option<RawBson> {
    let mut json = serde_json::Deserializer::from_str(text);
    let value = Value { depth: MAX_DEPTH }.deserialize(&mut json).ok()?;
    json.end().ok()?;
    Some(value)
}

/// Reads a value of at most this depth.
#[derive(Clone, Copy)]
struct Value {
    depth: usize,
}

impl Value {
    fn inside<E: serde::de::Error>(self) -> Result<Self, E> {
        let depth = self.depth.checked_sub(1);
        let depth = depth.ok_or_else(|| E::custom("it is nested too deep"))?;
        Ok(Self { depth })
    }
}

impl<'de> DeserializeSeed<'de> for Value {
    type Value = RawBson;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<RawBson, D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Value {
    type Value = RawBson;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<RawBson, E> {
        Ok(RawBson::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<RawBson, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<RawBson, E> {
        Ok(i32::try_from(value).map_or_else(|_large| value.into(), RawBson::from))
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<RawBson, E> {
        match i64::try_from(value) {
            Ok(value) => self.visit_i64(value),
            // The nearest number. `9223372036854776000.0` differs from the text, so the text is kept too.
            #[expect(clippy::cast_precision_loss, reason = "the text is kept beside it")]
            Err(_large) => Ok((value as f64).into()),
        }
    }

    fn visit_f64<E>(self, value: f64) -> Result<RawBson, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, text: &str) -> Result<RawBson, E> {
        Ok(text.into())
    }

    fn visit_string<E>(self, text: String) -> Result<RawBson, E> {
        Ok(text.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<RawBson, A::Error> {
        let inside = self.inside()?;
        let mut array = RawArrayBuf::new();
        while let Some(value) = elements.next_element_seed(inside)? {
            array.push(value);
        }
        Ok(array.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<RawBson, A::Error> {
        let inside = self.inside()?;
        let mut found: IndexMap<CString, RawBson> = IndexMap::new();
        while let Some(name) = members.next_key::<Name>()? {
            let value = members.next_value_seed(inside)?;
            if let Some(name) = name.0 {
                found.insert(name, value);
            }
        }
        let mut document = RawDocumentBuf::new();
        for (name, value) in found {
            document.append(name, value);
        }
        Ok(document.into())
    }
}

/// The name of a member, if BSON accepts it.
struct Name(Option<CString>);

impl<'de> serde::Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        let name = String::deserialize(json)?;
        if name.starts_with('$') || name.contains('\0') {
            return Ok(Self(None));
        }
        let name = CString::try_from(name).map_err(D::Error::custom)?;
        Ok(Self(Some(name)))
    }
}

/// Writes a value as JSON.
struct Written<'a>(RawBsonRef<'a>);

impl Serialize for Written<'_> {
    fn serialize<S: Serializer>(&self, json: S) -> Result<S::Ok, S::Error> {
        use serde::ser::Error;
        match self.0 {
            RawBsonRef::Null => json.serialize_unit(),
            RawBsonRef::Boolean(value) => json.serialize_bool(value),
            RawBsonRef::Int32(value) => json.serialize_i32(value),
            RawBsonRef::Int64(value) => json.serialize_i64(value),
            RawBsonRef::Double(value) => json.serialize_f64(value),
            RawBsonRef::String(text) => json.serialize_str(text),
            RawBsonRef::Array(array) => {
                let mut elements = json.serialize_seq(None)?;
                for value in array {
                    elements.serialize_element(&Written(value.map_err(S::Error::custom)?))?;
                }
                elements.end()
            }
            RawBsonRef::Document(document) => {
                let mut members = json.serialize_map(None)?;
                for member in document {
                    let (name, value) = member.map_err(S::Error::custom)?;
                    members.serialize_entry(name.as_str(), &Written(value))?;
                }
                members.end()
            }
            // A type that a person has put there.
            other => {
                let other = mongodb::bson::Bson::try_from(other).map_err(S::Error::custom)?;
                json.serialize_str(&other.to_string())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn exact(text: &str) -> bool {
        let stored = Stored::of(text);
        if stored.text.is_none() {
            assert_eq!(write(stored.value.unwrap().as_raw_bson_ref()), text);
            return true;
        }
        false
    }

    #[test]
    fn what_a_value_says_to_the_letter_is_stored_once() {
        for text in [
            r#"{"text":"hi"}"#,
            r#"{"text":"안녕 👍🏽","n":1,"b":[true,false,null,{}]}"#,
            r#"{"a":{"a":{"a":[[],[[]]]}}}"#,
            r#""\u0000\u001f\n\"\\/""#,
            "\"\u{7f}\u{2028}\"",
            "\"\"",
            "null",
            "0",
            "-1",
            "2147483648",
            "9223372036854775807",
            "-9223372036854775808",
            "0.5",
            "-0.0",
            "1.0",
            "3.141592653589793",
            r#"{"":1,"a.b":2,"0":3,"__proto__":4,"_id":5}"#,
            r#"{"z":1,"a":2}"#,
            "[]",
            "{}",
        ] {
            assert!(exact(text), "{text}");
        }
    }

    #[test]
    fn what_it_does_not_is_stored_beside_it() {
        for text in [
            " 1",
            "1 ",
            r#"{"text": "hi"}"#,
            "[1,\n2]",
            r#""\u00e9""#,
            r#""\/""#,
            r#""\u000a""#,
            r#""\u001F""#,
            "-0",
            "1e2",
            "1E2",
            "1.50",
            "1e400",
            "9223372036854775808",
            "18446744073709551616",
            "123456789012345678901234567890",
            "0.1000000000000000055511151231257827",
            r#"{"a":1,"a":2}"#,
            r#"{"a":1,"b":2,"a":1}"#,
            r#"{"$set":1}"#,
            r#"{"a":{"$oid":"0"}}"#,
            r#"{"a\u0000b":1}"#,
            r#""\ud800""#,
        ] {
            assert!(!exact(text), "{text}");
        }
        let deep = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(exact(&deep(64)));
        assert!(!exact(&deep(65)) && !exact(&deep(20_000)));
    }

    #[test]
    fn a_value_is_as_near_as_it_gets() {
        let value = |text: &str| write(Stored::of(text).value.unwrap().as_raw_bson_ref());
        assert_eq!(
            value(r#"{"text":"hi", "$x":{"a":1}, "a":1, "b":2, "a":[3]}"#),
            r#"{"text":"hi","a":[3],"b":2}"#
        );
        assert_eq!(value("18446744073709551615"), "1.8446744073709552e+19");
        let none = [
            "1e400",
            r#""\ud800""#,
            "[",
            "",
            &format!("[{}1]", "1,".repeat(30_000)),
        ];
        for text in none {
            let stored = Stored::of(text);
            assert_eq!((stored.value, stored.text), (None, Some(text)));
        }
    }

    fn jsons() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            (-1000..1000_i64).prop_map(Into::into),
            any::<f64>().prop_map(Into::into),
            "[\\PC\0\n]{0,8}".prop_map(Into::into),
        ];
        leaf.prop_recursive(6, 40, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Into::into),
                prop::collection::btree_map("[a-z.가\"]{0,3}", inner, 0..5)
                    .prop_map(|members| serde_json::Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_json_comes_back(value in jsons()) {
            let text = value.to_string();
            let stored = Stored::of(&text);
            let written = write(stored.value.as_ref().unwrap().as_raw_bson_ref());
            prop_assert_eq!(stored.text.unwrap_or(&written), text.as_str());
            // With white space it is still the same value.
            let pretty = serde_json::to_string_pretty(&value).unwrap();
            let stored = Stored::of(&pretty);
            prop_assert_eq!(write(stored.value.as_ref().unwrap().as_raw_bson_ref()), written);
        }

        #[test]
        fn any_text_is_taken(text in "[\\PC{}\\[\\]\",:0-9eE.+\\-]{0,40}") {
            let stored = Stored::of(&text);
            prop_assert!(stored.value.is_some() || stored.text.is_some());
        }
    }
}
