//! The uploads that the body of a message names: `{"attachments": [{"upload": "…", …}, …]}`.

use memchr::memmem;
use serde::{Deserialize, Serialize};
use serde_json::{Value, value::RawValue};

use super::{BadUpload, Signer};
use crate::{
    config::Uploads,
    model::RoomId,
    protocol::{ErrorCode, Refused},
};

/// The bytes that are in every body with attachments.
const ATTACHMENTS: &[u8] = b"\"attachments\"";

/// The attachments of a body can't be read.
#[derive(Debug, thiserror::Error)]
pub enum NamedError {
    #[error("attachments: {0}")]
    Json(#[from] serde_json::Error),
    #[error("attachments: each upload must be a text")]
    NotText,
}

#[derive(Deserialize)]
struct Body<'a> {
    #[serde(borrow)]
    attachments: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Attachment {
    upload: Option<Value>,
}

/// An upload that a body names, with what the sender of the body says of its file. Nothing of that is checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Named {
    /// The id.
    pub upload: String,
    /// The name of the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its media type.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// Its bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

/// The uploads that a body names. Attachments without the field `upload` are the app's own, and so is whatever is not an
/// array.
///
/// # Errors
/// [`NamedError`].
pub fn named(body: &str) -> Result<Vec<String>, NamedError> {
    let mut uploads = Vec::new();
    for attachment in attachments(body)? {
        match serde_json::from_str::<Attachment>(attachment.get())?.upload {
            None => {}
            Some(Value::String(upload)) => uploads.push(upload),
            Some(_) => return Err(NamedError::NotText),
        }
    }
    Ok(uploads)
}

/// The uploads that a stored body names, each once, with what it says of the files. What can't be read is left out.
#[must_use]
pub fn described(body: &str) -> Vec<Named> {
    let mut all: Vec<Named> = Vec::new();
    for attachment in attachments(body).unwrap_or_default() {
        let Ok(Value::Object(mut said)) = serde_json::from_str(attachment.get()) else {
            continue;
        };
        let mut text = |field: &str| match said.remove(field) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        };
        let Some(upload) = text("upload") else {
            continue;
        };
        let (name, media_type) = (text("name"), text("type"));
        if all.iter().all(|other| other.upload != upload) {
            all.push(Named {
                upload,
                name,
                media_type,
                size: said.get("size").and_then(Value::as_u64),
            });
        }
    }
    all
}

/// The attachments of a body that are objects.
fn attachments(body: &str) -> Result<Vec<&RawValue>, serde_json::Error> {
    if memmem::find(body.as_bytes(), ATTACHMENTS).is_none() || !is(body, '{') {
        return Ok(Vec::new());
    }
    let Body { attachments } = serde_json::from_str(body)?;
    let Some(attachments) = attachments.filter(|all| is(all.get(), '[')) else {
        return Ok(Vec::new());
    };
    let mut attachments: Vec<&RawValue> = serde_json::from_str(attachments.get())?;
    attachments.retain(|one| is(one.get(), '{'));
    Ok(attachments)
}

fn is(json: &str, begin: char) -> bool {
    json.trim_start().starts_with(begin)
}

/// Why a message in `room` can't name the uploads that it names, if it can't. `author`: of the message, or of the message
/// that it edits. `until`: an upload made before this time, in ms since 1970, may have been removed already.
///
/// Nothing is asked: what is checked stands in the ids.
#[must_use]
pub fn refusal(
    config: &Uploads,
    room: &RoomId,
    author: &str,
    until: Option<u64>,
    body: &str,
) -> Option<Refused> {
    let bad = |text: String| Some(Refused::new(ErrorCode::BadRequest, text));
    let uploads = match named(body) {
        Ok(uploads) if uploads.is_empty() => return None,
        Ok(uploads) => uploads,
        Err(error) => return bad(error.to_string()),
    };
    if uploads.len() > config.max_per_message {
        let (given, most) = (uploads.len(), config.max_per_message);
        let text = format!("attachments: {given} uploads, the limit is {most}");
        return Some(Refused::new(ErrorCode::Limit, text));
    }
    let signer = Signer::new(config);
    uploads.iter().find_map(|upload| {
        let flaw = match signer.check(upload, room) {
            Ok(id) if !signer.is_of(&id, author) => BadUpload::OtherUser,
            Ok(id) if until.is_some_and(|until| id.made_at() < until) => BadUpload::Old,
            Ok(_) => return None,
            Err(flaw) => flaw,
        };
        let shown: String = upload.chars().take(80).collect();
        bad(format!("attachments: upload {shown:?}: {flaw}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uploads::file::tests::config;

    #[test]
    fn uploads_are_found_where_they_are_named() {
        let of = |body: &str| named(body).map_err(|error| error.to_string());
        for none in [
            "{}",
            "\"attachments\"",
            "[\"attachments\"]",
            "{\"a\":{\"attachments\":[{\"upload\":\"x\"}]}}",
            "{\"attachments\":null}",
            "{\"attachments\":\"mine\"}",
            "{\"attachments\":[1,{\"url\":\"https://example.org\"}]}",
        ] {
            assert_eq!(of(none), Ok(vec![]), "{none}");
        }
        let two = " {\"text\":1, \"attachments\" : [ {\"upload\":\"x\",\"name\":\"n\"}, {\"upload\":\"y\"}]}";
        assert_eq!(of(two), Ok(vec!["x".to_owned(), "y".to_owned()]));
        for bad in [
            "{\"attachments\":[],\"attachments\":[]}",
            "{\"attachments\":[{\"upload\":7}]}",
        ] {
            assert!(of(bad).unwrap_err().starts_with("attachments: "), "{bad}");
        }
        let body = r#"{"attachments":[{"upload":"x","name":"n","type":"image/png","size":5},
            {"upload":"x"},{"upload":7},{"name":"no upload"},{"upload":"y","name":7,"size":"5"}]}"#;
        let told = serde_json::to_string(&described(body)).unwrap();
        assert_eq!(
            told,
            r#"[{"upload":"x","name":"n","type":"image/png","size":5},{"upload":"y"}]"#
        );
        assert_eq!(described("{\"attachments\":[],\"attachments\":[]}"), []);
    }

    #[test]
    fn a_message_names_uploads_of_its_room_and_author() {
        let config = config("max_per_message = 2");
        let room = RoomId::parse("chat:lobby").unwrap();
        let signer = Signer::new(&config);
        let id = signer.make(&room, "kim");
        let refused = |author: &str, until, uploads: &[&str]| {
            let all: Vec<_> = uploads
                .iter()
                .map(|one| serde_json::json!({ "upload": one }))
                .collect();
            let body = serde_json::json!({ "attachments": all }).to_string();
            refusal(&config, &room, author, until, &body).map(|refused| refused.to_string())
        };
        let text = &*id.to_string();
        let made = id.made_at();
        assert_eq!(refused("kim", Some(made), &[text, text]), None);
        for (author, until, uploads, told) in [
            ("lee", None, &[text][..], "the upload of another user"),
            ("kim", Some(made + 1), &[text], "too long ago"),
            ("kim", None, &["made up"], "not the id of an upload"),
            (
                "kim",
                None,
                &[text, text, text],
                "3 uploads, the limit is 2",
            ),
        ] {
            let refused = refused(author, until, uploads).unwrap();
            assert!(refused.contains(told), "{refused}");
        }
    }
}
