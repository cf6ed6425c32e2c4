//! Where the summaries of watched rooms are read.

use std::{sync::Arc, time::Duration};

use super::active::Caps;
use crate::{people::People, read_marker::Markers};

/// How long after its start a watch is compared with what is stored: what was sent just when the subscription was made
/// may be lost.
pub(super) const FIRST_RESYNC: Duration = Duration::from_secs(3);

/// What an edge knows of rooms and of their unread messages.
#[derive(Debug, Clone)]
pub(super) struct Sources {
    pub(super) people: Arc<People>,
    pub(super) markers: Arc<Markers>,
}

impl Sources {
    /// Up to where messages are counted.
    pub(super) fn caps(&self) -> Caps {
        Caps {
            unread: self.markers.unread_cap(),
            mentions: self.markers.mentions_cap(),
        }
    }
}
