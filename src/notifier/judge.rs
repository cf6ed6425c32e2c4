//! Whether a user is notified of a message. Does no I/O.

use std::time::Duration;

use crate::{people::Unwanted, telemetry::metrics::PushSkip};

/// What is known of a user and a message.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts {
    /// How long the user has been without a session, as far as it is known; `None`: the user has one.
    pub away: Option<Duration>,
    /// Whether the user has read up to the message.
    pub read: bool,
    /// What the user does not want.
    pub unwanted: Unwanted,
    /// Whether these are the user's quiet hours.
    pub quiet: bool,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The user is notified.
    Notify,
    /// It is decided after this time.
    Wait(Duration),
    /// The user is not notified.
    Skip(PushSkip),
}

/// Judges a message of this age. `after`: `push.after`.
///
/// Who has a session when the message is said may have closed everything a moment before it came, so it is looked again
/// `after` later. Who has one then is present.
pub(super) fn judge(facts: &Facts, age: Duration, after: Duration) -> Verdict {
    let Unwanted { muted, blocked } = facts.unwanted;
    if muted {
        return Verdict::Skip(PushSkip::Muted);
    }
    if blocked {
        return Verdict::Skip(PushSkip::Blocked);
    }
    if facts.read {
        return Verdict::Skip(PushSkip::Read);
    }
    match facts.away {
        Some(away) if away < after => Verdict::Wait(after - away),
        Some(_) if facts.quiet => Verdict::Skip(PushSkip::Quiet),
        Some(_) => Verdict::Notify,
        None if age < after => Verdict::Wait(after - age),
        None => Verdict::Skip(PushSkip::Present),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_who_is_notified() {
        let after = Duration::from_secs(30);
        let s = Duration::from_secs;
        let facts = Facts {
            away: Some(s(60)),
            read: false,
            unwanted: Unwanted::default(),
            quiet: false,
        };
        let unwanted = |muted, blocked| Unwanted { muted, blocked };
        for (facts, age, verdict) in [
            (facts, s(0), Verdict::Notify),
            (
                Facts {
                    away: Some(s(30)),
                    ..facts
                },
                s(0),
                Verdict::Notify,
            ),
            (
                Facts {
                    away: Some(s(10)),
                    ..facts
                },
                s(0),
                Verdict::Wait(s(20)),
            ),
            (
                Facts {
                    away: Some(s(10)),
                    ..facts
                },
                s(40),
                Verdict::Wait(s(20)),
            ),
            (
                Facts {
                    away: None,
                    ..facts
                },
                s(1),
                Verdict::Wait(s(29)),
            ),
            (
                Facts {
                    away: None,
                    ..facts
                },
                s(30),
                Verdict::Skip(PushSkip::Present),
            ),
            (
                Facts {
                    read: true,
                    ..facts
                },
                s(0),
                Verdict::Skip(PushSkip::Read),
            ),
            (
                Facts {
                    read: true,
                    away: None,
                    ..facts
                },
                s(0),
                Verdict::Skip(PushSkip::Read),
            ),
            (
                Facts {
                    quiet: true,
                    ..facts
                },
                s(0),
                Verdict::Skip(PushSkip::Quiet),
            ),
            // The quiet hours may be over by then.
            (
                Facts {
                    quiet: true,
                    away: Some(s(1)),
                    ..facts
                },
                s(0),
                Verdict::Wait(s(29)),
            ),
            (
                Facts {
                    unwanted: unwanted(true, false),
                    ..facts
                },
                s(0),
                Verdict::Skip(PushSkip::Muted),
            ),
            (
                Facts {
                    unwanted: unwanted(false, true),
                    ..facts
                },
                s(0),
                Verdict::Skip(PushSkip::Blocked),
            ),
        ] {
            assert_eq!(judge(&facts, age, after), verdict, "{facts:?} {age:?}");
        }
    }
}
