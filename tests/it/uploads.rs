//! Attachments: files go up, are named by messages, come down, and are removed; over both storages.

#![expect(
    clippy::string_slice,
    reason = "cut at what was found in the same text, or in ASCII"
)]

mod checked;

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::TryStreamExt as _;
use mongodb::bson::{DateTime, Document as Fields, doc};
use natter::testing::{
    auth::{Grant, Right},
    config::{Config, Secret},
    mesh::doctor::{Check, examine},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::support::{
    LONG, eventually,
    mesh::{Mesh, ask, token, token_with},
    mongodb_url, nats_url,
    s3::S3,
};

const ROOM: &str = "chat:lobby";

/// A storage of a test.
enum Files {
    Local(TempDir),
    S3(S3),
}

#[derive(Clone, Copy)]
enum Kind {
    Local,
    S3,
}

/// Edges and a history service with a storage.
struct Site {
    mesh: Mesh,
    files: Files,
}

/// An upload that was granted.
struct Granted {
    id: String,
    url: String,
    headers: String,
}

/// An answer over HTTP.
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

macro_rules! over_both {
    ($($name:ident)*) => {
        mod local { $(#[tokio::test] async fn $name() { super::$name(super::Kind::Local).await })* }
        mod s3 { $(#[tokio::test] async fn $name() { super::$name(super::Kind::S3).await })* }
    };
}

over_both! {
    a_file_goes_up_is_named_and_comes_down
    what_may_not_be_uploaded_or_named_is_refused
    a_put_is_exact_and_in_time
    what_nobody_names_is_removed_and_what_somebody_names_stays
    files_go_with_their_messages_rooms_and_users
    an_upload_outlives_restarts_and_a_silent_history_service
}

impl Site {
    async fn start(kind: Kind, edges: usize, toml: &str) -> Self {
        let files = match kind {
            Kind::Local => Files::Local(tempfile::tempdir().unwrap()),
            Kind::S3 => Files::S3(S3::start().await),
        };
        let storage = match &files {
            Files::Local(folder) => {
                format!(
                    "storage = 'local'\nfolder = '{}'\n",
                    folder.path().display()
                )
            }
            Files::S3(s3) => s3.toml(),
        };
        let toml = format!(
            "[nats]\npartitions = 1\n[namespaces.chat]\ndurable = true\ntyping = true\nhistory = true\n[namespaces.short]\ndurable = true\ntyping = false\n[uploads]\nsecret = 'a secret of the tests, of more than 32 bytes'\n{storage}{toml}"
        );
        let mesh = Mesh::with_history(nats_url(), mongodb_url(), (edges, 1), &toml).await;
        Self { mesh, files }
    }

    fn address(&self, edge: usize) -> SocketAddr {
        self.mesh.edges[edge].address
    }

    async fn asked(&self, edge: usize, user: &str, room: &str, file: &Value) -> (u16, Value) {
        let path = format!("/v1/rooms/{room}/uploads");
        ask(self.address(edge), ("POST", &path), &token(user), file).await
    }

    async fn grant(
        &self,
        user: &str,
        room: &str,
        (name, kind, size): (&str, &str, usize),
    ) -> Granted {
        let file = json!({ "name": name, "type": kind, "size": size });
        let (status, answer) = self.asked(0, user, room, &file).await;
        assert_eq!(status, 201, "{answer}");
        let headers = answer["put"]["headers"].as_object().unwrap().iter();
        let headers =
            headers.map(|(name, value)| format!("{name}: {}\r\n", value.as_str().unwrap()));
        Granted {
            id: answer["upload"].as_str().unwrap().to_owned(),
            url: answer["put"]["url"].as_str().unwrap().to_owned(),
            headers: headers.collect(),
        }
    }

    async fn put(&self, edge: usize, granted: &Granted, body: &[u8]) -> Answer {
        let to = self.address(edge);
        request(to, "PUT", &granted.url, &granted.headers, body).await
    }

    /// Uploads a file to a room; the id.
    async fn upload(&self, user: &str, room: &str, body: &[u8]) -> String {
        let granted = self
            .grant(user, room, ("a.bin", "image/png", body.len()))
            .await;
        let answer = self.put(0, &granted, body).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        assert!(self.has(&granted.id));
        granted.id
    }

    /// Says something that names uploads.
    async fn name(
        &self,
        edge: usize,
        user: &str,
        room: &str,
        id: &str,
        uploads: &[&str],
    ) -> (u16, Value) {
        let path = format!("/v1/rooms/{room}/messages");
        let uploads: Vec<_> = uploads
            .iter()
            .map(|id| json!({ "upload": id, "name": "a.bin" }))
            .collect();
        let message = json!({ "id": id, "body": { "text": "look", "attachments": uploads } });
        ask(self.address(edge), ("POST", &path), &token(user), &message).await
    }

    /// The file of an upload, as the user of this token gets it.
    async fn get(&self, edge: usize, token: &str, room: &str, id: &str) -> Answer {
        let path = format!("/v1/rooms/{room}/uploads/{id}");
        let headers = format!("Authorization: Bearer {token}\r\n");
        let answer = request(self.address(edge), "GET", &path, &headers, b"").await;
        if answer.status != 302 {
            return answer;
        }
        assert_eq!(answer.header("cache-control"), Some("private, no-store"));
        let url = answer.header("location").unwrap();
        request(self.address(edge), "GET", url, "", b"").await
    }

    /// The files of the storage.
    fn paths(&self) -> Vec<PathBuf> {
        match &self.files {
            Files::Local(folder) => below(folder.path()),
            Files::S3(s3) => below(&s3.objects()),
        }
    }

    /// Whether the file is there. Where files are checked, something empty is left of one that was removed.
    fn has(&self, id: &str) -> bool {
        let is_file = |path: &PathBuf| fs::metadata(path).is_ok_and(|found| found.len() > 0);
        let paths = self.paths();
        paths.iter().any(|path| path.ends_with(id) && is_file(path))
    }

    async fn gone(&self, id: &str) {
        eventually("the file is removed", LONG, async || match self.has(id) {
            false => Ok(()),
            true => Err(format!("{:?}", self.record(id).await)),
        })
        .await;
    }

    async fn registry(&self) -> mongodb::Collection<Fields> {
        let client = mongodb::Client::with_uri_str(self.mesh.config.mongodb.url.expose());
        let database = client
            .await
            .unwrap()
            .database(&self.mesh.config.mongodb.database);
        database.collection("uploads")
    }

    async fn record(&self, id: &str) -> Option<Fields> {
        self.registry()
            .await
            .find_one(doc! { "_id": id })
            .await
            .unwrap()
    }

    /// Waits until the registry knows which message has named an upload.
    async fn claimed(&self, id: &str, message: &str) {
        eventually("the upload is claimed", LONG, async || {
            let record = self.record(id).await.unwrap();
            match record.get_str("message") {
                Ok(named) if named == message => Ok(()),
                _ => Err(format!("{record}")),
            }
        })
        .await;
    }
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}\n{}", self.head, String::from_utf8_lossy(&self.body))
    }
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines
            .find(|(its, _)| its.eq_ignore_ascii_case(name))
            .map(|(_, value)| value)
    }
}

fn below(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let of = |path: PathBuf| {
        if path.is_dir() {
            below(&path)
        } else {
            vec![path]
        }
    };
    entries.flat_map(of).collect()
}

/// One request, to the server that the URL names, or else to `address`.
async fn request(
    address: SocketAddr,
    method: &str,
    url: &str,
    headers: &str,
    body: &[u8],
) -> Answer {
    let (address, path) = match url.strip_prefix("http://") {
        None => (address, url),
        Some(rest) => {
            let at = rest.find('/').unwrap();
            (rest[..at].parse().unwrap(), &rest[at..])
        }
    };
    let mut stream = TcpStream::connect(address).await.unwrap();
    let length = match method {
        "GET" => String::new(),
        _ => format!("Content-Length: {}\r\n", body.len()),
    };
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n{length}{headers}\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // The answer may come before the whole body was sent.
    drop(stream.write_all(body).await);
    let mut answer = Vec::new();
    drop(stream.read_to_end(&mut answer).await);
    let end = answer
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .unwrap();
    let body = answer.split_off(end + 4);
    let head = String::from_utf8(answer).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let body = match head
        .to_ascii_lowercase()
        .contains("transfer-encoding: chunked")
    {
        true => unchunked(&body),
        false => body,
    };
    Answer { status, head, body }
}

fn unchunked(mut body: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let end = body.windows(2).position(|two| two == b"\r\n").unwrap();
        let size = usize::from_str_radix(std::str::from_utf8(&body[..end]).unwrap(), 16).unwrap();
        if size == 0 {
            return all;
        }
        all.extend_from_slice(&body[end + 2..end + 2 + size]);
        body = &body[end + 4 + size..];
    }
}

async fn a_file_goes_up_is_named_and_comes_down(kind: Kind) {
    let site = Site::start(kind, 2, "").await;
    let body: Vec<u8> = (0..300_000_u32)
        .map(|n| u8::try_from(n % 251).unwrap())
        .collect();
    let granted = site
        .grant("kim", ROOM, ("고양이 1.png", "image/png", body.len()))
        .await;
    // Nothing is there before, and it is no error to ask.
    assert_eq!(
        site.get(0, &token("lee"), ROOM, &granted.id).await.status,
        404
    );
    // On another edge than the one that granted it.
    let answer = site.put(1, &granted, &body).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let (status, sent) = site.name(1, "kim", ROOM, "m1", &[&granted.id]).await;
    assert_eq!(status, 200, "{sent}");
    site.claimed(&granted.id, "chat:lobby/kim/m1").await;
    for edge in [0, 1] {
        let got = site.get(edge, &token("lee"), ROOM, &granted.id).await;
        assert_eq!(got.status, 200, "{}", got.head);
        assert!(got.body == body, "the file differs");
        assert_eq!(got.header("content-type"), Some("image/png"));
        let name = "inline; filename*=UTF-8''%EA%B3%A0%EC%96%91%EC%9D%B4%201.png";
        assert_eq!(got.header("content-disposition"), Some(name));
    }
    // What a browser would run is saved.
    let page = b"<script>alert(1)</script>";
    let granted = site
        .grant("kim", ROOM, ("a.html", "text/html", page.len()))
        .await;
    assert_eq!(site.put(0, &granted, page).await.status, 200);
    let got = site.get(0, &token("lee"), ROOM, &granted.id).await;
    let name = "attachment; filename*=UTF-8''a.html";
    assert_eq!(got.header("content-disposition"), Some(name));
    // The URL alone, for pages.
    let path = format!("/v1/rooms/{ROOM}/uploads/{}?redirect=false", granted.id);
    let (status, answer) = ask(site.address(0), ("GET", &path), &token("lee"), &Value::Null).await;
    assert_eq!(status, 200, "{answer}");
    let url = answer["url"].as_str().unwrap();
    let part = request(site.address(0), "GET", url, "Range: bytes=1-6\r\n", b"").await;
    assert_eq!(
        (part.status, &*part.body),
        (206, &b"script"[..]),
        "{part:?}"
    );
    assert_eq!(part.header("content-range"), Some("bytes 1-6/25"));
    if let Kind::Local = kind {
        assert_eq!(part.header("x-content-type-options"), Some("nosniff"));
        // A file does not change, and a URL does one thing.
        assert_eq!(site.put(0, &granted, &[b'x'; 25]).await.status, 200);
        let got = site.get(0, &token("lee"), ROOM, &granted.id).await;
        assert_eq!(got.body, page);
        let swapped = [("PUT", url), ("GET", &granted.url)];
        for (method, url) in swapped {
            let answer = request(site.address(0), method, url, "", b"").await;
            assert_eq!(answer.status, 403, "{answer:?}");
        }
    }
    // `natter doctor` tries it, and leaves nothing.
    let before = site.paths().len();
    let found = examine(&site.mesh.config).await.unwrap().findings;
    assert!(
        !found.iter().any(|one| one.check == Check::Uploads),
        "{found:?}"
    );
    assert_eq!(site.paths().len(), before);
}

async fn what_may_not_be_uploaded_or_named_is_refused(kind: Kind) {
    let toml =
        "types = ['image/*']\nmax_size = '20KiB'\nmax_per_day = '48KiB'\nmax_per_message = 2\n";
    let site = Site::start(kind, 1, toml).await;
    let file =
        |name: &str, kind: &str, size: u64| json!({ "name": name, "type": kind, "size": size });
    let good = file("a.png", "image/png", 5);
    for (room, file, refused, told) in [
        (ROOM, json!({}), (400, "bad_request"), "name"),
        (
            ROOM,
            file("a/b", "image/png", 5),
            (400, "bad_request"),
            "name must have",
        ),
        (
            ROOM,
            file("a", "image", 5),
            (400, "bad_request"),
            "media type",
        ),
        (
            ROOM,
            file("a", "text/html", 5),
            (400, "bad_request"),
            "only image/*",
        ),
        (
            ROOM,
            file("a", "image/png", 0),
            (400, "bad_request"),
            "size",
        ),
        (
            ROOM,
            file("a", "image/png", 20_481),
            (413, "too_large"),
            "the limit is 20480",
        ),
        (
            "short:x",
            good.clone(),
            (400, "bad_request"),
            "keeps no history",
        ),
        ("none:x", good.clone(), (404, "unknown_namespace"), "none"),
        ("bad", good.clone(), (400, "bad_room"), "bad"),
    ] {
        let (status, answer) = site.asked(0, "kim", room, &file).await;
        let code = answer["code"].as_str().unwrap_or_default();
        assert_eq!((status, code), refused, "{file} in {room}: {answer}");
        assert!(
            answer["message"].as_str().unwrap().contains(told),
            "{answer}"
        );
    }
    let path = format!("/v1/rooms/{ROOM}/uploads");
    let reader = vec![Grant::new("*:*", &[Right::Read])];
    let reader = token_with("lee", Duration::from_secs(3600), reader);
    let (status, answer) = ask(site.address(0), ("POST", &path), &reader, &good).await;
    assert_eq!(
        (status, &answer["code"]),
        (403, &json!("forbidden")),
        "{answer}"
    );

    // The bytes of a day are those of one user.
    let own = site.upload("kim", ROOM, &[1; 20_000]).await;
    let elsewhere = site.upload("kim", "chat:other", &[1; 20_000]).await;
    let (status, answer) = site
        .asked(0, "kim", ROOM, &file("a", "image/png", 20_000))
        .await;
    assert_eq!(
        (status, &answer["code"]),
        (429, &json!("limit")),
        "{answer}"
    );
    assert!(
        answer["message"]
            .as_str()
            .unwrap()
            .contains("40000 bytes were granted"),
        "{answer}"
    );
    let foreign = site.upload("lee", ROOM, &[1; 20_000]).await;

    let forged = format!("{}A{}", &own[..30], &own[31..]);
    for (uploads, code, told) in [
        (
            &[&*foreign][..],
            "bad_request",
            "the upload of another user",
        ),
        (
            &[&own, &elsewhere],
            "bad_request",
            "not an upload of chat:lobby",
        ),
        (&[&forged], "bad_request", "upload"),
        (&["cat.png"], "bad_request", "not the id of an upload"),
        (&[&own, &own, &own], "limit", "3 uploads, the limit is 2"),
    ] {
        let (_, answer) = site.name(0, "kim", ROOM, "m", uploads).await;
        assert_eq!(answer["code"], code, "{answer}");
        assert!(
            answer["message"].as_str().unwrap().contains(told),
            "{answer}"
        );
    }
    // Over a socket, too.
    let client = site.mesh.connect(0, "kim").await;
    let body = json!({ "attachments": [{ "upload": foreign }] });
    let refused = client
        .commands()
        .call("send", &json!({ "room": ROOM, "body": body }))
        .await;
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("another user"), "{refused}");
    let page = site
        .mesh
        .get(0, &format!("/v1/rooms/{ROOM}/messages"))
        .await
        .unwrap();
    assert_eq!(page["messages"], json!([]));

    // Who may not read the room gets no file, and a file is of one room.
    let answer = site.get(0, &token("kim"), "chat:other", &own).await;
    assert_eq!(answer.status, 404, "{answer:?}");
    let stranger = vec![Grant::new("chat:other", &Right::ALL)];
    let stranger = token_with("lee", Duration::from_secs(3600), stranger);
    assert_eq!(site.get(0, &stranger, ROOM, &own).await.status, 403);

    // The first message counts. A moderator may edit a message with attachments.
    assert_eq!(site.name(0, "kim", ROOM, "m1", &[&own]).await.0, 200);
    site.claimed(&own, "chat:lobby/kim/m1").await;
    assert_eq!(site.name(0, "kim", ROOM, "m2", &[&own]).await.0, 200);
    let edit = json!({ "kind": "edit", "target": "kim/m1", "body": { "attachments": [{ "upload": own }] } });
    let path = format!("/v1/rooms/{ROOM}/messages");
    let (status, answer) = ask(site.address(0), ("POST", &path), &token("mod"), &edit).await;
    assert_eq!(status, 200, "{answer}");
    eventually("both are written", LONG, async || {
        let path = format!("/v1/rooms/{ROOM}/messages?after=");
        let page = site.mesh.get(0, &path).await?;
        let edited = page["messages"][0]["edited_at"].is_u64();
        if edited {
            Ok(())
        } else {
            Err(page.to_string())
        }
    })
    .await;
    site.claimed(&own, "chat:lobby/kim/m1").await;
}

async fn a_put_is_exact_and_in_time(kind: Kind) {
    let site = Site::start(kind, 1, "url_ttl = '2s'\n").await;
    let granted = site.grant("kim", ROOM, ("a", "image/png", 10)).await;
    for wrong in [&b"123456789"[..], b"12345678901"] {
        let answer = site.put(0, &granted, wrong).await;
        assert!((400..500).contains(&answer.status), "{answer:?}");
        assert!(!site.has(&granted.id));
    }
    // A client that goes away in the middle leaves nothing.
    let granted = site.grant("kim", ROOM, ("a", "image/png", 1 << 20)).await;
    {
        let (address, path) = match granted.url.strip_prefix("http://") {
            None => (site.address(0), &*granted.url),
            Some(rest) => {
                let at = rest.find('/').unwrap();
                (rest[..at].parse().unwrap(), &rest[at..])
            }
        };
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!(
            "PUT {path} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 1048576\r\n{}\r\n",
            granted.headers
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(&[7; 300_000]).await.unwrap();
        if let Kind::Local = kind {
            eventually("a part is there", LONG, async || match site.paths().len() {
                1 => Ok(()),
                _ => Err(format!("{:?}", site.paths())),
            })
            .await;
            assert!(!site.has(&granted.id));
            // Meanwhile nobody else uploads it.
            let mut second = TcpStream::connect(address).await.unwrap();
            second.write_all(head.as_bytes()).await.unwrap();
            let mut status = [0; 12];
            second.read_exact(&mut status).await.unwrap();
            assert_eq!(&status, b"HTTP/1.1 409");
        }
    }
    if let Kind::Local = kind {
        eventually("nothing is left", LONG, async || {
            match site.paths().as_slice() {
                [] => Ok(()),
                left => Err(format!("{left:?}")),
            }
        })
        .await;
        let counted = "natter_upload_received_total";
        // It is counted after the part is removed.
        eventually("the end is counted", LONG, async || {
            match site.mesh.metric(0, counted, "aborted").await {
                1 => Ok(()),
                other => Err(other.to_string()),
            }
        })
        .await;
    }
    assert!(!site.has(&granted.id));
    // After its time a URL is worth nothing.
    let granted = site.grant("kim", ROOM, ("a", "image/png", 10)).await;
    let down = format!("/v1/rooms/{ROOM}/uploads/{}?redirect=false", granted.id);
    let (_, down) = ask(site.address(0), ("GET", &down), &token("kim"), &Value::Null).await;
    let down = down["url"].as_str().unwrap().to_owned();
    eventually("the URL to download expires", LONG, async || match request(
        site.address(0),
        "GET",
        &down,
        "",
        b"",
    )
    .await
    {
        answer if answer.status == 403 => Ok(()),
        answer => Err(format!("{answer:?}")),
    })
    .await;
    let answer = site.put(0, &granted, b"1234567890").await;
    assert_eq!(answer.status, 403, "{answer:?}");
    assert!(!site.has(&granted.id));
}

async fn what_nobody_names_is_removed_and_what_somebody_names_stays(kind: Kind) {
    let site = Site::start(kind, 1, "unused_ttl = '6s'\n").await;
    let unused = site.upload("kim", ROOM, b"unused").await;
    let used = site.upload("kim", ROOM, b"used").await;
    assert_eq!(site.name(0, "kim", ROOM, "m1", &[&used]).await.0, 200);
    site.gone(&unused).await;
    // One that was uploaded after both: when it is gone, it has been decided about the others.
    let later = site.upload("kim", ROOM, b"later").await;
    site.gone(&later).await;
    assert!(site.has(&used));
    // Too late.
    let (status, answer) = site.name(0, "kim", ROOM, "m2", &[&later]).await;
    assert_eq!(status, 400, "{answer}");
    assert!(
        answer["message"].as_str().unwrap().contains("too long ago"),
        "{answer}"
    );
    assert_eq!(site.get(0, &token("kim"), ROOM, &later).await.status, 404);
    assert_eq!(site.get(0, &token("kim"), ROOM, &used).await.status, 200);
    // The records stay for the limit of a day.
    let record = site.record(&unused).await.unwrap();
    assert!(record.get_bool("gone").unwrap(), "{record}");
    assert!(record.get_str("name").is_err(), "{record}");
}

async fn files_go_with_their_messages_rooms_and_users(kind: Kind) {
    let mut site = Site::start(kind, 1, "").await;
    let named = async |site: &Site, user: &str, room: &str, id: &str| {
        let upload = site.upload(user, room, id.as_bytes()).await;
        assert_eq!(site.name(0, user, room, id, &[&upload]).await.0, 200);
        site.claimed(&upload, &format!("{room}/{user}/{id}")).await;
        upload
    };
    let deleted = named(&site, "kim", ROOM, "m1").await;
    let (of_room, of_kim) = (
        named(&site, "lee", "chat:old", "m2").await,
        named(&site, "kim", ROOM, "m3").await,
    );
    let stays = named(&site, "lee", ROOM, "m4").await;
    // Of a room that is erased, and of a user who is: without a message.
    let (open, open_of_kim) = (
        site.upload("lee", "chat:old", b"open").await,
        site.upload("kim", ROOM, b"open").await,
    );

    let path = format!("/v1/rooms/{ROOM}/messages");
    let delete = json!({ "kind": "delete", "target": "m1", "body": {} });
    let (status, answer) = ask(site.address(0), ("POST", &path), &token("kim"), &delete).await;
    assert_eq!(status, 200, "{answer}");
    site.gone(&deleted).await;
    // A message that comes again after it was deleted claims nothing for itself.
    let again = site.upload("kim", ROOM, b"again").await;
    let delete = json!({ "kind": "delete", "target": "kim/m9", "body": {} });
    let (status, answer) = ask(site.address(0), ("POST", &path), &token("kim"), &delete).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(site.name(0, "kim", ROOM, "m9", &[&again]).await.0, 200);
    site.gone(&again).await;

    let moderator = token("mod");
    let (status, answer) = ask(
        site.address(0),
        ("DELETE", "/v1/rooms/chat:old"),
        &moderator,
        &Value::Null,
    )
    .await;
    assert!(status < 300, "{answer}");
    site.gone(&of_room).await;
    site.gone(&open).await;

    // The storage is away: it is tried again.
    if let Files::S3(s3) = &mut site.files {
        s3.stop().await;
    }
    let (status, answer) = ask(
        site.address(0),
        ("DELETE", "/v1/users/kim/messages"),
        &moderator,
        &Value::Null,
    )
    .await;
    assert!(status < 300, "{answer}");
    if let Files::S3(s3) = &mut site.files {
        let worker = site.mesh.workers[0].address;
        eventually("a removal fails", LONG, async || {
            let (_, text) = crate::support::mesh::http(worker, "GET", "/metrics", "", "")
                .await
                .map_err(|error| error.to_string())?;
            let failed = text
                .lines()
                .find(|line| line.starts_with("natter_upload_removal_failed_total"));
            match failed {
                Some(line) if !line.ends_with(" 0") => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
        s3.start_again().await;
        assert!(site.has(&of_kim) || site.has(&open_of_kim));
        // The time until it is tried again passes.
        let now = doc! { "$set": { "due": DateTime::now() } };
        let due = doc! { "due": { "$exists": true }, "gone": { "$exists": false } };
        eventually("both are tried again", LONG, async || {
            site.registry()
                .await
                .update_many(due.clone(), now.clone())
                .await
                .unwrap();
            if site.has(&of_kim) || site.has(&open_of_kim) {
                Err("not yet".to_owned())
            } else {
                Ok(())
            }
        })
        .await;
    }
    site.gone(&of_kim).await;
    site.gone(&open_of_kim).await;
    assert!(site.has(&stays));
    let left: Vec<Fields> = site
        .registry()
        .await
        .find(doc! { "due": null })
        .await
        .unwrap()
        .try_collect()
        .await
        .unwrap();
    let left: Vec<_> = left.iter().map(|one| one.get_str("_id").unwrap()).collect();
    assert_eq!(left, [&stays]);
}

async fn an_upload_outlives_restarts_and_a_silent_history_service(kind: Kind) {
    let mut site = Site::start(kind, 1, "").await;
    let upload = site.upload("kim", ROOM, b"file").await;
    // Everything ends between the upload and its message.
    site.mesh.workers[0].process.kill().await;
    site.mesh.edges[0].process.kill().await;
    site.mesh.edges[0].process.start().await.unwrap();
    // Without the registry nothing is granted. Messages go on, and so do downloads.
    let file = json!({ "name": "a", "type": "image/png", "size": 5 });
    let (status, answer) = site.asked(0, "kim", ROOM, &file).await;
    assert_eq!(
        (status, &answer["code"]),
        (503, &json!("unavailable")),
        "{answer}"
    );
    assert!(
        answer["message"].as_str().unwrap().contains("uploads need"),
        "{answer}"
    );
    assert_eq!(site.name(0, "kim", ROOM, "m1", &[&upload]).await.0, 200);
    assert_eq!(
        site.get(0, &token("lee"), ROOM, &upload).await.body,
        b"file"
    );
    site.mesh.workers[0].process.start().await.unwrap();
    site.claimed(&upload, "chat:lobby/kim/m1").await;
}

#[tokio::test]
async fn there_are_no_routes_without_uploads() {
    let mesh = Mesh::start(nats_url(), 1, "").await;
    let path = format!("/v1/rooms/{ROOM}/uploads");
    let (status, _) = ask(
        mesh.edges[0].address,
        ("POST", &path),
        &token("kim"),
        &json!({}),
    )
    .await;
    assert_eq!(status, 404);
    // What looks like an attachment is the app's own.
    let body = json!({ "body": { "attachments": [{ "upload": "mine" }] } });
    let path = format!("/v1/rooms/{ROOM}/messages");
    let (status, answer) = ask(mesh.edges[0].address, ("POST", &path), &token("kim"), &body).await;
    assert_eq!(status, 200, "{answer}");
}

#[tokio::test]
async fn the_doctor_says_when_a_storage_cannot_be_used() {
    let mut s3 = S3::start().await;
    let toml = format!(
        "[uploads]\nsecret = 'a secret of the tests, of more than 32 bytes'\n{}",
        s3.toml()
    );
    let mesh = Mesh::without_edges(nats_url(), &toml).await;
    let problems = async |config: &Config| {
        let found = examine(config).await.unwrap().findings;
        let found = found.into_iter().filter(|one| one.check == Check::Uploads);
        found.map(|one| one.what).collect::<Vec<_>>()
    };
    assert_eq!(problems(&mesh.config).await, [] as [String; 0]);
    let mut wrong = mesh.config.clone();
    wrong.uploads.s3_secret = Secret::new("not the secret of the key".to_owned());
    let found = problems(&wrong).await;
    assert!(
        found.len() == 1 && found[0].contains("S3 answered 403"),
        "{found:?}"
    );
    s3.stop().await;
    let found = problems(&mesh.config).await;
    assert!(
        found.len() == 1 && found[0].contains("can't be reached"),
        "{found:?}"
    );
}
