//! Badges of devices that show a notification: when its user reads the room elsewhere, they get the new number.
//!
//! Only the process that has sent the notification knows of it. If it ends, the badge is right again with the next one.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{
    Parts,
    provider::{Note, Sent, service_of},
    recipients::forget,
};
use crate::{
    model::RoomId,
    runtime::unix_ms,
    subject::parse_marker_key,
    telemetry::metrics::{Counter, count},
};

/// Users of whom it is known that devices show something. If there are more, the badges of some are not updated.
const MOST: usize = 100_000;

/// Rooms of such a user.
const ROOMS: usize = 100;

/// How long after a read the number is counted: several rooms are often read at once.
const PAUSE: Duration = Duration::from_secs(1);

/// What devices show.
#[derive(Debug, Default)]
pub(super) struct Badges(Mutex<HashMap<String, HashSet<RoomId>>>);

impl Badges {
    /// The devices of a user show something of a room.
    pub(super) fn shown(&self, user: &str, room: &RoomId) {
        let mut shown = self.0.lock();
        if shown.len() >= MOST && !shown.contains_key(user) {
            return;
        }
        let rooms = shown.entry(user.to_owned()).or_default();
        if rooms.len() < ROOMS {
            rooms.insert(room.clone());
        }
    }

    /// A user has read in a room. Returns whether devices have shown something of it.
    fn read(&self, user: &str, room: &RoomId) -> bool {
        let mut shown = self.0.lock();
        let Some(rooms) = shown.get_mut(user) else {
            return false;
        };
        let was_shown = rooms.remove(room);
        if rooms.is_empty() {
            shown.remove(user);
        }
        was_shown
    }
}

/// Follows what users read, forever.
pub(super) async fn keep(parts: Arc<Parts>) {
    let Ok(mut feed) = parts.lastread.changes(">").await else {
        return;
    };
    let mut tick = interval(PAUSE / 4);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut batch = Vec::new();
    // Whose number is to be counted, and when. Not more than users who are shown something.
    let mut due: HashMap<String, (Instant, RoomId)> = HashMap::new();
    loop {
        batch.clear();
        tokio::select! {
            more = feed.next_batch(&mut batch, 256) => if !more { return },
            _ = tick.tick() => {}
        }
        if feed.is_suspect() {
            // A read was missed, and a badge stays as it is until the next notification.
            feed.settle();
        }
        let now = Instant::now();
        for message in &batch {
            if let Some((_origin, entry)) = parts.lastread.change(message)
                && let Some((room, user)) = parse_marker_key(&entry.key)
                && parts.badges.read(&user, &room)
            {
                due.entry(user).or_insert((now + PAUSE, room));
            }
        }
        let ready: Vec<String> = due
            .iter()
            .filter(|(_, (at, _))| *at <= now)
            .map(|(user, _)| user.clone())
            .collect();
        for user in ready {
            if let Some((_, room)) = due.remove(&user) {
                let parts_of = Arc::clone(&parts);
                parts
                    .tasks
                    .spawn_until_stopping("update a badge", async move {
                        update(&parts_of, &user, room).await;
                    });
            }
        }
    }
}

/// Sends a user's devices the number of unread messages, as far as they can be told without showing something.
async fn update(parts: &Parts, user: &str, room: RoomId) {
    let devices = match parts.people.devices_of(&[user.to_owned()]).await {
        Ok(mut devices) => devices.remove(user).unwrap_or_default(),
        Err(error) => return tracing::debug!(%error, "devices can't be read"),
    };
    let Some(badge) = parts.badge(user).await else {
        return;
    };
    let at = unix_ms();
    let note = Note {
        user: user.to_owned(),
        room,
        message: None,
        title: None,
        text: None,
        badge: Some(badge),
        at,
    };
    for (name, device) in devices.all() {
        // The next one says it as well.
        let Some(mut turn) = parts.turns.turn(user, device).await else {
            continue;
        };
        turn.begin();
        let id = format!("badge-{at}-{name}");
        let sent = parts.providers.send(device, name, &note, &id).await;
        turn.over();
        match sent {
            Sent::Done => count(Counter::PushSent(service_of(device)), 1),
            Sent::Gone => forget(parts, user, name, device).await,
            Sent::Unable => {}
            // The next one says it as well.
            Sent::Again { why, .. } | Sent::Failed(why) => {
                tracing::debug!(kind = device.kind(), why, "a badge was not updated");
            }
        }
    }
}
