//! Dead letters for the operator: what could not be written, and another attempt.

use crate::{
    bus::{DeadLetter, DeadLetters, LetterError, ReadError},
    model::Region,
    store::{Store, StoreError, What},
};

use super::entry;

/// What became of another attempt to write a dead letter.
#[derive(Debug)]
pub enum Retried {
    /// It is in MongoDB, and no dead letter any more.
    Written,
    /// It is in MongoDB, but its letter could not be removed; trying again does no harm.
    NotRemoved(LetterError),
    /// It can't be written still, and why.
    Refused(String),
}

/// All dead letters, the oldest first.
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

/// Writes a dead letter, and removes it when that succeeded.
///
/// # Errors
/// [`StoreError`]: MongoDB does not take anything now.
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
    // What means nothing would not have been refused; it is done with.
    if !matches!(entries[0].what, What::Nothing(_)) {
        if let Some(refused) = store.write(&entries).await?.pop() {
            return Ok(Retried::Refused(refused.reason));
        }
        // It may have been erased while it was a dead letter in our hands.
        store.enforce_erasures(&entries).await?;
    }
    Ok(match dead.remove(letter.number).await {
        Ok(()) => Retried::Written,
        Err(error) => Retried::NotRemoved(error),
    })
}
