//! Commands over a connection, and what comes of them.

use natter::testing::{
    client::{Connection, Frame},
    model::{Cursor, Region},
};
use serde_json::{Value, json};

use super::LONG;

/// The next frame, within a generous time.
pub(crate) async fn next(connection: &mut Connection) -> Frame {
    tokio::time::timeout(LONG, connection.next())
        .await
        .expect("no frame came")
        .unwrap_or_else(|| panic!("closed: {:?}", connection.end()))
}

/// Sends a command and returns the frames up to its reply, which is the last of them.
pub(crate) async fn command(connection: &mut Connection, op: &str, fields: Value) -> Vec<Value> {
    let rid = connection.commands().send(op, fields).await.unwrap();
    let mut frames = Vec::new();
    loop {
        let frame = next(connection).await.json();
        let done = frame["rid"] == json!(rid);
        frames.push(frame);
        if done {
            return frames;
        }
    }
}

/// Sends a command and returns its reply.
pub(crate) async fn reply(connection: &mut Connection, op: &str, fields: Value) -> Value {
    command(connection, op, fields).await.pop().unwrap()
}

/// The sequence of a region in a cursor, 0 without.
pub(crate) fn seq(cursor: &Cursor, region: &str) -> u64 {
    let position = cursor.get(&Region::parse(region).unwrap());
    position.map_or(0, |position| position.seq)
}
