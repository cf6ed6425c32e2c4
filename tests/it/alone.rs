//! A region that is cut off goes on with all that it does for its users, whatever is killed and started again in it meanwhile; when
//! the cut is over, everybody on both sides has what they missed, each region's messages in order and once.

use natter::testing::{client::Connection, model::Cursor};
use serde_json::{Value, json};

use crate::support::{
    LONG,
    calls::{command, seq},
    eventually,
    mesh::Mesh,
    mongodb_url,
    regions::Regions,
};

const ROOM: &str = "chat:a";
const SEOUL: &str = "seoul";
const VIRGINIA: &str = "virginia";

/// Who is in the room in both regions, and whose marker moves in both.
const READER: &str = "lee";

/// A user in the room, or between two connections to it.
struct Member {
    user: &'static str,
    connection: Option<Connection>,
    cursor: Value,
    /// Ids of the messages that came over all connections, in that order.
    heard: Vec<String>,
    /// What else was pushed and not looked for yet.
    signals: Vec<Value>,
}

impl Member {
    fn new(user: &'static str) -> Self {
        Self {
            user,
            connection: None,
            cursor: Value::Null,
            heard: Vec::new(),
            signals: Vec::new(),
        }
    }

    /// Connects, and goes on in the room at the cursor; how many messages are replayed.
    async fn join(&mut self, mesh: &Mesh, edge: usize) -> usize {
        self.connection = Some(mesh.connect(edge, self.user).await);
        let fields = json!({"room": ROOM, "since": self.cursor, "presence": true, "read": true});
        let joined = self.ask("join", fields).await;
        assert_eq!(joined["op"], "joined", "{}: {joined}", self.user);
        assert_eq!(joined.get("reset"), None, "{}: {joined}", self.user);
        self.cursor = joined["cursor"].clone();
        usize::try_from(joined["replay"].as_u64().unwrap()).unwrap()
    }

    async fn leave(&mut self) {
        self.connection.take().unwrap().close().await;
    }

    /// The reply to a command, which is repeated as long as it says that it may be: the edge may not be back at its NATS yet.
    async fn ask(&mut self, op: &str, fields: Value) -> Value {
        eventually(op, LONG, async || {
            let connection = self.connection.as_mut().unwrap();
            let mut frames = command(connection, op, fields.clone()).await;
            let reply = frames.pop().unwrap();
            frames.into_iter().for_each(|frame| self.take(frame));
            match reply["retry"] == true {
                true => Err(reply.to_string()),
                false => Ok(reply),
            }
        })
        .await
    }

    fn take(&mut self, frame: Value) {
        if frame["op"] == "msg" {
            self.heard.push(frame["id"].as_str().unwrap().to_owned());
            self.cursor = frame["cursor"].clone();
        } else {
            self.signals.push(frame);
        }
    }

    /// Takes what is pushed until something is so.
    async fn until(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> bool) {
        while !is_so(self) {
            let connection = self.connection.as_mut().unwrap();
            let pushed = tokio::time::timeout(LONG, connection.next()).await;
            let Ok(Some(frame)) = pushed else {
                let Self { heard, signals, .. } = self;
                panic!("{} waits for {what}: {heard:?}, {signals:?}", self.user);
            };
            self.take(frame.json());
        }
    }

    async fn hear(&mut self, said: &[String]) {
        let all = |member: &mut Self| said.iter().all(|id| member.heard.contains(id));
        self.until(&format!("{said:?}"), all).await;
    }

    /// Waits for a push with these fields.
    async fn told(&mut self, fields: Value) {
        let fields = fields.as_object().unwrap();
        let is_it = |frame: &Value| fields.iter().all(|(key, value)| frame[key] == *value);
        self.until(&format!("{fields:?}"), |member| {
            let found = member.signals.iter().position(is_it);
            found.map(|at| member.signals.remove(at)).is_some()
        })
        .await;
    }

    /// What came of a region's messages.
    fn heard_of(&self, region: &str) -> Vec<&str> {
        of(region, self.heard.iter().map(String::as_str))
    }

    async fn unread(&mut self) -> u64 {
        let answer = self.ask("unread", json!({"rooms": [ROOM]})).await;
        let count = answer["rooms"][0]["count"].as_u64();
        count.unwrap_or_else(|| panic!("{answer}"))
    }

    async fn until_unread(&mut self, count: usize) {
        eventually("as many are unread", LONG, async || {
            let unread = self.unread().await;
            let same = unread == count as u64;
            same.then_some(())
                .ok_or_else(|| format!("{unread}, not {count}"))
        })
        .await;
    }
}

/// The ids that were given in a region.
fn of<'a>(region: &str, ids: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    ids.filter(|id| id.starts_with(region)).collect()
}

/// One region, and who is in the room there.
struct Side {
    region: &'static str,
    /// On the first edge.
    speaker: Member,
    /// On the second one.
    reader: Member,
    /// Comes and goes.
    guest: Member,
    /// What was acknowledged, in that order.
    said: Vec<String>,
    /// Up to where the reader has read: how much of this region's, and as it was answered.
    read: usize,
    marker: Value,
    /// The speaker of the other region.
    elsewhere: &'static str,
    /// Whether pages of history say that they may lack something.
    partial: bool,
}

impl Side {
    fn new(region: &'static str, users: [&'static str; 2], elsewhere: &'static str) -> Self {
        Self {
            region,
            speaker: Member::new(users[0]),
            reader: Member::new(READER),
            guest: Member::new(users[1]),
            said: Vec::new(),
            read: 0,
            marker: Value::Null,
            elsewhere,
            partial: false,
        }
    }

    fn members(&mut self) -> [&mut Member; 3] {
        [&mut self.speaker, &mut self.reader, &mut self.guest]
    }

    async fn say(&mut self) {
        let ack = say(&mut self.speaker, self.region, self.said.len()).await;
        self.said.push(ack);
    }

    /// The reader reads all that has come.
    async fn read(&mut self) {
        let fields = json!({"room": ROOM, "cursor": self.reader.cursor});
        let ok = self.reader.ask("read", fields).await;
        assert_eq!(
            (&ok["op"], &ok["cursor"]),
            (&json!("ok"), &self.reader.cursor)
        );
        self.read = self.said.len();
        self.marker = ok["cursor"].clone();
    }

    /// Waits until both edges have the marker.
    async fn until_marked(&self, mesh: &Mesh) {
        let marker = parsed(&self.marker);
        until_marked(mesh, &marker, self.region).await;
    }

    /// Waits until both edges say that who is here is, and that nobody knows of who is elsewhere.
    async fn until_present(&self, mesh: &Mesh, with_guest: bool) {
        let mut all = vec![
            (self.speaker.user, false),
            (READER, false),
            (self.elsewhere, true),
        ];
        all.extend(with_guest.then_some((self.guest.user, false)));
        until_present(mesh, &mut all).await;
    }

    /// During a cut: all that a region does for its users.
    async fn serves(&mut self, regions: &Regions) {
        let mesh = regions.at(self.region);
        for _ in 0..3 {
            self.say().await;
        }
        self.speaker.hear(&self.said).await;
        self.reader.hear(&self.said).await;

        let missed = self.said.len() - self.guest.heard_of(self.region).len();
        assert_eq!(self.guest.join(mesh, 0).await, missed);
        self.guest.hear(&self.said).await;
        let guest = self.guest.user;
        let told = |state: &str| json!({"op": "presence", "user": guest, "state": state});
        self.reader.told(told("join")).await;
        self.until_present(mesh, true).await;
        self.guest.leave().await;
        self.reader.told(told("leave")).await;
        self.until_present(mesh, false).await;

        self.reader.until_unread(self.said.len() - self.read).await;
        self.read().await;
        let receipt = json!({"op": "read", "user": READER, "cursor": self.marker});
        self.speaker.told(receipt).await;
        self.until_marked(mesh).await;
        self.reader.until_unread(0).await;

        self.reader.ask("typing", json!({"room": ROOM})).await;
        let typing = json!({"op": "typing", "user": READER});
        self.speaker.told(typing).await;

        until_told(mesh, self.region, &self.said, self.partial).await;
    }
}

/// Says the next thing in a region; its id, once it is acknowledged.
async fn say(from: &mut Member, region: &str, number: usize) -> String {
    let id = format!("{region}-{number}");
    // Few of these fit into the memory of a room.
    let fields = json!({"room": ROOM, "id": id, "body": "안녕 ".repeat(60)});
    let ack = from.ask("send", fields).await;
    assert_eq!((&ack["op"], &ack["id"]), (&json!("ack"), &json!(id)));
    id
}

fn parsed(cursor: &Value) -> Cursor {
    cursor.as_str().unwrap().parse().unwrap()
}

/// Waits until both edges have the reader's marker where `marker` is in the log of `region`.
async fn until_marked(mesh: &Mesh, marker: &Cursor, region: &str) {
    for edge in 0..mesh.edges.len() {
        eventually("the marker is there", LONG, async || {
            let path = format!("/v1/rooms/{ROOM}/readers");
            let answer = mesh.get(edge, &path).await?;
            let readers = answer["readers"].as_array().ok_or("no readers")?;
            let of_reader = readers.iter().find(|of| of["user"] == READER);
            let at = of_reader.map_or(0, |of| seq(&parsed(&of["cursor"]), region));
            let same = at == seq(marker, region);
            same.then_some(())
                .ok_or_else(|| format!("{at} of {region}, not {marker}: {answer}"))
        })
        .await;
    }
}

/// Waits until both edges show these users, with whether they are unreachable.
async fn until_present(mesh: &Mesh, all: &mut [(&str, bool)]) {
    all.sort_unstable();
    for edge in 0..mesh.edges.len() {
        eventually("these are there", LONG, async || {
            let path = format!("/v1/rooms/{ROOM}/presence");
            let answer = mesh.get(edge, &path).await?;
            let users = answer["users"].as_array().ok_or("no users")?.iter();
            let shown =
                users.map(|of| (of["user"].as_str().unwrap(), of["state"] == "unreachable"));
            let same = shown.eq(all.iter().copied());
            same.then_some(())
                .ok_or_else(|| format!("{answer}, not {all:?}"))
        })
        .await;
    }
}

/// Waits until a page of history has all that was said in a region, in order, and says whether it is `partial`; all of its ids.
async fn until_told(mesh: &Mesh, region: &str, said: &[String], partial: bool) -> Vec<String> {
    eventually("a page has all of it", LONG, async || {
        let path = format!("/v1/rooms/{ROOM}/messages?limit=200");
        let page = mesh.get(0, &path).await?;
        let messages = page["messages"].as_array().ok_or("no messages")?.iter();
        let ids: Vec<_> = messages
            .map(|m| m["id"].as_str().unwrap().to_owned())
            .collect();
        let same = of(region, ids.iter().map(String::as_str)) == said;
        match same && (page["partial"] == true) == partial {
            true => Ok(ids),
            false => Err(format!(
                "{ids:?}, partial: {}; not {said:?}",
                page["partial"]
            )),
        }
    })
    .await
}

/// Two regions with two edges and a history service each, in whose room all have heard all; the guests have left.
async fn two() -> (Regions, [Side; 2]) {
    let mongodb = mongodb_url();
    let toml = format!("rooms.ring = '1KiB'\npresence.lease = '3s'\nmongodb.url = '{mongodb}'");
    let delay = std::time::Duration::ZERO;
    let mut regions = Regions::start_with(&[SEOUL, VIRGINIA], &toml, delay).await;
    let mut sides = [
        Side::new(SEOUL, ["mia", "kim"], "max"),
        Side::new(VIRGINIA, ["max", "cat"], "mia"),
    ];
    for side in &mut sides {
        let mesh = regions.mesh(side.region);
        mesh.add_edge().await;
        mesh.add_edge().await;
        mesh.add_worker("/readyz").await;
        for (member, edge) in side.members().into_iter().zip([0, 1, 0]) {
            assert_eq!(member.join(mesh, edge).await, 0);
        }
    }
    everybody_hears(&mut sides).await;
    for side in &mut sides {
        side.guest.leave().await;
    }
    for side in &mut sides {
        let mesh = regions.at(side.region);
        side.read().await;
        side.until_marked(mesh).await;
        until_told(mesh, side.region, &side.said, false).await;
        until_present(mesh, &mut [("lee", false), ("max", false), ("mia", false)]).await;
    }
    (regions, sides)
}

/// Something is said in each region, and all hear that; and whatever they missed before.
async fn everybody_hears(sides: &mut [Side; 2]) {
    for side in &mut *sides {
        side.say().await;
    }
    let said = sides.each_ref().map(|side| side.said.clone()).concat();
    for member in sides.iter_mut().flat_map(Side::members) {
        member.hear(&said).await;
    }
}

/// After a cut: all that was said on either side is heard on the other, in order and once, and what else there is has become one.
async fn together_again(regions: &Regions, sides: &mut [Side; 2]) {
    regions.heal(VIRGINIA);
    // Each guest comes to the other region, with the cursor of their own.
    let [here, there] = &mut *sides;
    here.guest.join(regions.at(VIRGINIA), 1).await;
    there.guest.join(regions.at(SEOUL), 1).await;
    let said = sides.each_ref().map(|side| side.said.clone()).concat();
    for member in sides.iter_mut().flat_map(Side::members) {
        member.hear(&said).await;
    }
    let markers = sides
        .each_ref()
        .map(|side| (side.region, parsed(&side.marker)));
    for side in &mut *sides {
        let mesh = regions.at(side.region);
        for (region, marker) in &markers {
            until_marked(mesh, marker, region).await;
        }
        side.reader.until_unread(0).await;
        let mut all = ["cat", "kim", "lee", "max", "mia"].map(|user| (user, false));
        until_present(mesh, &mut all).await;
    }
    // What is shown twice is so before what is said now.
    everybody_hears(sides).await;
    let [here, there] = &mut *sides;
    let said = [(SEOUL, here.said.clone()), (VIRGINIA, there.said.clone())];
    for member in here.members().into_iter().chain(there.members()) {
        for (region, said) in &said {
            assert_eq!(member.heard_of(region), *said, "{}, {region}", member.user);
        }
    }
    let mut histories = Vec::new();
    for side in [here, there] {
        let mesh = regions.at(side.region);
        for (region, said) in &said {
            histories.push(until_told(mesh, region, said, false).await);
        }
    }
    assert_eq!(histories[1].len(), said[0].1.len() + said[1].1.len());
    assert_eq!(histories[1], histories[3]);
}

#[tokio::test]
async fn a_region_that_is_cut_off_goes_on_with_everything() {
    let (regions, mut sides) = two().await;
    regions.cut(VIRGINIA);
    for side in &mut sides {
        side.serves(&regions).await;
    }
    together_again(&regions, &mut sides).await;
}

#[tokio::test]
async fn a_region_that_is_cut_off_goes_on_when_its_own_servers_are_killed() {
    let (mut regions, mut sides) = two().await;
    regions.cut(VIRGINIA);
    let [here, there] = &mut sides;
    there.serves(&regions).await;

    // An edge: who was on it comes back to it with the cursor of before.
    regions.mesh(VIRGINIA).edges[0].process.kill().await;
    let mut tom = Member::new("tom");
    tom.connection = Some(regions.at(VIRGINIA).connect(1, "tom").await);
    for _ in 0..2 {
        there
            .said
            .push(say(&mut tom, VIRGINIA, there.said.len()).await);
    }
    there.reader.hear(&there.said).await;
    let edge = &mut regions.mesh(VIRGINIA).edges[0].process;
    edge.start().await.unwrap();
    assert_eq!(there.speaker.join(regions.at(VIRGINIA), 0).await, 2);
    there.speaker.hear(&there.said).await;
    there.until_marked(regions.at(VIRGINIA)).await;
    there.serves(&regions).await;

    // Its nats-server: sessions stay.
    regions.kill(VIRGINIA).await;
    regions.restart(VIRGINIA).await;
    there.serves(&regions).await;

    // Its history service: without it, pages are made of what the streams have, and say so.
    regions.mesh(VIRGINIA).workers[0].process.kill().await;
    there.say().await;
    until_told(regions.at(VIRGINIA), VIRGINIA, &there.said, true).await;
    let worker = &mut regions.mesh(VIRGINIA).workers[0].process;
    worker.start().await.unwrap();
    // Nobody tells a service that was started in a cut how far the other region's is.
    there.partial = true;
    there.serves(&regions).await;

    // All of it at once; with its spine goes what waited in the link for the end of the cut, such as receipts.
    let mesh = regions.mesh(VIRGINIA);
    for process in mesh.edges.iter_mut().chain(&mut mesh.workers) {
        process.process.kill().await;
    }
    regions.kill(VIRGINIA).await;
    regions.restart_spine(VIRGINIA).await;
    regions.restart(VIRGINIA).await;
    let mesh = regions.mesh(VIRGINIA);
    for process in mesh.edges.iter_mut().chain(&mut mesh.workers) {
        process.process.start().await.unwrap();
    }
    assert_eq!(there.speaker.join(mesh, 0).await, 0);
    assert_eq!(there.reader.join(mesh, 1).await, 0);
    there.until_marked(mesh).await;
    there.serves(&regions).await;

    here.serves(&regions).await;
    together_again(&regions, &mut sides).await;
}
