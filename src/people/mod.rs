//! Rooms and people: records of rooms with their members and settings, what they allow, and which rooms a user is in.
//!
//! Nothing here has a home region. A region writes its own buckets `rooms_<region>` and `inbox_<region>`, and mirrors
//! those of the others; what a reader sees is the merge of all of them ([`record`]). A change is made by reading the
//! merge, applying the change ([`change`]) and writing the result over the own region's key with compare-and-set.
//! An edge follows the records that it has read ([`known`]), so that a change acts on live sessions everywhere.

mod access;
mod change;
mod devices;
mod filter;
mod followed;
mod inbox;
mod index;
mod known;
mod names;
mod record;
mod sweep;
mod write;

#[cfg(test)]
mod tests;

pub use access::Removal;
pub use change::{Change, Create, Said, Told, alert_told, told_of_pin};
pub use devices::{Device, Devices, Subscription, Unwanted};
pub use filter::Filter;
pub use followed::Found;
pub use inbox::{InboxOf, Whose, fitting, page_limit, preview};
pub use known::{Known, People, RecordChange};
pub use names::{direct, entry_id, group};
pub use record::{Alert, MemberState, Record, RoomKind};
pub use sweep::Sweep;
pub use write::Changed;
