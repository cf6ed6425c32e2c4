//! What a session missed: messages in order, without the log that they are from.

use std::{cell::OnceCell, ops::Deref, rc::Rc, sync::Arc};

use super::{
    memory::{Memory, Share},
    message::Message,
};

/// What a session has missed, in order. Sessions that missed the same share the list.
#[derive(Debug, Clone, Default)]
pub(super) struct Missed {
    pub(super) steps: Rc<Steps>,
    /// Whether the shared frames have the right cursors for this session.
    pub(super) shared: bool,
    /// How many of the shown messages were read from streams.
    pub(super) read: usize,
}

/// The messages that lead from a session's place to the room's.
#[derive(Debug, Default)]
pub(super) struct Steps {
    list: Vec<Step>,
    /// Its part of `rooms.replay_memory`, once a session keeps the list.
    kept: OnceCell<Share>,
}

impl Steps {
    pub(super) fn new(list: Vec<Step>) -> Self {
        Self {
            list,
            kept: OnceCell::new(),
        }
    }

    /// Counts the list against the memory as long as it is kept. The messages that are only in the ring are included,
    /// since the ring may drop them before the session has got them.
    pub(super) fn count_in(&self, memory: &Arc<Memory>) {
        // Once: the sessions that share the list all come here.
        self.kept.get_or_init(|| {
            let of_ring = self.list.iter().filter(|step| !step.message.is_counted());
            let of_ring: usize = of_ring.map(|step| step.message.bytes()).sum();
            memory.take(of_ring + size_of_val(&self.list[..]))
        });
    }
}

impl Deref for Steps {
    type Target = [Step];

    fn deref(&self) -> &[Step] {
        &self.list
    }
}

/// One message between a session's place and the room's.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) message: Rc<Message>,
    /// Whether the session gets the message. If not, it has already got another copy, and only its position advances.
    pub(super) is_shown: bool,
}

impl Missed {
    /// How many messages are shown.
    pub(super) fn len(&self) -> usize {
        self.steps.iter().filter(|step| step.is_shown).count()
    }

    /// About how many bytes their frames have.
    pub(super) fn frame_bytes(&self) -> usize {
        let shown = self.steps.iter().filter(|step| step.is_shown);
        shown.map(|step| step.message.frame_bytes()).sum()
    }
}
