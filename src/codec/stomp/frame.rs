//! Frames of STOMP, read from a stream of bytes and written.
//!
//! Source: <https://stomp.github.io/stomp-specification-1.2.html> and those of 1.1 and 1.0. What real clients do besides
//! is accepted where it is unambiguous.

use std::borrow::Cow;

use crate::{
    codec::Codec,
    protocol::{ErrorCode, Refused},
    wire::FrameBuilder,
};

/// Most bytes of a frame's command and headers.
const MAX_HEAD: usize = 64 * 1024;

/// Most headers of a frame.
const MAX_HEADERS: usize = 100;

/// The versions that are spoken.
pub(super) const VERSIONS: &str = "1.0,1.1,1.2";

/// A version of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Version {
    V1_0,
    V1_1,
    V1_2,
}

impl Version {
    /// The newest version in a list such as `1.0,1.2`.
    pub(super) fn best(list: &str) -> Option<Self> {
        let known = |word: &str| match word.trim() {
            "1.0" => Some(Self::V1_0),
            "1.1" => Some(Self::V1_1),
            "1.2" => Some(Self::V1_2),
            _ => None,
        };
        list.split(',').filter_map(known).max()
    }

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::V1_0 => "1.0",
            Self::V1_1 => "1.1",
            Self::V1_2 => "1.2",
        }
    }
}

/// A frame of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) command: String,
    headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

impl Frame {
    /// The first header of this name.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        headers
            .find(|(its, _)| its == name)
            .map(|(_, value)| &**value)
    }

    /// The first header of this name, in any case.
    pub(super) fn get_in_any_case(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        let found = headers.find(|(its, _)| its.eq_ignore_ascii_case(name));
        found.map(|(_, value)| &**value)
    }
}

/// Where a frame that has not come as a whole has got to.
#[derive(Debug, Clone, Copy)]
struct Head {
    /// Where its body begins.
    body: usize,
    /// Its `content-length`.
    length: Option<usize>,
}

/// Cuts bytes into frames. Holds the bytes of one frame that is not complete.
#[derive(Debug)]
pub(super) struct Frames {
    /// Most bytes of a body.
    most: usize,
    bytes: Vec<u8>,
    /// Where the next frame begins in `bytes`.
    at: usize,
    /// Up to here, counted from `at`, there is no end of what is looked for.
    looked_at: usize,
    head: Option<Head>,
}

fn too_much_head() -> Refused {
    bad(format!("the headers have more than {MAX_HEAD} bytes"))
}

fn bad(text: impl Into<String>) -> Refused {
    Refused::new(ErrorCode::BadRequest, text)
}

impl Frames {
    /// Frames with bodies of up to `most` bytes.
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            bytes: Vec::new(),
            at: 0,
            looked_at: 0,
            head: None,
        }
    }

    /// Adds bytes that came.
    pub(super) fn add(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Forgets the frames that were taken. An idle session holds no memory.
    pub(super) fn compact(&mut self) {
        if self.at == self.bytes.len() {
            self.bytes = Vec::new();
        } else {
            self.bytes.drain(..self.at);
        }
        self.at = 0;
    }

    /// What was not taken yet.
    fn rest(&self) -> &[u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }

    /// Takes the next frame, if it is complete. `version`: the one that was agreed on.
    pub(super) fn next(&mut self, version: Option<Version>) -> Result<Option<Frame>, Refused> {
        if self.head.is_none() {
            self.skip_line_ends();
        }
        let head = match self.head {
            Some(head) => head,
            None => match self.look_for_head()? {
                Some(head) => head,
                None => return Ok(None),
            },
        };
        self.head = Some(head);
        let end = match head.length {
            Some(length) => {
                let end = head.body + length;
                match self.rest().get(end) {
                    None => return Ok(None),
                    Some(0) => end,
                    Some(_) => return Err(bad("there is no NUL after content-length bytes")),
                }
            }
            None => {
                let from = self.looked_at.max(head.body);
                let rest = self.rest();
                let (came, tail) = (rest.len(), rest.get(from..).unwrap_or_default());
                match memchr::memchr(0, tail) {
                    Some(at) => from + at,
                    None if came - head.body > self.most => return Err(self.too_large()),
                    None => {
                        self.looked_at = came;
                        return Ok(None);
                    }
                }
            }
        };
        let frame = self.frame(head, end, version)?;
        self.at += end + 1;
        self.looked_at = 0;
        self.head = None;
        Ok(Some(frame))
    }

    /// Between frames, line ends are signs of life.
    fn skip_line_ends(&mut self) {
        let ends = self
            .rest()
            .iter()
            .take_while(|b| matches!(b, b'\n' | b'\r'));
        let ends = ends.count();
        self.at += ends;
        self.looked_at = self.looked_at.saturating_sub(ends);
    }

    /// Looks for the empty line behind the headers.
    fn look_for_head(&mut self) -> Result<Option<Head>, Refused> {
        let mut at = self.looked_at;
        while let Some(found) = memchr::memchr(b'\n', self.rest().get(at..).unwrap_or_default()) {
            let line_end = at + found;
            let rest = self.rest().get(line_end + 1..).unwrap_or_default();
            let body = match rest {
                [b'\n', ..] => Some(line_end + 2),
                [b'\r', b'\n', ..] => Some(line_end + 3),
                _ => None,
            };
            if let Some(body) = body {
                if body > MAX_HEAD {
                    return Err(too_much_head());
                }
                let length = self.content_length(line_end)?;
                self.looked_at = 0;
                return Ok(Some(Head { body, length }));
            }
            at = line_end + 1;
        }
        // The last two bytes may be the beginning of the empty line.
        self.looked_at = self.rest().len().saturating_sub(2);
        if self.rest().len() > MAX_HEAD {
            return Err(too_much_head());
        }
        Ok(None)
    }

    fn content_length(&self, line_end: usize) -> Result<Option<usize>, Refused> {
        let head = self.rest().get(..line_end).unwrap_or_default();
        let mut lines = head.split(|b| *b == b'\n').skip(1);
        let Some(value) = lines.find_map(|line| line.strip_prefix(b"content-length:")) else {
            return Ok(None);
        };
        let length = std::str::from_utf8(value).ok();
        let length = length.and_then(|text| text.trim().parse::<usize>().ok());
        let length = length.ok_or_else(|| bad("content-length is not a number"))?;
        if length > self.most {
            return Err(self.too_large());
        }
        Ok(Some(length))
    }

    fn too_large(&self) -> Refused {
        let text = format!("the body has more than {} bytes", self.most);
        Refused::new(ErrorCode::TooLarge, text)
    }

    fn frame(&self, head: Head, end: usize, version: Option<Version>) -> Result<Frame, Refused> {
        let lines = self.rest().get(..head.body).unwrap_or_default();
        let lines = std::str::from_utf8(lines).map_err(|_at| bad("a header is not UTF-8"))?;
        if lines.contains('\0') {
            return Err(bad("a header has a NUL"));
        }
        let mut lines = lines
            .split('\n')
            .map(|line| line.strip_suffix('\r').unwrap_or(line));
        let command = lines.next().unwrap_or_default().to_owned();
        // The passwords in these frames are not escaped.
        let is_plain = matches!(&*command, "CONNECT" | "STOMP");
        let mut headers = Vec::new();
        for line in lines.filter(|line| !line.is_empty()) {
            let (name, value) = line
                .split_once(':')
                .ok_or_else(|| bad(format!("a header of {command} has no colon")))?;
            let value = match is_plain {
                true => Cow::Borrowed(value),
                false => unescape(value, version.unwrap_or(Version::V1_2))?,
            };
            if headers.len() == MAX_HEADERS {
                return Err(bad(format!(
                    "{command} has more than {MAX_HEADERS} headers"
                )));
            }
            headers.push((name.to_owned(), value.into_owned()));
        }
        Ok(Frame {
            command,
            headers,
            body: self.rest().get(head.body..end).unwrap_or_default().to_vec(),
        })
    }
}

/// Undoes the escapes of a header. Version 1.2 allows no other escapes; clients of 1.1 also send backslashes as they are.
fn unescape(value: &str, version: Version) -> Result<Cow<'_, str>, Refused> {
    if version == Version::V1_0 || !value.contains('\\') {
        return Ok(Cow::Borrowed(value));
    }
    let mut out = String::with_capacity(value.len());
    let mut rest = value.chars();
    while let Some(char) = rest.next() {
        if char != '\\' {
            out.push(char);
            continue;
        }
        match rest.clone().next() {
            Some('n') => out.push('\n'),
            Some('r') if version == Version::V1_2 => out.push('\r'),
            Some('c') => out.push(':'),
            Some('\\') => out.push('\\'),
            _ if version == Version::V1_2 => return Err(bad("a header has an unknown escape")),
            _ => {
                out.push('\\');
                continue;
            }
        }
        rest.next();
    }
    Ok(Cow::Owned(out))
}

/// Writes the lines of a frame's head.
pub(super) struct Lines {
    pub(super) out: FrameBuilder,
    /// Whether colons in values are escaped. They can't be mistaken there in any version, and clients of 1.1 don't undo
    /// the escape; 1.2 demands it.
    escapes_colons: bool,
}

impl Lines {
    /// Lines in the form of a version.
    pub(super) fn of(codec: Codec, out: FrameBuilder) -> Self {
        let escapes_colons = codec == Codec::Stomp;
        Self {
            out,
            escapes_colons,
        }
    }

    /// Begins a frame with its command.
    pub(super) fn command(codec: Codec, out: FrameBuilder, command: &str) -> Self {
        let mut lines = Self::of(codec, out);
        lines.out.put(command.as_bytes());
        lines.out.put_u8(b'\n');
        // The first frame is never escaped.
        lines.escapes_colons &= command != "CONNECTED";
        lines
    }

    /// A header.
    pub(super) fn header(&mut self, name: &str, value: &str) -> &mut Self {
        self.out.put(name.as_bytes());
        self.out.put_u8(b':');
        for byte in value.bytes() {
            match byte {
                b'\\' => self.out.put(b"\\\\"),
                b'\n' => self.out.put(b"\\n"),
                b'\r' => self.out.put(b"\\r"),
                b':' if self.escapes_colons => self.out.put(b"\\c"),
                byte => self.out.put_u8(byte),
            }
        }
        self.out.put_u8(b'\n');
        self
    }

    /// A header with a number.
    pub(super) fn number(&mut self, name: &str, value: u64) -> &mut Self {
        self.header(name, itoa::Buffer::new().format(value))
    }

    /// Ends the frame without a body.
    pub(super) fn end(&mut self) {
        self.out.put(b"\n\0");
    }

    /// Ends the frame with a body of a type. Returns where the body is in what was written.
    pub(super) fn body(&mut self, content_type: &str, body: &[u8]) -> std::ops::Range<usize> {
        self.header("content-type", content_type)
            .number("content-length", body.len() as u64);
        self.out.put_u8(b'\n');
        let at = self.out.len();
        self.out.put(body);
        self.out.put_u8(0);
        at..at + body.len()
    }
}
