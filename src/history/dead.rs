//! Dead letters for the operator: the list, and another attempt to write one.

use crate::{
    bus::{DeadLetter, DeadLetters, LetterError, ReadError},
    model::Region,
    store::{Store, StoreError, What},
};

use super::entry;

/// The outcome of another attempt to write a dead letter.
#[derive(Debug)]
pub enum Retried {
    /// It was written (or has no effect on history), and its dead letter is removed.
    Written,
    /// It was written, but its dead letter could not be removed. It is safe to retry.
    NotRemoved(LetterError),
    /// It still can't be written, with the reason.
    Refused(String),
}

/// All dead letters, oldest first.
///
/// # Errors
/// [`ReadError`].
pub async fn dead_letters(dead: &DeadLetters) -> Result<Vec<DeadLetter>, ReadError> {
    let (mut letters, mut after) = dead.list(1).await?;
    while after > 0
        && let Some(last) = letters.last()
    {
        let (more, still) = dead.list(last.number + 1).await?;
        after = if more.is_empty() { 0 } else { still };
        letters.extend(more);
    }
    Ok(letters)
}

/// Writes a dead letter, and removes it on success.
///
/// # Errors
/// [`StoreError`] if MongoDB accepts nothing now.
pub async fn retry(
    letter: DeadLetter,
    dead: &DeadLetters,
    store: &Store,
    origin: &Region,
) -> Result<Retried, StoreError> {
    let Some(stored) = letter.stored else {
        return Ok(Retried::Refused(letter.reason));
    };
    let entries = [entry(stored, origin, letter.epoch)];
    // An entry without effect would not have been refused; the letter is only removed.
    if !matches!(entries[0].what, What::Nothing(_)) {
        if let Some(refused) = store.write(&entries).await?.pop() {
            return Ok(Retried::Refused(refused.reason));
        }
        // It may have been erased since the letter was read.
        store.enforce_erasures(&entries).await?;
    }
    Ok(match dead.remove(letter.number).await {
        Ok(()) => Retried::Written,
        Err(error) => Retried::NotRemoved(error),
    })
}
