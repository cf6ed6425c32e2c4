//! Attachments: ids of uploads, what messages name, and the storage of the files.
//!
//! ```text
//! client ─► POST …/uploads ─► edge ─► history service: the registry in MongoDB, with the limits of the user
//!        ─► PUT, straight to the storage, with a signed URL
//!        ─► a message that names the upload ─► edge: checks the id alone
//! ```
//!
//! A file never goes through the path of a message. An id is signed ([`UploadId`]), so any edge can check it without
//! asking anybody. This module does not know the registry ([`store`](crate::store)).

mod file;
mod id;
mod local;
mod named;
mod s3;
mod storage;

pub use file::{BadFile, File};
pub use id::{BadUpload, Signer, UploadId};
pub use local::{Local, LocalError, Permit, Receiving};
pub use named::{Named, described, named, refusal};
pub use storage::{OpenError, Put, Storage, StorageError};
