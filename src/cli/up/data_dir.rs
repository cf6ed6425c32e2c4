//! The data folder of one `natter up`: its lock and its secret.

use std::{
    fs,
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rand::Rng as _;
use tokio::time::{Instant, sleep};

use crate::cli::token::DEV_SECRET_FILE;

/// How long children of a killed `up` may take to end. The kernel kills them with it, so this is plenty.
const ORPHANS_TIMEOUT: Duration = Duration::from_secs(20);

const POLL: Duration = Duration::from_millis(50);

/// Random bytes of the development secret.
const SECRET_BYTES: usize = 32;

/// A data folder that belongs to this process until it is dropped.
///
/// Two locks (`flock`, which ends with the processes that hold it): `lock` is held by this process and contains its
/// process id; `children.lock` is held by this process *and all its children*, as their standard input. After a SIGKILL
/// of `up` the first is free at once, the second only when the last child has ended. Only then are ports and files
/// free.
#[derive(Debug)]
pub(super) struct DataDir {
    path: PathBuf,
    // Kept only for its lock.
    _lock: File,
    children: Arc<File>,
}

/// The data folder can't be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum DataDirError {
    #[error("another natter up (process {owner}) uses {}", path.display())]
    Taken { path: PathBuf, owner: String },
    #[error(
        "processes of an earlier natter up still use {} after {ORPHANS_TIMEOUT:?}",
        path.display()
    )]
    Orphans { path: PathBuf },
    #[error("{}: can't be used", path.display())]
    File { path: PathBuf, source: io::Error },
}

impl DataDir {
    /// Creates the folder if it does not exist, and locks it.
    ///
    /// # Errors
    /// [`DataDirError`]
    pub(super) async fn open(path: &Path) -> Result<Self, DataDirError> {
        let failed = |source| DataDirError::File {
            path: path.to_owned(),
            source,
        };
        fs::create_dir_all(path).map_err(failed)?;
        // Absolute, because children may run in other folders.
        let path = fs::canonicalize(path).map_err(failed)?;
        let failed = |source| DataDirError::File {
            path: path.clone(),
            source,
        };
        let Some(mut lock) = try_lock(&lock_file(&path)).map_err(failed)? else {
            let mut owner = String::new();
            if let Ok(mut file) = File::open(lock_file(&path)) {
                file.read_to_string(&mut owner).map_err(failed)?;
            }
            return Err(DataDirError::Taken {
                path: path.clone(),
                owner: owner.trim().to_owned(),
            });
        };
        lock.set_len(0).map_err(failed)?;
        lock.rewind().map_err(failed)?;
        writeln!(lock, "{}", std::process::id()).map_err(failed)?;

        let started = Instant::now();
        let children = loop {
            if let Some(file) = try_lock(&children_file(&path)).map_err(failed)? {
                break file;
            }
            if started.elapsed() > ORPHANS_TIMEOUT {
                return Err(DataDirError::Orphans { path });
            }
            sleep(POLL).await;
        };
        Ok(Self {
            path,
            _lock: lock,
            children: Arc::new(children),
        })
    }

    /// The absolute path of the folder.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The file that children get as their standard input.
    pub(super) fn held_by_children(&self) -> Arc<File> {
        Arc::clone(&self.children)
    }

    /// The development secret of this folder, made once, readable only by its owner.
    ///
    /// # Errors
    /// [`DataDirError::File`]
    pub(super) fn secret(&self) -> Result<String, DataDirError> {
        let path = self.path.join(DEV_SECRET_FILE);
        self.read_or_make_secret(&path)
            .map_err(|source| DataDirError::File { path, source })
    }

    fn read_or_make_secret(&self, path: &Path) -> io::Result<String> {
        match fs::read_to_string(path) {
            Ok(text) if !text.trim().is_empty() => return Ok(text.trim().to_owned()),
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(_) | Err(_) => {}
        }
        let mut rng = rand::rng();
        let random: String = (0..SECRET_BYTES)
            .map(|_| format!("{:02x}", rng.random::<u8>()))
            .collect();
        // Begins with a letter, because an environment variable that looks like a number is read as one.
        let secret = format!("dev-{random}");
        // Written to another file first, so that a crash does not leave half a secret.
        let aside = self.path.join("dev-secret.new");
        match fs::remove_file(&aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&aside)?;
        writeln!(file, "{secret}")?;
        file.sync_all()?;
        fs::rename(aside, path)?;
        Ok(secret)
    }
}

impl Drop for DataDir {
    /// Removes the lock files. Both are still locked here, so no other process has taken them.
    fn drop(&mut self) {
        for file in [children_file(&self.path), lock_file(&self.path)] {
            // If the removal fails, an unlocked file stays: harmless.
            drop(fs::remove_file(file));
        }
    }
}

/// Locked by the owner of the folder; contains its process id.
pub(in crate::cli) fn lock_file(path: &Path) -> PathBuf {
    path.join("lock")
}

fn children_file(path: &Path) -> PathBuf {
    path.join("children.lock")
}

/// Opens and locks a file; `None` if another process holds the lock.
fn try_lock(path: &Path) -> io::Result<Option<File>> {
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        // The owner removes the file while it still holds the lock. Then this lock is on a file that is gone, and the
        // next process would create, and lock, a new one.
        match fs::metadata(path) {
            Ok(there) if there.ino() == file.metadata()?.ino() => return Ok(Some(file)),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_folder_has_one_owner_at_a_time_and_no_lock_after_it() {
        let folder = tempfile::tempdir().unwrap();
        let first = DataDir::open(folder.path()).await.unwrap();
        let error = DataDir::open(folder.path()).await.unwrap_err().to_string();
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        drop(first);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        DataDir::open(folder.path()).await.unwrap();
    }

    #[tokio::test]
    async fn the_folder_is_free_only_when_the_last_child_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let first = DataDir::open(folder.path()).await.unwrap();
        let mut child = tokio::process::Command::new("sleep")
            .arg("0.4")
            .stdin(first.held_by_children().try_clone().unwrap())
            .spawn()
            .unwrap();
        // As after a SIGKILL: the locks are released, the files stay.
        let (lock, children) = (lock_file(first.path()), children_file(first.path()));
        fs::hard_link(&children, folder.path().join("kept")).unwrap();
        drop(first);
        fs::rename(folder.path().join("kept"), &children).unwrap();
        assert!(!lock.exists());
        let started = Instant::now();
        DataDir::open(folder.path()).await.unwrap();
        assert!(started.elapsed() > Duration::from_millis(200));
        child.wait().await.unwrap();
    }

    #[tokio::test]
    async fn the_secret_is_made_once_and_private() {
        let folder = tempfile::tempdir().unwrap();
        let data = DataDir::open(folder.path()).await.unwrap();
        let secret = data.secret().unwrap();
        assert!(secret.len() > SECRET_BYTES);
        assert_eq!(data.secret().unwrap(), secret);
        let mode = fs::metadata(folder.path().join("dev-secret"))
            .unwrap()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
