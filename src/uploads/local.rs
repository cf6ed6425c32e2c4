//! The storage in a folder: edges take and give the files, at URLs that they have signed.
//!
//! ```text
//! <folder>/<last two characters of the id>/<id>             the file
//!                                          <id>.json         what the client said of it
//!                                          <id>.part         an upload that is under way
//!                                          <id>.json.part    the same of what the client said
//!                                          <id>.gone         the file was removed, and no other one may take its place
//! ```
//!
//! # Invariants
//! - A file that is there is whole: it has exactly the bytes that were announced, and is renamed to its name at the end.
//! - A file that is there does not change.
//! - Whoever writes a part holds the lock of its file, which ends with the process: so one upload has one part, however
//!   many edges share the folder.

use std::{
    fs::TryLockError,
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use serde::{Deserialize, Serialize};
use tokio::{
    fs,
    io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _},
};

use super::{File, OpenError, Put, Signer, StorageError, UploadId};
use crate::config::Uploads;

/// The end of the name of what stands for a file that was removed, and keeps its place.
const GONE: &str = ".gone";

/// Bytes that are read from a file at once.
const READ_AT_ONCE: usize = 64 * 1024;

/// A folder of uploads.
#[derive(Debug)]
pub struct Local {
    folder: PathBuf,
    signer: Signer,
    url_ttl: Duration,
}

/// What a signed URL allows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Permit {
    /// Until when, in ms since 1970.
    expires: u64,
    /// The file to upload. `None`: the permit is to download.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<File>,
}

/// A request with a signed URL can't be carried out.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// The URL was not made by this deployment, or was changed.
    #[error("the URL is not signed, or was changed")]
    Forged,
    /// Its time is over.
    #[error("the URL has expired")]
    Expired,
    /// Another request uploads the same file now.
    #[error("this file is being uploaded by another request now")]
    Busy,
    /// More bytes came than were announced.
    #[error("the file has more than the {0} bytes that were announced")]
    TooLarge(u64),
    /// Fewer bytes came than were announced.
    #[error("the file has {got} bytes, {announced} were announced")]
    TooSmall { got: u64, announced: u64 },
    /// The folder can't be read or written.
    #[error("the folder of uploads failed: {0}")]
    Folder(#[from] io::Error),
}

impl Local {
    pub(super) fn open(config: &Uploads) -> Result<Self, OpenError> {
        std::fs::create_dir_all(&config.folder).map_err(OpenError::Folder)?;
        Ok(Self::new(config))
    }

    /// Without a look at the folder, which need not be there: for who only signs URLs.
    pub(super) fn new(config: &Uploads) -> Self {
        Self {
            folder: config.folder.clone(),
            signer: Signer::new(config),
            url_ttl: config.url_ttl,
        }
    }

    fn url(&self, id: &UploadId, file: Option<File>, now: u64) -> (String, u64) {
        let ttl = u64::try_from(self.url_ttl.as_millis()).unwrap_or(u64::MAX);
        let expires = now.saturating_add(ttl);
        let permit = serde_json::to_string(&Permit { expires, file });
        let permit = BASE64.encode(permit.expect("it is plain data"));
        let signature = self.signer.permit(id, permit.as_bytes());
        let url = format!("/v1/uploads/{id}?permit={permit}.{signature}");
        (url, expires)
    }

    pub(super) fn put(&self, id: &UploadId, file: &File, now: u64) -> Put {
        let (url, expires) = self.url(id, Some(file.clone()), now);
        Put {
            url,
            headers: file.headers(),
            expires,
        }
    }

    pub(super) fn get(&self, id: &UploadId, now: u64) -> (String, u64) {
        self.url(id, None, now)
    }

    /// Reads the permit of a URL for an upload.
    ///
    /// # Errors
    /// [`LocalError::Forged`], [`LocalError::Expired`].
    pub fn permit(&self, id: &UploadId, permit: &str, now: u64) -> Result<Permit, LocalError> {
        let (permit, signature) = permit.split_once('.').ok_or(LocalError::Forged)?;
        if !self.signer.has_permit(id, permit.as_bytes(), signature) {
            return Err(LocalError::Forged);
        }
        let permit = BASE64.decode(permit).ok();
        let permit = permit.and_then(|permit| serde_json::from_slice::<Permit>(&permit).ok());
        let permit = permit.ok_or(LocalError::Forged)?;
        if permit.expires <= now {
            return Err(LocalError::Expired);
        }
        Ok(permit)
    }

    fn path(&self, id: &UploadId) -> PathBuf {
        let name = id.to_string();
        let last = name.get(name.len().saturating_sub(2)..).unwrap_or_default();
        self.folder.join(last).join(&name)
    }

    /// Whether the file is there, or was removed and can't come again.
    ///
    /// # Errors
    /// The folder can't be read.
    pub async fn has(&self, id: &UploadId) -> io::Result<bool> {
        let path = self.path(id);
        Ok(fs::try_exists(&path).await? || is_barred(&path).await?)
    }

    /// Begins to receive a file.
    ///
    /// # Errors
    /// [`LocalError::Busy`]; the folder can't be written.
    pub async fn receive(&self, id: UploadId, file: File) -> Result<Receiving, LocalError> {
        let path = self.path(&id);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).await?;
        }
        let part = with_end(&path, ".part");
        let named = part.clone();
        let locked = tokio::task::spawn_blocking(move || locked(&named)).await;
        let to = locked.map_err(io::Error::other)??;
        Ok(Receiving {
            to: fs::File::from_std(to.ok_or(LocalError::Busy)?),
            part: Part(Some(part)),
            path,
            file,
            got: 0,
        })
    }

    /// Opens a file; `None` if it is not there.
    ///
    /// # Errors
    /// The folder can't be read.
    pub async fn open_file(&self, id: &UploadId) -> io::Result<Option<Sent>> {
        let path = self.path(id);
        let from = match fs::File::open(&path).await {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            from => from?,
        };
        if is_barred(&path).await? {
            return Ok(None);
        }
        let about = match fs::read(with_end(&path, ".json")).await {
            // It was removed in between.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            about => about?,
        };
        Ok(Some(Sent {
            from,
            left: 0,
            file: serde_json::from_slice(&about)?,
        }))
    }

    /// Removes a file, and what broken uploads have left of it. No other one is taken in its place.
    pub(super) async fn bar(&self, id: &UploadId) -> Result<(), StorageError> {
        let path = self.path(id);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).await?;
        }
        // First: whoever gives a file its name now sees it, or else the file is found here.
        let bar = fs::File::create(with_end(&path, GONE)).await?;
        bar.sync_all().await?;
        self.clear(&path, true).await
    }

    /// Removes all of an upload.
    pub(super) async fn remove(&self, id: &UploadId) -> Result<(), StorageError> {
        self.clear(&self.path(id), false).await
    }

    async fn clear(&self, path: &Path, but_bar: bool) -> Result<(), StorageError> {
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok(());
        };
        let mut all = match fs::read_dir(folder).await {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            all => all?,
        };
        let name = name.as_encoded_bytes();
        while let Some(entry) = all.next_entry().await? {
            let rest = entry.file_name();
            match rest.as_encoded_bytes().strip_prefix(name) {
                None => continue,
                Some(end) if but_bar && end == GONE.as_bytes() => continue,
                Some(_) => {}
            }
            match fs::remove_file(entry.path()).await {
                // Another one was faster.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => removed?,
            }
        }
        Ok(())
    }
}

/// Whether no file may take this place any more.
async fn is_barred(path: &Path) -> io::Result<bool> {
    fs::try_exists(with_end(path, GONE)).await
}

fn with_end(path: &Path, end: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(end);
    path.into()
}

/// Opens a part to write it from its beginning; `None` if somebody else writes it. What a killed process has left is
/// overwritten.
fn locked(part: &Path) -> io::Result<Option<std::fs::File>> {
    loop {
        let mut options = std::fs::OpenOptions::new();
        let file = options
            .write(true)
            .create(true)
            .truncate(false)
            .open(part)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        // Between opening and locking, its writer may have removed it or given it its name.
        let is_there = match std::fs::metadata(part) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            there => there?.ino() == file.metadata()?.ino(),
        };
        if is_there {
            file.set_len(0)?;
            return Ok(Some(file));
        }
    }
}

/// A file under way. Removed when it is dropped, unless it was given its name.
#[derive(Debug)]
struct Part(Option<PathBuf>);

impl Part {
    /// Gives the file its name. After that, its old name may be that of another one.
    async fn rename(mut self, to: &Path) -> io::Result<()> {
        if let Some(part) = &self.0 {
            fs::rename(part, to).await?;
        }
        self.0 = None;
        Ok(())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if let Some(part) = &self.0
            && let Err(error) = std::fs::remove_file(part)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "the part of an upload can't be removed");
        }
    }
}

/// An upload that is being received. Nothing is left of it if it is dropped before [`Receiving::finish`].
#[derive(Debug)]
pub struct Receiving {
    // Before the file, whose lock ends when it is dropped: then the name may be that of another one.
    part: Part,
    to: fs::File,
    path: PathBuf,
    file: File,
    got: u64,
}

impl Receiving {
    /// Takes the next bytes. Returns when they are handed to the system.
    ///
    /// # Errors
    /// [`LocalError`]; there are more than were announced.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), LocalError> {
        self.got += bytes.len() as u64;
        if self.got > self.file.size {
            return Err(LocalError::TooLarge(self.file.size));
        }
        Ok(self.to.write_all(bytes).await?)
    }

    /// Ends the upload: the file is stored, under its name. If another upload of it was faster, that one stays. If the file
    /// was removed meanwhile, it is not stored.
    ///
    /// # Errors
    /// [`LocalError`]; there are fewer bytes than were announced.
    pub async fn finish(mut self) -> Result<(), LocalError> {
        if self.got < self.file.size {
            return Err(LocalError::TooSmall {
                got: self.got,
                announced: self.file.size,
            });
        }
        self.to.flush().await?;
        self.to.sync_all().await?;
        // First, so that a file that is there has it.
        let about = serde_json::to_vec(&self.file).map_err(io::Error::from)?;
        let part = with_end(&self.path, ".json.part");
        let mut to = fs::File::create(&part).await?;
        let part = Part(Some(part));
        to.write_all(&about).await?;
        to.sync_all().await?;
        part.rename(&with_end(&self.path, ".json")).await?;
        if !fs::try_exists(&self.path).await? {
            self.part.rename(&self.path).await?;
        }
        // Last: whoever bars the place later finds the file.
        if is_barred(&self.path).await? {
            for end in ["", ".json"] {
                match fs::remove_file(with_end(&self.path, end)).await {
                    // Whoever has barred it was faster.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    removed => removed?,
                }
            }
        }
        Ok(())
    }
}

/// A file that is being sent.
#[derive(Debug)]
pub struct Sent {
    from: fs::File,
    left: u64,
    /// What the client said of it.
    pub file: File,
}

impl Sent {
    /// Sends `bytes` from the offset `first` on.
    ///
    /// # Errors
    /// The file can't be read.
    pub async fn from(mut self, first: u64, bytes: u64) -> io::Result<Self> {
        self.from.seek(io::SeekFrom::Start(first)).await?;
        self.left = bytes;
        Ok(self)
    }

    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// The file can't be read.
    pub async fn next(&mut self) -> io::Result<Option<bytes::Bytes>> {
        if self.left == 0 {
            return Ok(None);
        }
        let most = usize::try_from(self.left).map_or(READ_AT_ONCE, |left| left.min(READ_AT_ONCE));
        let mut buffer = bytes::BytesMut::with_capacity(most);
        // The buffer may have room for more than that.
        let got = (&mut self.from)
            .take(most as u64)
            .read_buf(&mut buffer)
            .await?;
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= got as u64;
        Ok(Some(buffer.freeze()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::RoomId, uploads::file::tests::config};

    fn local(folder: &Path) -> (Local, UploadId) {
        let config = Uploads {
            folder: folder.to_owned(),
            ..config("")
        };
        let room = RoomId::parse("chat:lobby").unwrap();
        let id = Signer::new(&config).make(&room, "kim");
        (Local::open(&config).unwrap(), id)
    }

    fn file(size: u64) -> File {
        File {
            name: "a.txt".to_owned(),
            media_type: "text/plain".to_owned(),
            size,
        }
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        let mut all = Vec::new();
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => all.extend(files(&path)),
                false => all.push(path),
            }
        }
        all
    }

    async fn receive(
        local: &Local,
        id: UploadId,
        size: u64,
        parts: &[&[u8]],
    ) -> Result<(), LocalError> {
        let mut receiving = local.receive(id, file(size)).await?;
        for part in parts {
            receiving.write(part).await?;
        }
        receiving.finish().await
    }

    #[tokio::test]
    async fn a_file_is_there_when_it_is_whole_and_then_stays_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let (local, id) = local(folder.path());
        for parts in [&[&b"ab"[..]][..], &[b"ab", b"cde"], &[]] {
            let error = receive(&local, id, 4, parts).await.unwrap_err();
            assert!(
                matches!(
                    error,
                    LocalError::TooLarge(4) | LocalError::TooSmall { announced: 4, .. }
                ),
                "{error}"
            );
            assert_eq!(files(folder.path()), [] as [PathBuf; 0]);
            assert!(local.open_file(&id).await.unwrap().is_none());
        }
        receive(&local, id, 4, &[b"ab", b"cd"]).await.unwrap();
        receive(&local, id, 4, &[b"wxyz"]).await.unwrap();
        assert_eq!(files(folder.path()).len(), 2);
        let sent = local.open_file(&id).await.unwrap().unwrap();
        assert_eq!(sent.file, file(4));
        let mut sent = sent.from(1, 2).await.unwrap();
        assert_eq!(sent.next().await.unwrap().unwrap(), &b"bc"[..]);
        assert!(sent.next().await.unwrap().is_none());
        // One request at a time; who goes away makes room for the next.
        let first = local.receive(id, file(4)).await.unwrap();
        let second = local.receive(id, file(4)).await.unwrap_err();
        assert!(matches!(second, LocalError::Busy), "{second}");
        drop(first);
        receive(&local, id, 4, &[b"wxyz"]).await.unwrap();
        assert_eq!(files(folder.path()).len(), 2);
        // What a killed process left goes, too.
        std::fs::write(with_end(&local.path(&id), ".0.part"), "a").unwrap();
        local.remove(&id).await.unwrap();
        assert_eq!(files(folder.path()), [] as [PathBuf; 0]);
        local.remove(&id).await.unwrap();
    }

    #[tokio::test]
    async fn a_permit_is_for_one_upload_and_one_time() {
        let folder = tempfile::tempdir().unwrap();
        let (local, id) = local(folder.path());
        let put = local.put(&id, &file(4), 1000);
        let (path, permit) = put.url.split_once("?permit=").unwrap();
        assert_eq!(path, format!("/v1/uploads/{id}"));
        let of = |id: &UploadId, permit: &str, now| local.permit(id, permit, now);
        assert_eq!(of(&id, permit, 1000).unwrap().file, Some(file(4)));
        let expired = of(&id, permit, put.expires).unwrap_err();
        assert!(matches!(expired, LocalError::Expired), "{expired}");
        let other = Signer::new(&config("")).make(&RoomId::parse("chat:x").unwrap(), "kim");
        assert!(of(&other, permit, 1000).is_err());
        for forged in [
            "",
            ".",
            permit.trim_end_matches(|c| c != '.'),
            &format!("{permit}A"),
            &permit.replace('.', "A."),
        ] {
            assert!(of(&id, forged, 1000).is_err(), "{forged}");
        }
        let (url, _) = local.get(&id, 1000);
        let permit = url.split_once("?permit=").unwrap().1;
        assert_eq!(of(&id, permit, 1000).unwrap().file, None);
    }

    #[tokio::test]
    async fn where_a_file_was_barred_none_comes_until_it_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let (local, id) = local(folder.path());
        receive(&local, id, 4, &[b"good"]).await.unwrap();
        // One that is under way when it is barred does not come either, nor one that begins later.
        let mut late = local.receive(id, file(4)).await.unwrap();
        late.write(b"evil").await.unwrap();
        local.bar(&id).await.unwrap();
        assert!(local.has(&id).await.unwrap());
        assert!(local.open_file(&id).await.unwrap().is_none());
        drop(late.finish().await);
        receive(&local, id, 4, &[b"evil"]).await.unwrap();
        local.bar(&id).await.unwrap();
        assert!(local.open_file(&id).await.unwrap().is_none());
        let left = files(folder.path());
        assert!(
            matches!(&*left, [only] if only.extension().unwrap() == "gone"),
            "{left:?}"
        );
        local.remove(&id).await.unwrap();
        assert_eq!(files(folder.path()), Vec::<PathBuf>::new());
        assert!(!local.has(&id).await.unwrap());
    }
}
