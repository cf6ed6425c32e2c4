//! A message of a room, as the log, backlogs and fan-out passes share it: one object for all receivers.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
};

use bytes::Bytes;

use super::{memory::Share, references::Spot};
use crate::{
    bus::Record,
    codec::{Codec, Encoded, Frames},
    model::{Cursor, Epoch, Fingerprint, Position, Region, RoomId},
    protocol::MessagePush,
};

/// About how many bytes a frame has besides the texts of its message and its cursor.
const FRAME_WORDS: usize = 96;

/// The log that a message belongs to.
#[derive(Debug)]
pub(super) struct TrackId {
    pub(super) room: RoomId,
    /// The origin in whose stream the message is stored, and the epoch of that stream; `None` in a room without a log.
    pub(super) origin: Option<(Region, Epoch)>,
}

/// Where a message is in the room's log.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LogPlace {
    /// The number of its track.
    pub(super) track: usize,
    /// The track's position after this message: its own sequence, or a higher one if it is late.
    pub(super) position: u64,
    /// The hash of its reference; `None` for natter's own announcements.
    pub(super) reference: Option<u64>,
}

/// One message: its fields, and one frame for each protocol that has had a receiver.
///
/// Frames are never parsed to find out what they contain. A member whose cursor differs from the room's gets a frame
/// with its own cursor ([`Message::frame_at`]); all others share one frame ([`Message::frame`]).
#[derive(Debug)]
pub(super) struct Message {
    of: Rc<TrackId>,
    at: LogPlace,
    pub(super) seq: u64,
    pub(super) fingerprint: Fingerprint,
    pub(super) ts: u64,
    id: Box<str>,
    from: Box<str>,
    kind: Option<&'static str>,
    /// Rare fields.
    more: Option<Box<More>>,
    /// The cursor of the shared frame, if it is not just the message's own position.
    cursor: Option<Box<Cursor>>,
    /// At first a slice of the buffer that the message was read into. Then a slice of the first frame that contains the
    /// body unchanged, or a copy, because that buffer is larger than the message.
    body: RefCell<Bytes>,
    body_in: Cell<BodyIn>,
    frames: Frames,
    /// The bytes that the log has counted for it; `None` if the log does not keep it.
    pub(super) counted: Cell<Option<usize>>,
    /// Its part of `rooms.replay_memory`, if it was read for a backlog.
    share: Option<Arc<Share>>,
}

/// What memory the body of a message keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BodyIn {
    /// The buffer that it was read into.
    Buffer,
    /// Memory of its own.
    Copy,
    /// A frame of the message.
    Frame,
}

/// Fields that few messages have.
#[derive(Debug)]
struct More {
    target: Option<String>,
    reply_to: Option<String>,
    mentions: Option<String>,
    after: Option<Cursor>,
    original_ts: Option<u64>,
}

impl Message {
    /// Makes a message from a record. `cursor` is the room's cursor after the message, if that is more than the
    /// message's own position.
    pub(super) fn new(
        of: &Rc<TrackId>,
        at: LogPlace,
        record: Record,
        cursor: Option<Cursor>,
    ) -> Self {
        let more = More {
            target: record.target,
            reply_to: record.reply_to,
            mentions: record.mentions,
            after: record.after,
            original_ts: record.original_ts,
        };
        let has_more = more.target.is_some()
            || more.reply_to.is_some()
            || more.mentions.is_some()
            || more.after.is_some()
            || more.original_ts.is_some();
        Self {
            of: Rc::clone(of),
            at,
            seq: record.seq,
            fingerprint: record.fingerprint,
            ts: record.ts,
            id: record.id.into_boxed_str(),
            from: record.from.into_boxed_str(),
            kind: record.kind,
            more: has_more.then(|| Box::new(more)),
            cursor: cursor.map(Box::new),
            body: RefCell::new(record.body),
            body_in: Cell::new(BodyIn::Buffer),
            frames: Frames::default(),
            counted: Cell::new(None),
            share: None,
        }
    }

    /// Copies the body if it still keeps the buffer that it was read into. Must be called for a message that is kept
    /// longer than it takes to hand it out; mostly a frame was made then, and there is nothing to copy.
    pub(super) fn settle(&self) {
        if self.body_in.get() == BodyIn::Buffer {
            let copy = Bytes::copy_from_slice(&self.body.borrow());
            self.body.replace(copy);
            self.body_in.set(BodyIn::Copy);
        }
    }

    /// The same message, counted against a share of `rooms.replay_memory` as long as the message or one of its frames
    /// is kept.
    pub(super) fn counted_in(mut self, share: &mut Share) -> Self {
        self.share = Some(Arc::new(share.part(self.bytes())));
        self
    }

    pub(super) fn track(&self) -> usize {
        self.at.track
    }

    /// The track's position after it.
    pub(super) fn position(&self) -> u64 {
        self.at.position
    }

    /// Whether it was delivered after later messages of its track.
    pub(super) fn is_late(&self) -> bool {
        self.seq != self.at.position
    }

    /// The hash of its reference; `None` for natter's own announcements.
    pub(super) fn reference(&self) -> Option<u64> {
        self.at.reference
    }

    /// Where it is stored.
    pub(super) fn spot(&self) -> Spot {
        (self.at.track, self.seq)
    }

    /// The cursor that its sender had seen of other origins.
    pub(super) fn after(&self) -> Option<&Cursor> {
        self.more.as_ref()?.after.as_ref()
    }

    /// The time that is shown. `ts` is when it was stored.
    pub(super) fn shown_ts(&self) -> u64 {
        let original = self.more.as_ref().and_then(|more| more.original_ts);
        original.unwrap_or(self.ts)
    }

    /// Whether its memory is counted against `rooms.replay_memory`.
    pub(super) fn is_counted(&self) -> bool {
        self.share.is_some()
    }

    /// The cursor of the shared frame; `None` in a room without a log.
    pub(super) fn cursor(&self) -> Option<Cursor> {
        if let Some(cursor) = &self.cursor {
            return Some((**cursor).clone());
        }
        let (origin, epoch) = self.of.origin.as_ref()?;
        Some(Cursor::single(Position {
            origin: origin.clone(),
            epoch: *epoch,
            seq: self.seq,
            fingerprint: self.fingerprint,
        }))
    }

    /// The memory it takes: its fields, and the frames that were made of it.
    pub(super) fn bytes(&self) -> usize {
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        let positions = |cursor: &Cursor| size_of_val(cursor.positions());
        let more = self.more.as_ref().map_or(0, |more| {
            let texts = text(&more.target) + text(&more.reply_to) + text(&more.mentions);
            size_of::<More>() + texts + more.after.as_ref().map_or(0, positions)
        });
        let cursor = self
            .cursor
            .as_ref()
            .map_or(0, |cursor| size_of::<Cursor>() + positions(cursor));
        let body = match self.body_in.get() {
            BodyIn::Frame => 0,
            BodyIn::Buffer | BodyIn::Copy => self.body.borrow().len(),
        };
        let frames: usize = self.frames.made().map(Bytes::len).sum();
        size_of::<Self>() + self.id.len() + self.from.len() + more + cursor + body + frames
    }

    /// About how long its frame is.
    pub(super) fn frame_bytes(&self) -> usize {
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        let more = self.more.as_ref().map_or(0, |more| {
            text(&more.target) + text(&more.reply_to) + text(&more.mentions)
        });
        let names = self.of.room.as_str().len() + self.id.len() + self.from.len();
        let cursor = self.cursor.as_ref().map_or(1, |it| it.positions().len()) * CURSOR_PART;
        FRAME_WORDS + names + more + cursor + self.body.borrow().len()
    }

    /// The frame that all receivers of a protocol share.
    pub(super) fn frame(&self, codec: Codec) -> Bytes {
        self.shared_frame(codec).clone()
    }

    /// The same, without a handle of its own.
    pub(super) fn shared_frame(&self, codec: Codec) -> &Bytes {
        let make = || {
            let Encoded { frame, body } = self.encode(codec, self.cursor().as_ref());
            let mut own = frame.len();
            if let Some(body) = body
                && self.body_in.replace(BodyIn::Frame) != BodyIn::Frame
            {
                own -= body.len();
                self.body.replace(frame.slice(body));
            }
            match &self.share {
                Some(share) => share.frame_of(own, frame),
                None => frame,
            }
        };
        self.frames.get(codec, make)
    }

    /// A frame with another cursor, for one member.
    pub(super) fn frame_at(&self, codec: Codec, cursor: &Cursor) -> Bytes {
        self.encode(codec, Some(cursor)).frame
    }

    fn encode(&self, codec: Codec, cursor: Option<&Cursor>) -> Encoded {
        // A cheap clone: the borrow must end before the body is replaced.
        let body = self.body.borrow().clone();
        let more = self.more.as_deref();
        codec.message(&MessagePush {
            room: &self.of.room,
            id: &self.id,
            from: &self.from,
            ts: self.shown_ts(),
            cursor,
            place: cursor.and_then(|cursor| match (self.at.track, &self.of.origin) {
                (0, Some((own, _))) => cursor.get(own),
                _ => None,
            }),
            body: &body,
            kind: self.kind,
            target: more.and_then(|more| more.target.as_deref()),
            reply_to: more.and_then(|more| more.reply_to.as_deref()),
            mentions: more.and_then(|more| more.mentions.as_deref()),
        })
    }
}

/// About how many bytes one component of a cursor takes.
const CURSOR_PART: usize = 32;
