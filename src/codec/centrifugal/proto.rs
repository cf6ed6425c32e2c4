//! The messages of Centrifugo's client protocol, as Protobuf and as JSON.
//!
//! Field names and numbers are those of `client.proto` in github.com/centrifugal/protocol. In JSON, fields with a
//! default value are left out, and `data`, `conn_info` and `chan_info` are JSON values instead of bytes.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

/// JSON text in a field of bytes.
fn read_json<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
    let text = <&RawValue>::deserialize(deserializer)?;
    Ok(Bytes::copy_from_slice(text.get().as_bytes()))
}

/// A text in a field of bytes.
fn read_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
    String::deserialize(deserializer).map(Bytes::from)
}

/// `null` is the same as nothing.
fn or_default<'de, T: Deserialize<'de> + Default, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

fn write_json<S: Serializer>(bytes: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
    let text: &RawValue = serde_json::from_slice(bytes).map_err(serde::ser::Error::custom)?;
    text.serialize(serializer)
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// A command of a client: one of the methods.
#[derive(Clone, PartialEq, prost::Message, Deserialize)]
#[serde(default)]
pub(super) struct Command {
    #[prost(uint32, tag = "1")]
    #[serde(deserialize_with = "or_default")]
    pub(super) id: u32,
    #[prost(message, optional, boxed, tag = "4")]
    pub(super) connect: Option<Box<ConnectRequest>>,
    #[prost(message, optional, boxed, tag = "5")]
    pub(super) subscribe: Option<Box<SubscribeRequest>>,
    #[prost(message, optional, tag = "6")]
    pub(super) unsubscribe: Option<ChannelRequest>,
    #[prost(message, optional, tag = "7")]
    pub(super) publish: Option<PublishRequest>,
    #[prost(message, optional, tag = "8")]
    pub(super) presence: Option<ChannelRequest>,
    #[prost(message, optional, tag = "9")]
    pub(super) presence_stats: Option<ChannelRequest>,
    #[prost(message, optional, tag = "10")]
    pub(super) history: Option<HistoryRequest>,
    #[prost(message, optional, tag = "11")]
    pub(super) ping: Option<Empty>,
    #[prost(message, optional, tag = "12")]
    pub(super) send: Option<DataRequest>,
    #[prost(message, optional, tag = "13")]
    pub(super) rpc: Option<RpcRequest>,
    #[prost(message, optional, tag = "14")]
    pub(super) refresh: Option<RefreshRequest>,
    #[prost(message, optional, tag = "15")]
    pub(super) sub_refresh: Option<SubRefreshRequest>,
}

#[derive(Clone, PartialEq, prost::Message, Deserialize)]
#[serde(default)]
pub(super) struct ConnectRequest {
    #[prost(string, tag = "1")]
    #[serde(deserialize_with = "or_default")]
    pub(super) token: String,
    #[prost(btree_map = "string, message", tag = "3")]
    #[serde(deserialize_with = "or_default")]
    pub(super) subs: BTreeMap<String, SubscribeRequest>,
}

#[derive(Clone, PartialEq, prost::Message, Deserialize)]
#[serde(default)]
pub(super) struct SubscribeRequest {
    #[prost(string, tag = "1")]
    #[serde(deserialize_with = "or_default")]
    pub(super) channel: String,
    #[prost(string, tag = "2")]
    #[serde(deserialize_with = "or_default")]
    pub(super) token: String,
    #[prost(bool, tag = "3")]
    #[serde(deserialize_with = "or_default")]
    pub(super) recover: bool,
    #[prost(string, tag = "6")]
    #[serde(deserialize_with = "or_default")]
    pub(super) epoch: String,
    #[prost(uint64, tag = "7")]
    #[serde(deserialize_with = "or_default")]
    pub(super) offset: u64,
    #[prost(bytes = "bytes", tag = "8")]
    #[serde(deserialize_with = "read_json")]
    pub(super) data: Bytes,
    #[prost(bool, tag = "11")]
    #[serde(deserialize_with = "or_default")]
    pub(super) join_leave: bool,
    /// A filter by tags.
    #[prost(message, optional, tag = "13")]
    pub(super) tf: Option<Empty>,
    #[prost(int64, tag = "14")]
    #[serde(deserialize_with = "or_default")]
    pub(super) flag: i64,
    /// Not 0 for subscriptions of another kind than a stream of publications.
    #[prost(int32, tag = "15")]
    #[serde(rename = "type", deserialize_with = "or_default")]
    pub(super) kind: i32,
}

/// The request of a method whose only field is the channel.
#[derive(Clone, PartialEq, prost::Message, Deserialize)]
#[serde(default)]
pub(super) struct ChannelRequest {
    #[prost(string, tag = "1")]
    #[serde(deserialize_with = "or_default")]
    pub(super) channel: String,
}

#[derive(Clone, PartialEq, prost::Message, Deserialize)]
#[serde(default)]
pub(super) struct PublishRequest {
    #[prost(string, tag = "1")]
    #[serde(deserialize_with = "or_default")]
    pub(super) channel: String,
    #[prost(bytes = "bytes", tag = "2")]
    #[serde(deserialize_with = "read_json")]
    pub(super) data: Bytes,
    /// Not 0 for publications to another kind of subscription than a stream.
    #[prost(int32, tag = "3")]
    #[serde(rename = "type", deserialize_with = "or_default")]
    pub(super) kind: i32,
}

#[derive(Clone, PartialEq, prost::Message, Deserialize)]
#[serde(default)]
pub(super) struct StreamPosition {
    #[prost(uint64, tag = "1")]
    #[serde(deserialize_with = "or_default")]
    pub(super) offset: u64,
    #[prost(string, tag = "2")]
    #[serde(deserialize_with = "or_default")]
    pub(super) epoch: String,
}

#[derive(Clone, PartialEq, prost::Message, Deserialize)]
#[serde(default)]
pub(super) struct HistoryRequest {
    #[prost(string, tag = "1")]
    #[serde(deserialize_with = "or_default")]
    pub(super) channel: String,
    #[prost(int32, tag = "7")]
    #[serde(deserialize_with = "or_default")]
    pub(super) limit: i32,
    #[prost(message, optional, tag = "8")]
    pub(super) since: Option<StreamPosition>,
    #[prost(bool, tag = "9")]
    #[serde(deserialize_with = "or_default")]
    pub(super) reverse: bool,
}

#[derive(Clone, PartialEq, prost::Message, Deserialize)]
#[serde(default)]
pub(super) struct DataRequest {
    #[prost(bytes = "bytes", tag = "1")]
    #[serde(deserialize_with = "read_json")]
    pub(super) data: Bytes,
}

#[derive(Clone, PartialEq, prost::Message, Deserialize)]
#[serde(default)]
pub(super) struct RpcRequest {
    #[prost(bytes = "bytes", tag = "1")]
    #[serde(deserialize_with = "read_json")]
    pub(super) data: Bytes,
    #[prost(string, tag = "2")]
    #[serde(deserialize_with = "or_default")]
    pub(super) method: String,
}

#[derive(Clone, PartialEq, prost::Message, Deserialize)]
#[serde(default)]
pub(super) struct RefreshRequest {
    #[prost(string, tag = "1")]
    #[serde(deserialize_with = "or_default")]
    pub(super) token: String,
}

#[derive(Clone, PartialEq, prost::Message, Deserialize)]
#[serde(default)]
pub(super) struct SubRefreshRequest {
    #[prost(string, tag = "1")]
    #[serde(deserialize_with = "or_default")]
    pub(super) channel: String,
    #[prost(string, tag = "2")]
    #[serde(deserialize_with = "or_default")]
    pub(super) token: String,
}

/// A message without fields, of which unknown fields are ignored.
#[derive(Clone, Copy, PartialEq, prost::Message, Serialize, Deserialize)]
pub(super) struct Empty {}

/// What the server sends: the answer to a command, a push (`id` is 0), or a ping (nothing is set).
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub(super) struct Reply {
    #[prost(uint32, tag = "1")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) id: u32,
    #[prost(message, optional, tag = "2")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<Error>,
    #[prost(message, optional, boxed, tag = "4")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) push: Option<Box<Push>>,
    #[prost(message, optional, boxed, tag = "5")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) connect: Option<Box<ConnectResult>>,
    #[prost(message, optional, boxed, tag = "6")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) subscribe: Option<Box<SubscribeResult>>,
    #[prost(message, optional, tag = "7")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) unsubscribe: Option<Empty>,
    #[prost(message, optional, tag = "8")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) publish: Option<Empty>,
    #[prost(message, optional, tag = "9")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) presence: Option<PresenceResult>,
    #[prost(message, optional, tag = "10")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) presence_stats: Option<PresenceStatsResult>,
    #[prost(message, optional, boxed, tag = "11")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) history: Option<Box<HistoryResult>>,
    #[prost(message, optional, tag = "12")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ping: Option<Empty>,
    #[prost(message, optional, tag = "13")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) rpc: Option<RpcResult>,
    #[prost(message, optional, tag = "14")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) refresh: Option<RefreshResult>,
    #[prost(message, optional, tag = "15")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) sub_refresh: Option<SubRefreshResult>,
}

#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub(super) struct Error {
    #[prost(uint32, tag = "1")]
    pub(super) code: u32,
    #[prost(string, tag = "2")]
    pub(super) message: String,
    #[prost(bool, tag = "3")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) temporary: bool,
}

#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub(super) struct Push {
    #[prost(string, tag = "2")]
    pub(super) channel: String,
    #[prost(message, optional, tag = "4")]
    #[serde(rename = "pub", skip_serializing_if = "Option::is_none")]
    pub(super) publication: Option<Publication>,
    #[prost(message, optional, tag = "5")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) join: Option<InfoPush>,
    #[prost(message, optional, tag = "6")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) leave: Option<InfoPush>,
    #[prost(message, optional, tag = "7")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) unsubscribe: Option<UnsubscribePush>,
    #[prost(message, optional, boxed, tag = "9")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) subscribe: Option<Box<SubscribePush>>,
    #[prost(message, optional, tag = "11")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) disconnect: Option<DisconnectPush>,
    #[prost(message, optional, tag = "12")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) refresh: Option<RefreshPush>,
}

#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub(super) struct Publication {
    #[prost(bytes = "bytes", tag = "4")]
    #[serde(serialize_with = "write_json")]
    pub(super) data: Bytes,
    #[prost(message, optional, tag = "5")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) info: Option<ClientInfo>,
    #[prost(uint64, tag = "6")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) offset: u64,
    #[prost(btree_map = "string, string", tag = "7")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) tags: BTreeMap<String, String>,
    #[prost(int64, tag = "9")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) time: i64,
}

#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub(super) struct ClientInfo {
    #[prost(string, tag = "1")]
    pub(super) user: String,
    #[prost(string, tag = "2")]
    pub(super) client: String,
    #[prost(bytes = "bytes", tag = "3")]
    #[serde(skip_serializing_if = "Bytes::is_empty", serialize_with = "write_json")]
    pub(super) conn_info: Bytes,
}

/// The content of the pushes `join` and `leave`.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub(super) struct InfoPush {
    #[prost(message, optional, tag = "1")]
    pub(super) info: Option<ClientInfo>,
}

#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub(super) struct UnsubscribePush {
    #[prost(uint32, tag = "2")]
    pub(super) code: u32,
    #[prost(string, tag = "3")]
    pub(super) reason: String,
}

#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub(super) struct DisconnectPush {
    #[prost(uint32, tag = "1")]
    pub(super) code: u32,
    #[prost(string, tag = "2")]
    pub(super) reason: String,
    #[prost(bool, tag = "3")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) reconnect: bool,
}

/// What a client sends to a session whose messages come in the stream of an HTTP response.
#[derive(Clone, PartialEq, prost::Message, Deserialize)]
pub(crate) struct EmulationRequest {
    /// The edge that holds the session.
    #[prost(string, tag = "1")]
    #[serde(default)]
    pub(crate) node: String,
    /// The secret name of the session.
    #[prost(string, tag = "2")]
    #[serde(default)]
    pub(crate) session: String,
    /// One or more commands. In JSON they are in a string.
    #[prost(bytes = "bytes", tag = "3")]
    #[serde(default, deserialize_with = "read_text")]
    pub(crate) data: Bytes,
}

#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub(super) struct SubscribePush {
    #[prost(bool, tag = "1")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) recoverable: bool,
    #[prost(string, tag = "4")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) epoch: String,
    #[prost(uint64, tag = "5")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) offset: u64,
    #[prost(bool, tag = "6")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) positioned: bool,
    #[prost(bytes = "bytes", tag = "7")]
    #[serde(skip_serializing_if = "Bytes::is_empty", serialize_with = "write_json")]
    pub(super) data: Bytes,
}

#[derive(Clone, Copy, PartialEq, prost::Message, Serialize)]
pub(super) struct RefreshPush {
    #[prost(bool, tag = "1")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) expires: bool,
    #[prost(uint32, tag = "2")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) ttl: u32,
}

#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub(super) struct ConnectResult {
    #[prost(string, tag = "1")]
    pub(super) client: String,
    #[prost(string, tag = "2")]
    pub(super) version: String,
    #[prost(bool, tag = "3")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) expires: bool,
    #[prost(uint32, tag = "4")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) ttl: u32,
    #[prost(btree_map = "string, message", tag = "6")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) subs: BTreeMap<String, SubscribeResult>,
    #[prost(uint32, tag = "7")]
    pub(super) ping: u32,
    #[prost(bool, tag = "8")]
    pub(super) pong: bool,
    #[prost(string, tag = "9")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) session: String,
    #[prost(string, tag = "10")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) node: String,
}

#[derive(Clone, Copy, PartialEq, prost::Message, Serialize)]
pub(super) struct RefreshResult {
    #[prost(bool, tag = "3")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) expires: bool,
    #[prost(uint32, tag = "4")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) ttl: u32,
}

#[derive(Clone, Copy, PartialEq, prost::Message, Serialize)]
pub(super) struct SubRefreshResult {
    #[prost(bool, tag = "1")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) expires: bool,
    #[prost(uint32, tag = "2")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) ttl: u32,
}

#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub(super) struct SubscribeResult {
    #[prost(bool, tag = "1")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) expires: bool,
    #[prost(uint32, tag = "2")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) ttl: u32,
    #[prost(bool, tag = "3")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) recoverable: bool,
    #[prost(string, tag = "6")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) epoch: String,
    #[prost(bool, tag = "8")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) recovered: bool,
    #[prost(uint64, tag = "9")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) offset: u64,
    #[prost(bool, tag = "10")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) positioned: bool,
    #[prost(bool, tag = "12")]
    #[serde(skip_serializing_if = "is_default")]
    pub(super) was_recovering: bool,
}

#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub(super) struct PresenceResult {
    #[prost(btree_map = "string, message", tag = "1")]
    pub(super) presence: BTreeMap<String, ClientInfo>,
}

#[derive(Clone, Copy, PartialEq, prost::Message, Serialize)]
pub(super) struct PresenceStatsResult {
    #[prost(uint32, tag = "1")]
    pub(super) num_clients: u32,
    #[prost(uint32, tag = "2")]
    pub(super) num_users: u32,
}

#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub(super) struct HistoryResult {
    #[prost(message, repeated, tag = "1")]
    pub(super) publications: Vec<Publication>,
    #[prost(string, tag = "2")]
    pub(super) epoch: String,
    #[prost(uint64, tag = "3")]
    pub(super) offset: u64,
}

#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub(super) struct RpcResult {
    #[prost(bytes = "bytes", tag = "1")]
    #[serde(serialize_with = "write_json")]
    pub(super) data: Bytes,
}
