//! The files of messages, as far as workers are told of them: where to get them.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

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

    /// The uploads that a message names, in its order: those of the room and of its author.
    pub(super) fn of(&self, room: &RoomId, message: &RawValue) -> Vec<AskedUpload> {
        // It was made by natter, so it can be read.
        let Ok(Said {
            from,
            body: Some(body),
        }) = serde_json::from_str(message.get())
        else {
            return Vec::new();
        };
        let all = described(body.get()).into_iter().filter_map(|named| {
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
        all.take(self.most).collect()
    }
}
