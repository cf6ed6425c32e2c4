//! The files of messages, as far as workers are told of them: where to get them.

use std::{collections::HashMap, sync::Arc};

use serde::{Deserialize, Serialize};
use serde_json::{Value, value::RawValue};

use crate::{
    config::{Config, Uploads},
    model::RoomId,
    taking::ServiceError,
    uploads::{Named, OpenError, Signer, Storage, described},
};

/// Signs URLs to download the files of messages.
#[derive(Debug)]
pub(super) struct Files {
    signer: Signer,
    storage: Storage,
    /// What relative URLs begin with.
    base: String,
    /// Most uploads of one message.
    most: usize,
}

/// An upload that a message names, as a worker gets it.
#[derive(Debug, Serialize)]
pub(super) struct AskedUpload {
    #[serde(flatten)]
    named: Named,
    /// For a GET. It needs no token.
    url: String,
    /// Until when, in ms since 1970.
    expires: u64,
}

/// The fields of a message as history shows it that say whose uploads it names.
#[derive(Deserialize)]
struct Said<'a> {
    from: String,
    #[serde(borrow)]
    body: Option<&'a RawValue>,
}

/// Whether a body names uploads, whosever.
pub(super) fn names_uploads(body: &[u8]) -> bool {
    std::str::from_utf8(body).is_ok_and(|body| !described(body).is_empty())
}

/// What an answer of the worker that checks files leaves open.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Open<'a> {
    /// It says nothing that counts of this upload.
    Undecided(&'a str),
    /// A file was not there. All else is decided.
    Missing,
}

/// What an answer leaves open, of the uploads that the worker was asked about: `{"files": {"<upload>": "clean" | "infected" |
/// "missing"}}`. `None`: nothing.
pub(super) fn left_open<'a>(answer: &[u8], asked: &'a [String]) -> Option<Open<'a>> {
    #[derive(Deserialize)]
    struct Judged {
        files: HashMap<String, Value>,
    }
    let judged = serde_json::from_slice::<Judged>(answer);
    let files = judged.map_or_else(|_none| HashMap::new(), |judged| judged.files);
    let mut is_missing = false;
    for upload in asked {
        match files.get(upload).and_then(Value::as_str) {
            Some("clean" | "infected") => {}
            Some("missing") => is_missing = true,
            Some(_) | None => return Some(Open::Undecided(upload)),
        }
    }
    is_missing.then_some(Open::Missing)
}

impl AskedUpload {
    /// The id.
    pub(super) fn id(&self) -> &str {
        &self.named.upload
    }
}

impl Files {
    /// `None` if the configuration has no uploads, or does not say where the edges are that have the files.
    ///
    /// # Errors
    /// [`ServiceError::NoUploads`] if a worker needs them; [`ServiceError::Uploads`].
    pub(super) fn open(config: &Config) -> Result<Option<Arc<Self>>, ServiceError> {
        let files = Self::new(&config.uploads)?;
        let needs = config.workers.iter().find(|worker| worker.attachments);
        match (needs, files) {
            (Some(worker), None) => Err(ServiceError::NoUploads {
                name: worker.name.clone(),
            }),
            (_, files) => Ok(files.map(Arc::new)),
        }
    }

    fn new(config: &Uploads) -> Result<Option<Self>, OpenError> {
        let storage = Storage::signing(config)?;
        let storage = storage.filter(|storage| match storage {
            Storage::Local(_) => !config.public_url.is_empty(),
            Storage::S3(_) => true,
        });
        Ok(storage.map(|storage| Self {
            signer: Signer::new(config),
            storage,
            base: config.public_url.trim_end_matches('/').to_owned(),
            most: config.max_per_message,
        }))
    }

    /// How many uploads a message names, and, in its order, those of the room and of its author.
    pub(super) fn of(&self, room: &RoomId, message: &RawValue) -> (usize, Vec<AskedUpload>) {
        // It was made by natter, so it can be read.
        let Ok(Said {
            from,
            body: Some(body),
        }) = serde_json::from_str(message.get())
        else {
            return (0, Vec::new());
        };
        let named = described(body.get());
        let count = named.len();
        let all = named.into_iter().filter_map(|named| {
            let id = self.signer.check(&named.upload, room).ok()?;
            if !self.signer.is_of(&id, &from) {
                return None;
            }
            let (url, expires) = self.storage.get(&id);
            let url = match url.starts_with('/') {
                true => format!("{}{url}", self.base),
                false => url,
            };
            Some(AskedUpload {
                named,
                url,
                expires,
            })
        });
        (count, all.take(self.most).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_must_decide_all_that_was_asked() {
        let asked = ["u1".to_owned(), "u2".to_owned()];
        let undecided = |upload| Some(Open::Undecided(upload));
        for (files, left) in [
            (r#"{"u1":"clean","u2":"infected","u3":"?"}"#, None),
            (r#"{"u1":"missing","u2":"clean"}"#, Some(Open::Missing)),
            (r#"{"u1":"missing"}"#, undecided("u2")),
            (r#"{"u1":"unknown","u2":"clean"}"#, undecided("u1")),
            (r#"{"u1":{"clean":true},"u2":"clean"}"#, undecided("u1")),
            (r#"["u1"]"#, undecided("u1")),
        ] {
            let answer = format!(r#"{{"files":{files}}}"#);
            assert_eq!(left_open(answer.as_bytes(), &asked), left, "{answer}");
        }
        assert_eq!(left_open(b"{}", &asked), undecided("u1"));
        // No other worker has to.
        assert_eq!(left_open(b"{}", &[]), None);
    }
}
