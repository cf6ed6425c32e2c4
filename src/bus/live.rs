//! A live subscription that reports when it may have missed messages.

use async_nats::{SubscribeError, Subscriber};
use futures_util::{FutureExt, StreamExt};

use super::{Connection, Message};

/// Messages of one subject as they arrive, in batches, and a reliable answer to "may a message be missing here?".
///
/// async-nats buffers `capacity` unread messages per subscription and drops further ones. It reports that with an event
/// that can itself be lost. What is published while the connection is down never arrives. Neither loss shows in the
/// messages, so the feed watches for both causes itself:
///
/// - A drop needs a full buffer: at that moment `capacity` messages are in front of the gap. A reader that reads
///   `capacity` messages in a row without ever finding the buffer empty may have reached a gap. Any other reader has
///   not.
/// - A reconnect changes [`Connection::generation`] before any message of the new connection can be read.
#[derive(Debug)]
pub struct LiveFeed {
    connection: Connection,
    subscriber: Subscriber,
    /// Messages read since the buffer was last seen empty.
    run: usize,
    /// The generation under which everything read so far is known to be complete.
    generation: u64,
}

impl LiveFeed {
    /// Subscribes. The subscription is active once the server has answered a later request on the same connection.
    ///
    /// # Errors
    /// The client's error, if the client was closed.
    pub async fn open(connection: &Connection, subject: String) -> Result<Self, SubscribeError> {
        let generation = connection.generation();
        let subscriber = connection.client().subscribe(subject).await?;
        Ok(Self {
            connection: connection.clone(),
            subscriber,
            run: 0,
            generation,
        })
    }

    /// Waits for a message, then takes the other messages that are ready: at most `max` in all, into `batch`. Returns
    /// `false` if the feed has ended.
    ///
    /// Cancel-safe: a message is only taken when it is pushed to `batch`.
    pub async fn next_batch(&mut self, batch: &mut Vec<Message>, max: usize) -> bool {
        let first = match self.try_next() {
            Some(next) => next,
            None => {
                self.run = 0;
                self.subscriber.next().await
            }
        };
        let Some(first) = first else { return false };
        batch.push(first);
        self.run += 1;
        while batch.len() < max {
            match self.try_next() {
                Some(Some(message)) => {
                    batch.push(message);
                    self.run += 1;
                }
                Some(None) => return false,
                None => {
                    self.run = 0;
                    break;
                }
            }
        }
        true
    }

    /// The next message, if it is ready. It runs outside Tokio's cooperative budget: with an exhausted budget the
    /// buffer would look empty, and the reasoning about drops would not hold.
    fn try_next(&mut self) -> Option<Option<Message>> {
        tokio::task::unconstrained(self.subscriber.next()).now_or_never()
    }

    /// Whether messages may be missing before those that were read last.
    #[must_use]
    pub fn is_suspect(&self) -> bool {
        self.connection.generation() != self.generation
            || self.run >= self.connection.subscription_capacity()
    }

    /// Clears the suspicion. Call it *before* reading the stream: the result is then complete up to that read, and only
    /// a later cause raises a new suspicion.
    pub fn settle(&mut self) {
        self.run = 0;
        self.generation = self.connection.generation();
    }
}
