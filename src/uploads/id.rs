//! Ids of uploads, signed for a room and its owner.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use ulid::Ulid;

use crate::{config::Uploads, model::RoomId};

/// Bytes of the parts of an id: a ULID, the owner's mark, and the signature.
const ULID: usize = 16;
const OWNER: usize = 8;
const SIGNATURE: usize = 16;
const ID: usize = ULID + OWNER + SIGNATURE;

/// The id of an upload: its time and a random number, a mark of its owner, and a signature over both and the room.
///
/// The text is base64url, so it can stand in a path, and can be the name of a file. The owner's mark can't be turned back
/// into a name, and differs between uploads.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct UploadId([u8; ID]);

/// An upload id was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadUpload {
    /// It does not have the form of an id.
    #[error("it is not the id of an upload")]
    Malformed,
    /// It is of another room, or of another deployment, or was made up.
    #[error("it is not an upload of {0}")]
    OtherRoom(RoomId),
    /// It is of another user.
    #[error("it is the upload of another user")]
    OtherUser,
    /// It was uploaded too long ago.
    #[error("it was made too long ago: uploads that no message named are removed after a time")]
    Old,
}

/// Signs and checks ids, and the URLs of the local storage, with the secret of the deployment.
#[derive(Clone)]
pub struct Signer(Hmac<Sha256>);

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Signer")
    }
}

impl fmt::Display for UploadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64.encode(self.0))
    }
}

impl fmt::Debug for UploadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl UploadId {
    /// Reads the text of an id. Whether it is genuine says [`Signer::check`].
    ///
    /// # Errors
    /// [`BadUpload::Malformed`].
    pub fn parse(text: &str) -> Result<Self, BadUpload> {
        let mut bytes = [0; ID];
        match BASE64.decode_slice(text, &mut bytes) {
            Ok(ID) => Ok(Self(bytes)),
            Ok(_) | Err(_) => Err(BadUpload::Malformed),
        }
    }

    fn ulid(&self) -> Ulid {
        let mut bytes = [0; ULID];
        bytes.copy_from_slice(self.0.get(..ULID).unwrap_or_default());
        Ulid::from_bytes(bytes)
    }

    /// When it was made, in ms since 1970.
    #[must_use]
    pub fn made_at(&self) -> u64 {
        self.ulid().timestamp_ms()
    }

    fn part(&self, from: usize, bytes: usize) -> &[u8] {
        self.0.get(from..from + bytes).unwrap_or_default()
    }
}

impl Signer {
    /// With the secret of the configuration.
    #[must_use]
    pub fn new(config: &Uploads) -> Self {
        let key = Hmac::new_from_slice(config.secret.expose().as_bytes());
        Self(key.expect("HMAC takes keys of any length"))
    }

    /// What is signed: `what`, which keeps signatures of different things apart, and then parts. All parts but the last have
    /// a fixed length, so no two lists of parts are the same bytes.
    fn over(&self, what: &str, parts: [&[u8]; 2]) -> Hmac<Sha256> {
        let mut mac = self.0.clone();
        mac.update(what.as_bytes());
        for part in parts {
            mac.update(part);
        }
        mac
    }

    /// A new id for an upload of `user` in `room`.
    #[must_use]
    pub fn make(&self, room: &RoomId, user: &str) -> UploadId {
        let ulid = Ulid::new().to_bytes();
        let mut id = [0; ID];
        let mut put = |from: usize, bytes: &[u8]| {
            for (to, byte) in id.iter_mut().skip(from).zip(bytes) {
                *to = *byte;
            }
        };
        let owner = self
            .over("owner ", [&ulid, user.as_bytes()])
            .finalize()
            .into_bytes();
        let owner = owner.get(..OWNER).unwrap_or_default();
        put(0, &ulid);
        put(ULID, owner);
        let signed = [&ulid, owner].concat();
        let signature = self
            .over("upload", [&signed, room.as_str().as_bytes()])
            .finalize();
        let signature = signature.into_bytes();
        put(ULID + OWNER, signature.get(..SIGNATURE).unwrap_or_default());
        UploadId(id)
    }

    /// Reads an id, and checks that it is of an upload in `room`.
    ///
    /// # Errors
    /// [`BadUpload`].
    pub fn check(&self, text: &str, room: &RoomId) -> Result<UploadId, BadUpload> {
        let id = UploadId::parse(text)?;
        let signed = self.over(
            "upload",
            [id.part(0, ULID + OWNER), room.as_str().as_bytes()],
        );
        match signed.verify_truncated_left(id.part(ULID + OWNER, SIGNATURE)) {
            Ok(()) => Ok(id),
            Err(_other) => Err(BadUpload::OtherRoom(room.clone())),
        }
    }

    /// Whether `user` made an upload whose id was checked.
    #[must_use]
    pub fn is_of(&self, id: &UploadId, user: &str) -> bool {
        let owner = self.over("owner ", [id.part(0, ULID), user.as_bytes()]);
        owner.verify_truncated_left(id.part(ULID, OWNER)).is_ok()
    }

    /// The signature of a permit for the upload.
    pub(super) fn permit(&self, id: &UploadId, permit: &[u8]) -> String {
        let signed = self.over("permit", [&id.0, permit]);
        BASE64.encode(signed.finalize().into_bytes())
    }

    /// Whether a permit for the upload has this signature.
    pub(super) fn has_permit(&self, id: &UploadId, permit: &[u8], signature: &str) -> bool {
        let signed = self.over("permit", [&id.0, permit]);
        BASE64
            .decode(signature)
            .is_ok_and(|signature| signed.verify_slice(&signature).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uploads::file::tests::config;

    #[test]
    fn an_id_is_of_one_room_one_owner_and_one_deployment() {
        let (lobby, other) = ("chat:lobby", "chat:lobb");
        let room = |name| RoomId::parse(name).unwrap();
        let signer = Signer::new(&config(""));
        let id = signer.make(&room(lobby), "kim");
        let text = id.to_string();
        assert_eq!(text.len(), 54);
        assert_eq!(signer.check(&text, &room(lobby)), Ok(id));
        assert!(signer.is_of(&id, "kim") && !signer.is_of(&id, "ki") && !signer.is_of(&id, "lee"));
        let refused = Err(BadUpload::OtherRoom(room(other)));
        assert_eq!(signer.check(&text, &room(other)), refused);
        let foreign = Signer::new(&config(
            "secret = 'another secret, also of more than 32 bytes'",
        ));
        let refused = Err(BadUpload::OtherRoom(room(lobby)));
        assert_eq!(foreign.check(&text, &room(lobby)), refused);
        assert!(id.made_at().abs_diff(crate::runtime::unix_ms()) < 60_000);
    }

    #[test]
    fn a_changed_id_is_refused() {
        let room = RoomId::parse("chat:lobby").unwrap();
        let signer = Signer::new(&config(""));
        let id = signer.make(&room, "kim");
        for at in 0..ID {
            let mut forged = id;
            forged.0[at] ^= 1;
            assert!(signer.check(&forged.to_string(), &room).is_err(), "{at}");
        }
        for text in ["", "x", "a b", &format!("A{id}"), &format!("{id}A")] {
            assert_eq!(signer.check(text, &room), Err(BadUpload::Malformed));
        }
    }
}
