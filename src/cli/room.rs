//! `natter room`, `natter inbox` and `natter follow`: rooms and their members, for a person at a terminal.

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::connect::{Connect, on_one_line, print_line, room, run_tool};
use crate::{
    auth::Right,
    client::{Connection, Target},
    config::{Config, ConfigError},
    model::RoomId,
};

/// Make a room, or show its record: what it is, who is in it, its settings.
#[derive(Debug, Args)]
pub(super) struct RoomCommand {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Print the record of a room, as JSON.
    Show {
        /// The room, as namespace:name.
        #[arg(value_parser = room)]
        room: RoomId,
        #[command(flatten)]
        connect: Connect,
    },
    /// Make a room, or find it, and print its name.
    Create {
        /// dm, group or open.
        kind: String,
        /// The namespace of the room.
        #[arg(long)]
        namespace: String,
        /// A member; may be repeated.
        #[arg(long = "member", value_name = "USER")]
        members: Vec<String>,
        /// What the room is about in the application; part of its name.
        #[arg(long = "ref", value_name = "TEXT")]
        about: Option<String>,
        /// How the application knows a group or an open room.
        #[arg(long)]
        key: Option<String>,
        /// The name of a group or an open room.
        #[arg(long, conflicts_with = "key")]
        name: Option<String>,
        /// What people call it.
        #[arg(long)]
        title: Option<String>,
        #[command(flatten)]
        connect: Connect,
    },
}

/// Print the rooms of a user, with what is new in them: pinned ones first, then by their newest message.
#[derive(Debug, Args)]
pub(super) struct Inbox {
    /// Those that the user has put aside.
    #[arg(long)]
    archived: bool,
    /// Stay, and print each room again when something happens in it.
    #[arg(long, conflicts_with = "archived")]
    watch: bool,
    /// Print JSON, one room per line.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connect: Connect,
}

/// Print the rooms that match a pattern, and each again when something happens in it, without being in them.
#[derive(Debug, Args)]
pub(super) struct Follow {
    /// The rooms: NAMESPACE:*, or *:* for all.
    pattern: String,
    /// Only rooms whose newest message is of nobody among the staff and older than this, such as 5m.
    #[arg(long, value_name = "TIME", requires = "staff")]
    unanswered_for: Option<String>,
    /// A user who can answer, or a pattern such as 'staff-*'; may be repeated.
    #[arg(long, value_name = "USER", requires = "unanswered_for")]
    staff: Vec<String>,
    /// Only rooms whose newest annotation fulfils this, such as 'sentiment.score < -0.5'.
    #[arg(long, value_name = "CONDITION")]
    annotation: Option<String>,
    /// Only rooms whose newest message mentions this user.
    #[arg(long, value_name = "USER")]
    mentions: Option<String>,
    /// Only rooms whose newest message is of this user, or matches a pattern such as 'guest-*'.
    #[arg(long, value_name = "USER")]
    from: Option<String>,
    /// Only rooms that this user looks after.
    #[arg(long, value_name = "USER")]
    assignee: Option<String>,
    /// Only rooms whose newest message contains this text.
    #[arg(long, value_name = "TEXT")]
    text: Option<String>,
    /// Print JSON, one room per line.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connect: Connect,
}

/// Connects to the first edge that answers.
async fn open(target: &Target) -> anyhow::Result<Connection> {
    let token = target.token.get().map_err(anyhow::Error::msg)?;
    let mut last = None;
    for endpoint in &target.endpoints {
        match Connection::open(endpoint, Some(&token)).await {
            Ok(connection) => return Ok(connection),
            Err(error) => last = Some(error),
        }
    }
    match last {
        Some(error) => Err(error).context("no edge can be reached"),
        None => bail!("no edge is named"),
    }
}

/// Shows or makes a room.
pub(super) fn run(
    command: RoomCommand,
    config: impl FnOnce() -> Result<Config, ConfigError>,
) -> anyhow::Result<()> {
    let rights = [Right::Read, Right::Manage];
    match command.what {
        What::Show { room, connect } => {
            let target = connect.target(&room, &rights, config)?;
            run_tool(async move {
                let connection = open(&target).await?;
                let record = connection
                    .commands()
                    .call("room", json!({ "room": room }))
                    .await?;
                print_line(&serde_json::to_string_pretty(&fields_of(record.json()))?).map(drop)
            })
        }
        What::Create {
            kind,
            namespace,
            members,
            about,
            key,
            name,
            title,
            connect,
        } => {
            let target = connect.target_in(&format!("{namespace}:*"), &rights, config)?;
            let new = json!({
                "namespace": namespace, "kind": kind, "members": members, "ref": about, "key": key, "name": name,
                "title": title,
            });
            run_tool(async move {
                let connection = open(&target).await?;
                let made = connection.commands().call("create", new).await?.json();
                if made["created"] == false {
                    eprintln!("natter: the room was there already");
                }
                print_line(made["room"].as_str().unwrap_or_default()).map(drop)
            })
        }
    }
}

/// A reply without what belongs to the protocol.
fn fields_of(mut reply: Value) -> Value {
    if let Some(fields) = reply.as_object_mut() {
        fields.remove("op");
        fields.remove("rid");
    }
    reply
}

/// Prints the rooms of a user.
pub(super) fn inbox(
    inbox: &Inbox,
    config: impl FnOnce() -> Result<Config, ConfigError>,
) -> anyhow::Result<()> {
    let target = inbox.connect.target_in("*:*", &[Right::Read], config)?;
    run_tool(async move {
        let connection = open(&target).await?;
        if inbox.watch {
            return watch(connection, json!({ "mine": true }), inbox.json).await;
        }
        let mut after = Value::Null;
        loop {
            let page = json!({ "after": after, "archived": inbox.archived });
            let page = connection.commands().call("inbox", page).await?.json();
            after = page["next"].clone();
            if !print_rooms(&page["rooms"], inbox.json)? || after.is_null() {
                return Ok(());
            }
        }
    })
}

/// Prints the rooms that match a pattern and a filter.
pub(super) fn follow(
    follow: Follow,
    config: impl FnOnce() -> Result<Config, ConfigError>,
) -> anyhow::Result<()> {
    let target = follow
        .connect
        .target_in(&follow.pattern, &[Right::Follow], config)?;
    let texts = [
        ("unanswered_for", follow.unanswered_for),
        ("annotation", follow.annotation),
        ("mentions", follow.mentions),
        ("from", follow.from),
        ("assignee", follow.assignee),
        ("text", follow.text),
    ];
    let texts = texts
        .into_iter()
        .filter_map(|(name, text)| Some((name.to_owned(), json!(text?))));
    let mut filter: serde_json::Map<String, Value> = texts.collect();
    if !follow.staff.is_empty() {
        filter.insert("staff".to_owned(), json!(follow.staff));
    }
    let what = json!({ "pattern": follow.pattern, "filter": filter });
    run_tool(async move { watch(open(&target).await?, what, follow.json).await })
}

/// Prints the rooms of a watch, and each again when something happens in it.
async fn watch(mut connection: Connection, what: Value, as_json: bool) -> anyhow::Result<()> {
    let commands = connection.commands().clone();
    let mut page = commands.call("watch", what).await?.json();
    loop {
        if !print_rooms(&page["rooms"], as_json)? {
            return Ok(());
        }
        if page["next"].is_null() {
            break;
        }
        let next = json!({ "watch": page["watch"], "after": page["next"] });
        page = commands.call("watch", next).await?.json();
    }
    loop {
        let Some(push) = connection.next().await else {
            let end = connection.end().map(|end| end.reason).unwrap_or_default();
            bail!("the edge has ended the connection: {end}");
        };
        if push.op() != "inbox" {
            continue;
        }
        let push = push.json();
        if push["ended"].is_string() {
            bail!("the watch has ended: {}", text(&push["ended"]));
        }
        if !print_rooms(&push["rooms"], as_json)? {
            return Ok(());
        }
        for room in push["gone"].as_array().into_iter().flatten() {
            let line = match as_json {
                true => json!({ "room": room, "gone": true }).to_string(),
                false => format!("{} is no longer one of them", text(room)),
            };
            if !print_line(&line)? {
                return Ok(());
            }
        }
    }
}

/// `false`: the reader has gone.
fn print_rooms(rooms: &Value, as_json: bool) -> anyhow::Result<bool> {
    for room in rooms.as_array().into_iter().flatten() {
        let line = match as_json {
            true => on_one_line(&room.to_string()),
            false => line_of(room),
        };
        if !print_line(&line)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn text(value: &Value) -> String {
    // What others wrote must not move the cursor of the terminal.
    let text = value.as_str().unwrap_or_default();
    text.chars().filter(|c| !c.is_control()).collect()
}

/// A room as a line: how many unread messages, its name or its title, and the newest message.
fn line_of(room: &Value) -> String {
    let more = if room["capped"] == true { "+" } else { "" };
    let peers = room["peers"].as_array().into_iter().flatten();
    let peers = peers.map(text).collect::<Vec<_>>().join(", ");
    let named = match room["title"].is_string() {
        true => text(&room["title"]),
        false => peers,
    };
    let last = &room["last"];
    let said = match last.is_object() {
        true => format!("  {}: {}", text(&last["from"]), text(&last["text"])),
        false => String::new(),
    };
    let alert = match room["alert"].is_object() {
        true => format!("  [alert: {}]", text(&room["alert"]["worker"])),
        false => String::new(),
    };
    let unread = room["unread"]
        .as_u64()
        .map_or_else(String::new, |unread| unread.to_string());
    format!(
        "{unread:>4}{more:1} {}  {named}{alert}{said}",
        text(&room["room"])
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_room_is_a_line_that_no_message_can_break() {
        let room = json!({ "room": "dm:dm-1", "peers": ["kim", "lee"], "unread": 12, "capped": true,
            "last": { "from": "kim", "text": "a\u{1b}[2J\nb" } });
        assert_eq!(line_of(&room), "  12+ dm:dm-1  kim, lee  kim: a[2Jb");
        let room = json!({ "room": "crew:x", "title": "Desk", "unread": 0, "alert": { "worker": "mood" } });
        assert_eq!(line_of(&room), "   0  crew:x  Desk  [alert: mood]");
    }
}
