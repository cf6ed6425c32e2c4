//! A live subscription that knows when it may have missed something.

use async_nats::{SubscribeError, Subscriber};
use futures_util::{FutureExt, StreamExt};

use super::{Connection, Message};

/// Messages of one subject as they come, in batches, with a sound answer to "may anything be missing here?".
///
/// async-nats keeps `capacity` unread messages a subscription and drops what comes on top; it says so by an event that can
/// itself be lost. And what is published while a connection is down never arrives. Neither shows in the messages. So the feed
/// watches for both causes itself:
///
/// - A drop needs a full buffer: at that moment `capacity` messages stand before the hole. Whoever reads `capacity`
///   messages in a row without once finding the buffer empty may have come to a hole; whoever does not has not.
/// - A reconnect changes [`Connection::generation`] before any message of the new connection can be read.
#[derive(Debug)]
pub struct LiveFeed {
    connection: Connection,
    subscriber: Subscriber,
    /// Messages read since the buffer was last seen empty.
    run: usize,
    /// Generation under which everything read so far is known to be complete.
    generation: u64,
}

impl LiveFeed {
    /// Subscribes. The server has processed it once it answers a later request of the same connection.
    ///
    /// # Errors
    /// The client's, when it was closed.
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

    /// Waits for a message and takes what else is there, at most `max` in all, into `batch`. `false`: the feed has ended.
    ///
    /// Cancel-safe: a message is only taken when it is put into `batch`.
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

    /// What is there without waiting. Outside tokio's budget: within it an exhausted budget looks like an empty buffer,
    /// and the reasoning about drops would not hold.
    fn try_next(&mut self) -> Option<Option<Message>> {
        tokio::task::unconstrained(self.subscriber.next()).now_or_never()
    }

    /// Whether something may be missing before the messages read last.
    #[must_use]
    pub fn is_suspect(&self) -> bool {
        self.connection.generation() != self.generation
            || self.run >= self.connection.subscription_capacity()
    }

    /// To be called *before* the stream is read to check a suspicion: what is read under the returned state is complete up
    /// to that read, and only a later cause raises a new suspicion.
    pub fn settle(&mut self) {
        self.run = 0;
        self.generation = self.connection.generation();
    }
}
