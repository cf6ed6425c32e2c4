//! Server frames of RFC 6455: unmasked, never fragmented, each in one `Bytes` that all its receivers share.

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

/// A text or binary frame whose payload is written in place. Space for the header is left in front, and [`finish`](Self::finish)
/// fills it in. So the payload is never copied, unless it outgrows its capacity.
///
/// Append with [`put`](Self::put) or [`io::Write`] (`write!`, `serde_json::to_writer`), which never fails. The header
/// can't be changed. The caller must make sure that the whole payload of a text frame is UTF-8.
#[derive(Debug)]
pub struct FrameBuilder {
    /// Always at least [`HEADER_ROOM`] long.
    bytes: Vec<u8>,
    /// The first byte of the header.
    first: u8,
}

impl FrameBuilder {
    /// A text frame with room for a payload of `payload` bytes.
    #[must_use]
    pub fn with_capacity(payload: usize) -> Self {
        Self::new(TEXT, payload)
    }

    /// A binary frame with room for a payload of `payload` bytes.
    #[must_use]
    pub fn binary(payload: usize) -> Self {
        Self::new(BINARY, payload)
    }

    /// The first fragment of a text message. It must be sent together with one [`Self::last_fragment`].
    #[must_use]
    pub fn first_fragment(payload: usize) -> Self {
        Self::new(TEXT_BEGIN, payload)
    }

    /// The last fragment of a text message that began with a [`Self::first_fragment`].
    #[must_use]
    pub fn last_fragment(payload: usize) -> Self {
        Self::new(END, payload)
    }

    fn new(first: u8, payload: usize) -> Self {
        let mut bytes = Vec::with_capacity(HEADER_ROOM + payload);
        bytes.resize(HEADER_ROOM, 0);
        Self { bytes, first }
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

    /// The frame: header and payload.
    #[must_use]
    pub fn finish(self) -> Bytes {
        let (length, first) = (self.len(), self.first);
        let mut bytes = self.bytes;
        if bytes.capacity() - bytes.len() > MOST_SPARE {
            // A frame may be kept for long, and its length is what is counted for it.
            bytes.shrink_to_fit();
        }
        let header = if let Ok(short @ 0..=125) = u8::try_from(length) {
            bytes[8..10].copy_from_slice(&[first, short]);
            2
        } else if let Ok(medium) = u16::try_from(length) {
            bytes[6..8].copy_from_slice(&[first, 126]);
            bytes[8..10].copy_from_slice(&medium.to_be_bytes());
            4
        } else {
            bytes[..2].copy_from_slice(&[first, 127]);
            // A length in memory is below 2^63, so the top bit is clear as the RFC requires.
            bytes[2..10].copy_from_slice(&(length as u64).to_be_bytes());
            10
        };
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
        let mut frame = FrameBuilder::binary(3);
        frame.put(&[0, 255, 7]);
        assert_eq!(&frame.finish()[..], [0x82, 3, 0, 255, 7]);
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
