//! What is written to a connection, in pieces that all receivers share: server frames of RFC 6455, which are unmasked,
//! and what the stream of an HTTP response has in their place.

use std::io;

use bytes::{Buf, Bytes};

const TEXT: u8 = 0x81;
const BINARY: u8 = 0x82;
/// The first fragment of a text message, and the last one.
const TEXT_BEGIN: u8 = 0x01;
const END: u8 = 0x80;
const CLOSE: u8 = 0x88;
const PING: u8 = 0x89;
const PONG: u8 = 0x8A;

/// The longest header of a server frame: two bytes and eight of extended length.
const HEADER_ROOM: usize = 10;
/// Where the data of an event begins.
const EVENT_DATA: &[u8] = b"data: ";
/// Most bytes of capacity that a finished frame may keep beyond its length.
const MOST_SPARE: usize = 64;
/// Payload of a control frame, RFC 6455 section 5.5.
const MAX_CONTROL: usize = 125;

/// A text frame with a copy of `payload`, which must be UTF-8.
#[cfg(test)]
#[must_use]
pub fn text_frame(payload: &[u8]) -> Bytes {
    let mut frame = FrameBuilder::with_capacity(payload.len());
    frame.put(payload);
    frame.finish()
}

/// The payload of a [`text_frame`].
#[cfg(test)]
#[must_use]
pub fn text_of(frame: &[u8]) -> &[u8] {
    let header = match frame.get(1) {
        Some(127) => 10,
        Some(126) => 4,
        _ => 2,
    };
    frame.get(header..).unwrap_or_default()
}

/// A ping without a payload. A connection needs at most one ping in flight, so pings need not be told apart.
#[must_use]
pub fn ping_frame() -> Bytes {
    Bytes::from_static(&[PING, 0])
}

/// The answer to a ping. A payload of more than 125 bytes, which a ping can't have, is cut off.
#[must_use]
pub fn pong_frame(payload: &[u8]) -> Bytes {
    control_frame(PONG, &[payload])
}

/// A close frame. Of the reason, what does not fit into a control frame is cut off.
#[must_use]
pub fn close_frame(code: u16, reason: &str) -> Bytes {
    control_frame(CLOSE, &[&code.to_be_bytes(), reason.as_bytes()])
}

fn control_frame(first: u8, parts: &[&[u8]]) -> Bytes {
    let mut length = 0_u8;
    let payload = parts.iter().copied().flatten().take(MAX_CONTROL);
    let mut frame = Vec::with_capacity(2 + MAX_CONTROL.min(parts.iter().map(|p| p.len()).sum()));
    frame.extend([first, 0]);
    for &byte in payload {
        frame.push(byte);
        length += 1;
    }
    frame[1] = length;
    Bytes::from(frame)
}

/// What stands around a payload on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// A WebSocket text frame.
    Text,
    /// A WebSocket binary frame.
    Binary,
    /// The first fragment of a WebSocket text message. It must be sent together with one [`Self::LastFragment`].
    FirstFragment,
    /// The last fragment of a WebSocket text message that began with a [`Self::FirstFragment`].
    LastFragment,
    /// A line of a stream. The payload has no line break.
    Line,
    /// An event of `text/event-stream` without a name. The payload has no line break.
    Event,
    /// Nothing.
    Bare,
}

impl Framing {
    /// The first byte of a WebSocket frame.
    fn opcode(self) -> Option<u8> {
        match self {
            Self::Text => Some(TEXT),
            Self::Binary => Some(BINARY),
            Self::FirstFragment => Some(TEXT_BEGIN),
            Self::LastFragment => Some(END),
            Self::Line | Self::Event | Self::Bare => None,
        }
    }

    /// What follows the payload.
    fn end(self) -> &'static [u8] {
        match self {
            Self::Line => b"\n",
            Self::Event => b"\n\n",
            _ => b"",
        }
    }
}

/// A frame whose payload is written in place. Space for the header is left in front, and [`finish`](Self::finish)
/// fills it in. So the payload is never copied, unless it outgrows its capacity.
///
/// Append with [`put`](Self::put) or [`io::Write`] (`write!`, `serde_json::to_writer`), which never fails. The header
/// can't be changed. The caller must make sure that the whole payload of a text frame is UTF-8.
#[derive(Debug)]
pub struct FrameBuilder {
    /// Always at least [`HEADER_ROOM`] long.
    bytes: Vec<u8>,
    framing: Framing,
}

impl FrameBuilder {
    /// A text frame with room for a payload of `payload` bytes.
    #[must_use]
    pub fn with_capacity(payload: usize) -> Self {
        Self::new(Framing::Text, payload)
    }

    /// A frame with room for a payload of `payload` bytes.
    #[must_use]
    pub fn new(framing: Framing, payload: usize) -> Self {
        let mut bytes = Vec::with_capacity(HEADER_ROOM + payload + framing.end().len());
        bytes.resize(HEADER_ROOM, 0);
        Self { bytes, framing }
    }

    /// Appends to the payload.
    pub fn put(&mut self, part: &[u8]) {
        self.bytes.extend_from_slice(part);
    }

    /// Appends one byte to the payload.
    pub fn put_u8(&mut self, byte: u8) {
        self.bytes.push(byte);
    }

    /// Bytes of payload so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len() - HEADER_ROOM
    }

    /// The length of the header that the frame gets.
    #[must_use]
    pub fn header_len(&self) -> usize {
        match self.framing {
            Framing::Event => EVENT_DATA.len(),
            Framing::Line | Framing::Bare => 0,
            _ => match self.len() {
                0..=125 => 2,
                126..=0xffff => 4,
                _ => 10,
            },
        }
    }

    /// The frame: header and payload.
    #[must_use]
    pub fn finish(self) -> Bytes {
        let (length, header, framing) = (self.len(), self.header_len(), self.framing);
        let mut bytes = self.bytes;
        bytes.extend_from_slice(framing.end());
        if bytes.capacity() - bytes.len() > MOST_SPARE {
            // A frame may be kept for long, and its length is what is counted for it.
            bytes.shrink_to_fit();
        }
        let place = &mut bytes[HEADER_ROOM - header..HEADER_ROOM];
        match (framing, framing.opcode()) {
            (Framing::Event, _) => place.copy_from_slice(EVENT_DATA),
            (_, None) => {}
            (_, Some(first)) => {
                place[0] = first;
                // A length in memory is below 2^63, so the top bit is clear as the RFC requires.
                let length = (length as u64).to_be_bytes();
                match header {
                    2 => place[1] = length[7],
                    4 => {
                        place[1] = 126;
                        place[2..].copy_from_slice(&length[6..]);
                    }
                    _ => {
                        place[1] = 127;
                        place[2..].copy_from_slice(&length);
                    }
                }
            }
        }
        let mut frame = Bytes::from(bytes);
        frame.advance(HEADER_ROOM - header);
        frame
    }
}

impl io::Write for FrameBuilder {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        self.put(part);
        Ok(part.len())
    }

    fn write_all(&mut self, part: &[u8]) -> io::Result<()> {
        self.put(part);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn header_of(length: usize) -> Vec<u8> {
        let frame = text_frame(&vec![b'x'; length]);
        let header = frame.len() - length;
        assert!(frame[header..].iter().all(|&b| b == b'x'));
        assert_eq!(text_of(&frame).len(), length);
        frame[..header].to_vec()
    }

    #[test]
    fn lengths_take_the_shortest_form() {
        assert_eq!(header_of(0), [0x81, 0]);
        assert_eq!(header_of(125), [0x81, 125]);
        assert_eq!(header_of(126), [0x81, 126, 0, 126]);
        assert_eq!(header_of(65_535), [0x81, 126, 255, 255]);
        assert_eq!(header_of(65_536), [0x81, 127, 0, 0, 0, 0, 0, 1, 0, 0]);
    }

    #[test]
    fn payload_is_written_in_place() {
        let mut frame = FrameBuilder::with_capacity(40);
        let at = frame.bytes.as_ptr();
        frame.put(b"{\"n\":");
        write!(frame, "{}", 42).unwrap();
        frame.put(b"}");
        assert_eq!(frame.len(), 8);
        let frame = frame.finish();
        assert_eq!(&frame[..], b"\x81\x08{\"n\":42}");
        assert_eq!(frame.as_ptr(), at.wrapping_add(8));

        let mut frame = FrameBuilder::with_capacity(0);
        frame.write_all(&[b'y'; 300]).unwrap();
        let frame = frame.finish();
        assert_eq!(&frame[..5], [0x81, 126, 1, 44, b'y']);
        assert_eq!(frame.len(), 304);
    }

    #[test]
    fn binary_frames() {
        let mut frame = FrameBuilder::new(Framing::Binary, 3);
        frame.put(&[0, 255, 7]);
        assert_eq!(&frame.finish()[..], [0x82, 3, 0, 255, 7]);
    }

    #[test]
    fn streams() {
        let of = |framing| {
            let mut frame = FrameBuilder::new(framing, 2);
            frame.put(b"{}");
            frame.finish()
        };
        assert_eq!(&of(Framing::Line)[..], b"{}\n");
        assert_eq!(&of(Framing::Event)[..], b"data: {}\n\n");
        assert_eq!(&of(Framing::Bare)[..], b"{}");
    }

    #[test]
    fn control_frames() {
        assert_eq!(&ping_frame()[..], [0x89, 0]);
        assert_eq!(&pong_frame(b"ab")[..], b"\x8A\x02ab");
        assert_eq!(pong_frame(&[7; 125]).len(), 127);
        assert_eq!(pong_frame(&[7; 126])[1], 125);
        let frame = close_frame(4001, "token_expired_or_bad");
        assert_eq!(frame[..2], [0x88, 22]);
        assert_eq!(frame[2..4], 4001_u16.to_be_bytes());
        assert_eq!(&frame[4..], b"token_expired_or_bad");
        assert_eq!(close_frame(1000, &"r".repeat(200))[1], 125);
    }
}
