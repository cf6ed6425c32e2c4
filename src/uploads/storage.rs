//! Where the files are: one of two storages.

use std::{collections::BTreeMap, io};

use serde::Serialize;

use super::{File, Local, LocalError, Signer, UploadId, s3::S3};
use crate::{
    config::{UploadStorage, Uploads},
    model::RoomId,
    runtime::unix_ms,
};

/// The storage of the configuration.
#[derive(Debug)]
pub enum Storage {
    /// A folder. Edges take and give the files.
    Local(Local),
    /// A bucket of S3. Clients reach it themselves.
    S3(Box<S3>),
}

/// How a client uploads a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Put {
    /// For a PUT. It may be relative to the URL of the request that it answers.
    pub url: String,
    /// The headers to send with it.
    pub headers: BTreeMap<&'static str, String>,
    /// The upload must begin before this time, in ms since 1970.
    pub expires: u64,
}

/// The storage can't be used with this configuration.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The folder can't be created.
    #[error("uploads.folder: it can't be created")]
    Folder(#[source] io::Error),
    /// The endpoint and the bucket make no URL.
    #[error("uploads.s3_endpoint, uploads.s3_bucket: {0}")]
    Bucket(String),
    /// TLS can't be used.
    #[error("uploads.s3_endpoint: TLS can't be used")]
    Tls(#[source] io::Error),
}

/// The storage failed, or can't be reached. It is safe to retry.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The folder can't be read or written.
    #[error("the folder of uploads failed: {0}")]
    Folder(#[from] io::Error),
    /// S3 can't be reached.
    #[error("S3 can't be reached: {0}")]
    Unreachable(String),
    /// S3 refused a request.
    #[error("S3 answered {status}: {text}")]
    Refused { status: u16, text: String },
    /// S3 did not write a file because there is one.
    #[error("there is a file already")]
    Kept,
    /// S3 has replaced a file, although it was asked not to.
    #[error(
        "S3 lets a file be replaced after it was checked: it ignores If-None-Match, which uploads.scan needs"
    )]
    Replaced,
}

impl From<LocalError> for StorageError {
    fn from(error: LocalError) -> Self {
        Self::Folder(match error {
            LocalError::Folder(error) => error,
            error => io::Error::other(error),
        })
    }
}

impl Storage {
    /// Opens the storage; `None` if there are no uploads. Nothing is sent anywhere.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(config: &Uploads) -> Result<Option<Self>, OpenError> {
        Ok(match config.storage {
            UploadStorage::Off => None,
            UploadStorage::Local => Some(Self::Local(Local::open(config)?)),
            UploadStorage::S3 => Some(Self::S3(Box::new(S3::open(config)?))),
        })
    }

    /// The storage, for who only signs URLs; `None` if there are no uploads. A folder need not be there.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn signing(config: &Uploads) -> Result<Option<Self>, OpenError> {
        Ok(match config.storage {
            UploadStorage::Local => Some(Self::Local(Local::new(config))),
            UploadStorage::Off | UploadStorage::S3 => Self::open(config)?,
        })
    }

    /// How a client uploads the file of an upload.
    #[must_use]
    pub fn put(&self, id: &UploadId, file: &File) -> Put {
        match self {
            Self::Local(local) => local.put(id, file, unix_ms()),
            Self::S3(s3) => s3.put(id, file, unix_ms()),
        }
    }

    /// A URL to download the file of an upload, for a GET. Whether the file is there is not checked.
    #[must_use]
    pub fn get(&self, id: &UploadId) -> (String, u64) {
        match self {
            Self::Local(local) => local.get(id, unix_ms()),
            Self::S3(s3) => s3.get(id, unix_ms()),
        }
    }

    /// The origin from which clients get the files (`https://host`), if it is not the edge itself.
    #[must_use]
    pub fn origin(&self) -> Option<String> {
        match self {
            Self::Local(_) => None,
            Self::S3(s3) => Some(s3.origin()),
        }
    }

    /// Removes the file of an upload. It is no error if there is none.
    ///
    /// # Errors
    /// [`StorageError`].
    pub async fn remove(&self, id: &UploadId) -> Result<(), StorageError> {
        match self {
            Self::Local(local) => local.remove(id).await,
            Self::S3(s3) => s3.remove(id).await,
        }
    }

    /// Removes the file of an upload, and keeps its place taken, so that none is uploaded there, until [`Self::remove`].
    ///
    /// # Errors
    /// [`StorageError`].
    pub async fn bar(&self, id: &UploadId) -> Result<(), StorageError> {
        match self {
            Self::Local(local) => local.bar(id).await,
            Self::S3(s3) => s3.bar(id).await,
        }
    }

    /// Writes a small file and removes it, to see whether that is possible.
    ///
    /// # Errors
    /// [`StorageError`].
    pub async fn try_out(&self, config: &Uploads) -> Result<(), StorageError> {
        let room = RoomId::parse("natter:doctor").expect("it is a room");
        let id = Signer::new(config).make(&room, "$natter");
        let file = File {
            name: "doctor".to_owned(),
            media_type: "text/plain".to_owned(),
            size: 1,
        };
        match self {
            Self::Local(local) => {
                let mut receiving = local.receive(id, file.clone()).await?;
                receiving.write(b"1").await?;
                receiving.finish().await?;
            }
            Self::S3(s3) => s3.write(&id, &file, "1").await?,
        }
        let kept = match self {
            Self::S3(s3) if config.scan().is_some() => s3.write(&id, &file, "2").await,
            Self::S3(_) | Self::Local(_) => Err(StorageError::Kept),
        };
        self.remove(&id).await?;
        match kept {
            Ok(()) => Err(StorageError::Replaced),
            Err(StorageError::Kept) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl File {
    /// The headers that go with the file in every storage.
    pub(super) fn headers(&self) -> BTreeMap<&'static str, String> {
        BTreeMap::from([
            ("content-type", self.media_type.clone()),
            ("content-disposition", self.disposition()),
        ])
    }
}
