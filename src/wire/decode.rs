//! Decodes the client frames of RFC 6455 from a stream of bytes. Holds no buffer while nothing is unfinished.
//!
//! Reasons not to use the reader of fastwebsockets: it holds 8 KiB for each connection, reserves the declared length up
//! front, does not bound the sum of fragments, accepts unmasked frames, and is not cancel-safe. Here the caller reads,
//! and this type only examines bytes: no I/O, no clock.

use std::{fmt, mem};

use fastwebsockets::{OpCode, unmask};

use crate::protocol::Close;

/// Maximum number of fragments of one message; one more is [`Close::TooBig`].
///
/// `max_message` bounds the bytes of a message, but an empty fragment has none. Without this bound a client could keep
/// one message unfinished forever, and so avoid a rate limit that counts messages. Clients that fragment at all use
/// fragments of 4 KiB or more. For them this bound is at least 4 MiB, which is above the default of `limits.frame`.
pub const MAX_FRAGMENTS: u16 = 1024;

/// Maximum payload of a control frame, RFC 6455 section 5.5.
const MAX_CONTROL: usize = 125;
/// Maximum length of a client's frame header: two bytes, eight of extended length, four of mask.
const MAX_HEADER: usize = 14;

/// One complete message or control frame, borrowed for the duration of the callback.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming<'a> {
    /// A whole text message.
    Text(&'a str),
    /// A whole binary message.
    Binary(&'a [u8]),
    /// To be answered by [`pong_frame`](super::pong_frame) with the same bytes, at most 125.
    Ping(&'a [u8]),
    /// A pong. Its payload is not needed.
    Pong,
    /// The peer's close frame. Nothing after it is read.
    Close {
        /// Absent if the close frame was empty.
        code: Option<u16>,
    },
}

/// Decoder of the frames of one client.
///
/// # Invariants
/// - Holds heap memory only inside an unfinished frame or message: at most `max_message` bytes and one small fixed
///   block ([`held_bytes`](Self::held_bytes)). The memory grows with the bytes that have arrived, never with an
///   announced length.
/// - An invalid frame is refused as soon as the bytes that make it invalid have arrived: a message that is too large is
///   refused at its header.
/// - Control frames are not counted here. The caller that answers pings limits their rate.
pub struct Decoder {
    max_message: usize,
    /// Whether binary messages are accepted.
    binary: bool,
    unfinished: Option<Box<Unfinished>>,
    /// Whether a close frame or a violation was seen. The rest of the stream is ignored.
    ended: bool,
}

impl Decoder {
    /// A message, whole or as the sum of its fragments, may have up to `max_message` bytes. Unless `binary`, a binary
    /// message is refused with [`Close::Unsupported`].
    #[must_use]
    pub fn new(max_message: usize, binary: bool) -> Self {
        Self {
            max_message,
            binary,
            unfinished: None,
            ended: false,
        }
    }

    /// Takes the bytes that were just read and calls `on` for everything that they complete, in order. `input` is
    /// unmasked in place. A whole message in it is passed on without a copy. Afterwards the content of `input` is
    /// unspecified.
    ///
    /// After a close frame or an error, further input is ignored and nothing is held.
    ///
    /// # Errors
    /// The reason with which to close the connection. Everything before the violation has been passed to `on`.
    pub fn feed(
        &mut self,
        input: &mut [u8],
        mut on: impl FnMut(Incoming<'_>),
    ) -> Result<(), Close> {
        let mut input = input;
        let accepts = self.accepts();
        while !self.ended && !input.is_empty() {
            let step = match &mut self.unfinished {
                None => whole_frame(&mut input, accepts, &mut on),
                Some(unfinished) => unfinished.advance(&mut input, accepts, &mut on),
            };
            match step {
                Ok(Step::Between) => self.unfinished = None,
                Ok(Step::Within) => {
                    self.unfinished.get_or_insert_default();
                }
                Ok(Step::Closed) => self.end(),
                Err(close) => {
                    self.end();
                    return Err(close);
                }
            }
        }
        Ok(())
    }

    /// Heap bytes held for an unfinished frame or message; 0 if there is none.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.unfinished.as_ref().map_or(0, |unfinished| {
            mem::size_of::<Unfinished>() + unfinished.message.capacity()
        })
    }

    fn accepts(&self) -> Accepts {
        Accepts {
            bytes: self.max_message,
            binary: self.binary,
        }
    }

    fn end(&mut self) {
        self.ended = true;
        self.unfinished = None;
    }
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Payloads must not get into a log.
        f.debug_struct("Decoder")
            .field("max_message", &self.max_message)
            .field("held_bytes", &self.held_bytes())
            .field("ended", &self.ended)
            .finish()
    }
}

/// The state of the stream after a step.
enum Step {
    /// Between two messages: there is nothing to keep.
    Between,
    /// Inside a frame or message: the rest needs an [`Unfinished`].
    Within,
    /// After the close frame.
    Closed,
}

/// The messages that are accepted.
#[derive(Clone, Copy)]
struct Accepts {
    /// Up to this length.
    bytes: usize,
    /// Binary ones too.
    binary: bool,
}

#[derive(Clone, Copy)]
struct Header {
    opcode: OpCode,
    fin: bool,
    mask: [u8; 4],
    payload: usize,
}

impl Header {
    /// The header at the front of `bytes` and its length. `None` if `bytes` is the beginning of a possibly valid
    /// header.
    ///
    /// `message` is the length of the unfinished message so far; `None` between messages.
    fn parse(
        bytes: &[u8],
        message: Option<usize>,
        accepts: Accepts,
    ) -> Result<Option<(Self, usize)>, Close> {
        let Some(&first) = bytes.first() else {
            return Ok(None);
        };
        if first & 0x70 != 0 {
            return Err(Close::Protocol);
        }
        let fin = first & 0x80 != 0;
        let Ok(opcode) = OpCode::try_from(first & 0x0F) else {
            return Err(Close::Protocol);
        };
        let control = match (opcode, message) {
            (OpCode::Close | OpCode::Ping | OpCode::Pong, _) => true,
            (OpCode::Continuation, Some(_)) | (OpCode::Text, None) => false,
            (OpCode::Binary, None) if accepts.binary => false,
            (OpCode::Binary, None) => return Err(Close::Unsupported),
            (OpCode::Continuation, None) | (OpCode::Text | OpCode::Binary, Some(_)) => {
                return Err(Close::Protocol);
            }
        };
        if control && !fin {
            return Err(Close::Protocol);
        }

        let Some(&second) = bytes.get(1) else {
            return Ok(None);
        };
        let masked = second & 0x80 != 0;
        let short = second & 0x7F;
        if !masked || (control && usize::from(short) > MAX_CONTROL) {
            return Err(Close::Protocol);
        }
        let (declared, at) = match short {
            126 => {
                let Some(&length) = bytes.get(2..).and_then(<[u8]>::first_chunk) else {
                    return Ok(None);
                };
                let length = u64::from(u16::from_be_bytes(length));
                if length < 126 {
                    return Err(Close::Protocol);
                }
                (length, 4)
            }
            127 => {
                let Some(&length) = bytes.get(2..).and_then(<[u8]>::first_chunk) else {
                    return Ok(None);
                };
                let length = u64::from_be_bytes(length);
                if length >> 63 != 0 || length <= u64::from(u16::MAX) {
                    return Err(Close::Protocol);
                }
                (length, 10)
            }
            short => (u64::from(short), 2),
        };
        let Ok(payload) = usize::try_from(declared) else {
            return Err(Close::TooBig);
        };
        if !control && payload > accepts.bytes.saturating_sub(message.unwrap_or(0)) {
            return Err(Close::TooBig);
        }

        let Some(&mask) = bytes.get(at..).and_then(<[u8]>::first_chunk) else {
            return Ok(None);
        };
        let header = Self {
            opcode,
            fin,
            mask,
            payload,
        };
        Ok(Some((header, at + mask.len())))
    }
}

/// The fast path: takes a whole unfragmented message or control frame off the front of `input`, if nothing before it is
/// unfinished. Anything else is left for [`Unfinished::advance`].
fn whole_frame(
    input: &mut &mut [u8],
    accepts: Accepts,
    on: &mut impl FnMut(Incoming<'_>),
) -> Result<Step, Close> {
    let Some((header, at)) = Header::parse(input, None, accepts)? else {
        return Ok(Step::Within);
    };
    if !header.fin || input.len() - at < header.payload {
        return Ok(Step::Within);
    }
    let frame = take_front(input, at + header.payload);
    let payload = &mut frame[at..];
    unmask(payload, header.mask);
    match header.opcode {
        OpCode::Text | OpCode::Continuation => {
            pass_text(payload, on)?;
            Ok(Step::Between)
        }
        OpCode::Binary => {
            on(Incoming::Binary(payload));
            Ok(Step::Between)
        }
        OpCode::Close | OpCode::Ping | OpCode::Pong => {
            pass_control(header.opcode, payload, Step::Between, on)
        }
    }
}

/// The state inside a frame or between the fragments of a message.
struct Unfinished {
    /// The part of a frame's header that has arrived; empty while a payload is read.
    head: [u8; MAX_HEADER],
    head_len: usize,
    /// The header of the frame whose payload is being read. `payload` counts down to what is still to come, and the
    /// mask is rotated to the next byte.
    frame: Option<Header>,
    /// Number of fragments of the current message whose header was seen; 0 between messages.
    fragments: u16,
    /// Whether the current message is binary.
    binary: bool,
    /// The message so far, unmasked.
    message: Vec<u8>,
    /// The control frame so far, unmasked. Separate from `message`, since a control frame may come between two
    /// fragments.
    control: [u8; MAX_CONTROL],
    control_len: usize,
}

impl Default for Unfinished {
    fn default() -> Self {
        Self {
            head: [0; MAX_HEADER],
            head_len: 0,
            frame: None,
            fragments: 0,
            binary: false,
            message: Vec::new(),
            control: [0; MAX_CONTROL],
            control_len: 0,
        }
    }
}

impl Unfinished {
    /// Takes bytes of the current frame off `input`.
    fn advance(
        &mut self,
        input: &mut &mut [u8],
        accepts: Accepts,
        on: &mut impl FnMut(Incoming<'_>),
    ) -> Result<Step, Close> {
        let mut frame = match self.frame.take() {
            Some(frame) => frame,
            None => match self.read_header(input, accepts)? {
                Some(frame) => frame,
                None => return Ok(Step::Within),
            },
        };
        let part = take_front(input, frame.payload.min(input.len()));
        unmask(part, frame.mask);
        frame.mask.rotate_left(part.len() % 4);
        frame.payload -= part.len();

        match frame.opcode {
            OpCode::Text | OpCode::Binary | OpCode::Continuation => {
                // The last fragment determines the final size. Before it the message may still grow up to the limit.
                let most = if frame.fin {
                    self.message.len() + part.len() + frame.payload
                } else {
                    accepts.bytes
                };
                append(&mut self.message, part, most);
                if frame.payload > 0 {
                    self.frame = Some(frame);
                    return Ok(Step::Within);
                }
                if !frame.fin {
                    return Ok(Step::Within);
                }
                match self.binary {
                    true => on(Incoming::Binary(&self.message)),
                    false => pass_text(&self.message, on)?,
                }
                Ok(Step::Between)
            }
            OpCode::Close | OpCode::Ping | OpCode::Pong => {
                let end = self.control_len + part.len();
                self.control[self.control_len..end].copy_from_slice(part);
                self.control_len = end;
                if frame.payload > 0 {
                    self.frame = Some(frame);
                    return Ok(Step::Within);
                }
                self.control_len = 0;
                let after = if self.fragments == 0 {
                    Step::Between
                } else {
                    Step::Within
                };
                pass_control(frame.opcode, &self.control[..end], after, on)
            }
        }
    }

    fn read_header(
        &mut self,
        input: &mut &mut [u8],
        accepts: Accepts,
    ) -> Result<Option<Header>, Close> {
        let had = self.head_len;
        let more = input.len().min(MAX_HEADER - had);
        self.head[had..had + more].copy_from_slice(&input[..more]);
        let message = (self.fragments > 0).then_some(self.message.len());
        match Header::parse(&self.head[..had + more], message, accepts)? {
            None => {
                // There are fewer than `MAX_HEADER` bytes so far, so all of the input fitted into `head`.
                self.head_len = had + more;
                take_front(input, more);
                Ok(None)
            }
            Some((header, length)) => {
                self.head_len = 0;
                // The part that had arrived before was not a whole header, so `length` is greater than `had`.
                take_front(input, length - had);
                match header.opcode {
                    OpCode::Text | OpCode::Binary | OpCode::Continuation => {
                        if self.fragments == MAX_FRAGMENTS {
                            return Err(Close::TooBig);
                        }
                        if self.fragments == 0 {
                            self.binary = matches!(header.opcode, OpCode::Binary);
                        }
                        self.fragments += 1;
                    }
                    OpCode::Close | OpCode::Ping | OpCode::Pong => {}
                }
                Ok(Some(header))
            }
        }
    }
}

/// Appends bytes. Doubles the capacity as needed, but never beyond `most`, which the message can't exceed.
fn append(message: &mut Vec<u8>, part: &[u8], most: usize) {
    let needed = message.len() + part.len();
    if needed > message.capacity() {
        let capacity = needed.max(message.capacity().saturating_mul(2).min(most));
        message.reserve_exact(capacity - message.len());
    }
    message.extend_from_slice(part);
}

fn take_front<'a>(input: &mut &'a mut [u8], n: usize) -> &'a mut [u8] {
    let (front, rest) = mem::take(input).split_at_mut(n);
    *input = rest;
    front
}

fn pass_text(payload: &[u8], on: &mut impl FnMut(Incoming<'_>)) -> Result<(), Close> {
    let Ok(text) = simdutf8::basic::from_utf8(payload) else {
        return Err(Close::InvalidUtf8);
    };
    on(Incoming::Text(text));
    Ok(())
}

/// Passes a control frame on. Returns `after`, or [`Step::Closed`] for a close frame.
fn pass_control(
    opcode: OpCode,
    payload: &[u8],
    after: Step,
    on: &mut impl FnMut(Incoming<'_>),
) -> Result<Step, Close> {
    match opcode {
        OpCode::Ping => on(Incoming::Ping(payload)),
        OpCode::Close => {
            let code = close_code(payload)?;
            on(Incoming::Close { code });
            return Ok(Step::Closed);
        }
        // This function is not called with data opcodes.
        OpCode::Pong | OpCode::Text | OpCode::Binary | OpCode::Continuation => on(Incoming::Pong),
    }
    Ok(after)
}

fn close_code(payload: &[u8]) -> Result<Option<u16>, Close> {
    match payload {
        [] => Ok(None),
        [_] => Err(Close::Protocol),
        [high, low, reason @ ..] => {
            let code = u16::from_be_bytes([*high, *low]);
            // The `CloseCode` of fastwebsockets is not used: it refuses 1014, which is registered at IANA.
            if !matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999) {
                return Err(Close::Protocol);
            }
            if simdutf8::basic::from_utf8(reason).is_err() {
                return Err(Close::InvalidUtf8);
            }
            Ok(Some(code))
        }
    }
}

#[cfg(test)]
mod tests;
