//! Files that are given out only after a worker has found them clean.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use super::*;
use crate::{
    codes::update_named,
    support::{
        endpoint::{Asked, Endpoint, Say},
        mesh::{Edge, SECRET},
    },
    workers::{dead, metric_is, said_by_hand, tool, worker},
};

macro_rules! over_both {
    ($($name:ident)*) => {
        mod local { $(#[tokio::test(flavor = "multi_thread")] async fn $name() { super::$name(super::Kind::Local).await })* }
        mod s3 { $(#[tokio::test(flavor = "multi_thread")] async fn $name() { super::$name(super::Kind::S3).await })* }
    };
}

over_both! {
    a_file_waits_for_its_verdict
    nothing_takes_the_place_of_a_checked_file
    nobody_else_gives_verdicts_and_one_may_come_before_its_message
}

/// What the scanner of the tests answers: the name of a message says what its files are.
fn scan(asked: &Asked) -> Say {
    let verdict = match asked.id() {
        id if id.starts_with("busy") => return Say::Status(503),
        id if id.starts_with("refused") => return Say::Status(400),
        id if id.starts_with("bad") => "infected",
        id if id.starts_with("missing") => "missing",
        id if id.starts_with("unsure") => "unsure",
        _ => "clean",
    };
    let uploads = asked.body["uploads"].as_array().unwrap().iter();
    let files: serde_json::Map<_, _> = uploads
        .map(|one| (one["upload"].as_str().unwrap().to_owned(), json!(verdict)))
        .collect();
    Say::Json(json!({ "files": files }))
}

/// A site whose files are checked at this endpoint, and the process of the worker.
async fn site(kind: Kind, edges: usize, endpoint: &Endpoint) -> (Site, Edge) {
    // For tools; the process of the worker is told of an edge.
    let base = "scan = 'scan'\npublic_url = 'http://127.0.0.1:1'\n";
    let entry = worker("scan", endpoint, "attachments = true\nmax_deliver = 1\n");
    let site = Site::start(kind, edges, &format!("{base}{entry}")).await;
    let workers = site.mesh.start_workers().await;
    (site, workers)
}

impl Site {
    /// What a download is answered with: its status and its code.
    async fn refusal(&self, edge: usize, id: &str) -> (u16, String) {
        let answer = self.get(edge, &token("lee"), ROOM, id).await;
        let json: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        let code = json["code"].as_str().unwrap_or_default().to_owned();
        if code == "pending" {
            let ms = json["retry_after_ms"].as_u64().unwrap();
            assert!((2000..=4000).contains(&ms), "{answer:?}");
            let s: u64 = answer.header("retry-after").unwrap().parse().unwrap();
            assert_eq!(s, ms.div_ceil(1000), "{answer:?}");
        }
        (answer.status, code)
    }

    async fn answers(&self, edge: usize, id: &str, status: u16, code: &str) {
        eventually(
            &format!("a download is answered with {status}"),
            LONG,
            async || match self.refusal(edge, id).await {
                found if found == (status, code.to_owned()) => Ok(()),
                found => Err(format!("{found:?}, {:?}", self.record(id).await)),
            },
        )
        .await;
    }

    async fn state(&self, id: &str) -> String {
        let record = self.record(id).await.unwrap();
        record.get_str("state").unwrap_or("none").to_owned()
    }

    async fn becomes(&self, id: &str, state: &str) {
        eventually(&format!("it is {state}"), LONG, async || {
            match self.state(id).await {
                found if found == state => Ok(()),
                found => Err(found),
            }
        })
        .await;
    }
}

/// A token as somebody with the secret could sign it, in place of `natter token`, which refuses such a user.
fn renamed(token: &str, user: &str) -> String {
    let mut parts = token.split('.');
    let (head, claims) = (parts.next().unwrap(), parts.next().unwrap());
    let mut claims: Value = serde_json::from_slice(&BASE64.decode(claims).unwrap()).unwrap();
    claims["sub"] = json!(user);
    let signed = format!("{head}.{}", BASE64.encode(claims.to_string()));
    let mut hmac = Hmac::<Sha256>::new_from_slice(SECRET.as_bytes()).unwrap();
    hmac.update(signed.as_bytes());
    format!("{signed}.{}", BASE64.encode(hmac.finalize().into_bytes()))
}

fn pending() -> (u16, String) {
    (409, "pending".to_owned())
}

async fn a_file_waits_for_its_verdict(kind: Kind) {
    let endpoint = Endpoint::closed(scan).await;
    let (site, _workers) = Box::pin(site(kind, 2, &endpoint)).await;
    // What names no file is nothing for this worker.
    assert_eq!(site.name(0, "kim", ROOM, "plain", &[]).await.0, 200);
    let granted = site.grant("kim", ROOM, ("a.bin", "image/png", 4)).await;
    assert_eq!(site.put(0, &granted, b"good").await.status, 200);
    let good = granted.id.clone();
    assert_eq!(site.refusal(0, &good).await, pending());
    assert_eq!(site.name(0, "kim", ROOM, "m1", &[&good]).await.0, 200);

    let asked = endpoint.asked_times(1).await.remove(0);
    assert_eq!(asked.id(), "m1");
    let told = &asked.body["uploads"];
    assert_eq!(told.as_array().unwrap().len(), 1, "{told}");
    assert_eq!(told[0]["upload"], json!(good));
    assert_eq!(told[0]["name"], "a.bin");
    assert!(told[0]["expires"].is_u64(), "{told}");
    // The worker gets the file, and nobody else does.
    let url = told[0]["url"].as_str().unwrap();
    assert!(url.starts_with("http://"), "{url}");
    let fetched = request(site.address(1), "GET", url, "", b"").await;
    assert_eq!((fetched.status, &*fetched.body), (200, &b"good"[..]));
    for edge in [0, 1] {
        assert_eq!(site.refusal(edge, &good).await, pending());
    }

    endpoint.open_gate();
    for edge in [0, 1] {
        site.answers(edge, &good, 200, "").await;
    }
    assert_eq!(site.get(1, &token("lee"), ROOM, &good).await.body, b"good");
    eventually("history shows the verdict", LONG, async || {
        let path = format!("/v1/rooms/{ROOM}/messages?after=");
        let page = site.mesh.get(0, &path).await?;
        let messages = page["messages"].as_array().unwrap().iter();
        let mut found = messages.filter(|one| one["id"] == "m1");
        match found.next().map(|one| &one["annotations"]["scan"]["files"]) {
            Some(files) if files[&good] == "clean" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    // What was checked can't be replaced.
    let again = site.put(0, &granted, b"evil").await;
    let expected = match kind {
        Kind::Local => 200,
        Kind::S3 => 412,
    };
    assert_eq!(again.status, expected, "{again:?}");
    assert_eq!(site.get(0, &token("lee"), ROOM, &good).await.body, b"good");

    let granted = site.grant("kim", ROOM, ("a.bin", "image/png", 4)).await;
    assert_eq!(site.put(0, &granted, b"evil").await.status, 200);
    let bad = granted.id.clone();
    assert_eq!(site.name(1, "kim", ROOM, "bad1", &[&bad]).await.0, 200);
    for edge in [0, 1] {
        site.answers(edge, &bad, 410, "infected").await;
    }
    site.gone(&bad).await;
    // Not even if it is uploaded once more.
    assert_eq!(site.put(0, &granted, b"evil").await.status, expected);
    assert!(!site.has(&bad));
    assert_eq!(site.refusal(0, &bad).await, (410, "infected".to_owned()));

    let asked = endpoint.asked();
    let asked: Vec<&str> = asked.iter().map(Asked::id).collect();
    assert_eq!(asked, ["m1", "bad1"]);
    // The storage keeps what it has, says `natter doctor`.
    let found = examine(&site.mesh.config).await.unwrap().findings;
    let found: Vec<_> = found
        .iter()
        .filter(|one| one.check == Check::Uploads)
        .collect();
    assert!(found.is_empty(), "{found:?}");
}

/// An edge remembers for a while that a file is clean: also when its message goes, and its URL to upload lives on.
async fn nothing_takes_the_place_of_a_checked_file(kind: Kind) {
    let endpoint = Endpoint::start(scan).await;
    let (site, _workers) = Box::pin(site(kind, 2, &endpoint)).await;
    let granted = site.grant("kim", ROOM, ("a.bin", "image/png", 4)).await;
    assert_eq!(site.put(0, &granted, b"good").await.status, 200);
    let id = &granted.id;
    assert_eq!(site.name(0, "kim", ROOM, "m1", &[id]).await.0, 200);
    assert_eq!(site.name(0, "kim", ROOM, "m2", &[id]).await.0, 200);
    site.answers(0, id, 200, "").await;
    let delete = json!({ "kind": "delete", "target": "m1", "body": {} });
    let path = format!("/v1/rooms/{ROOM}/messages");
    let (status, answer) = ask(site.address(0), ("POST", &path), &token("kim"), &delete).await;
    assert_eq!(status, 200, "{answer}");
    site.gone(id).await;

    let again = site.put(0, &granted, b"evil").await;
    let expected = match kind {
        Kind::Local => 200,
        Kind::S3 => 412,
    };
    assert_eq!(again.status, expected, "{again:?}");
    assert!(!site.has(id));
    // This edge has asked a moment ago, and the other one asks now.
    let got = site.get(0, &token("lee"), ROOM, id).await;
    match kind {
        Kind::Local => assert_eq!(got.status, 404, "{got:?}"),
        Kind::S3 => assert_eq!((got.status, &*got.body), (200, &b""[..]), "{got:?}"),
    }
    assert_eq!(site.refusal(1, id).await, (404, "bad_id".to_owned()));

    // When nobody can upload it any more, nothing is left of it.
    let registry = site.registry().await;
    let ago = DateTime::from_millis(0);
    let past = doc! { "$set": { "at": ago, "due": ago } };
    eventually("its record goes", LONG, async || {
        let found = site.record(id).await;
        if found
            .as_ref()
            .is_some_and(|found| found.contains_key("gone"))
        {
            let which = doc! { "_id": id };
            registry.update_one(which, past.clone()).await.unwrap();
        }
        found.map_or(Ok(()), |found| Err(found.to_string()))
    })
    .await;
    let left = |path: &PathBuf| path.to_string_lossy().contains(&**id);
    assert!(!site.paths().iter().any(left), "{:?}", site.paths());
}

async fn nobody_else_gives_verdicts_and_one_may_come_before_its_message(kind: Kind) {
    // It hangs as long as the test wants.
    let endpoint = Endpoint::closed(scan).await;
    let (site, _workers) = Box::pin(site(kind, 2, &endpoint)).await;
    let mesh = &site.mesh;
    let held = site.upload("kim", ROOM, b"held").await;
    assert_eq!(site.name(0, "kim", ROOM, "m1", &[&held]).await.0, 200);
    endpoint.asked_times(1).await;
    // A member with all rights says the same as the worker would, in its own name.
    let said = json!({ "scan": { "files": { &held: "clean" } } });
    let forged = json!({ "kind": "annotation", "target": "kim/m1", "body": said });
    let path = format!("/v1/rooms/{ROOM}/messages");
    for user in ["kim", "mod", "worker.scan", "scan"] {
        let (status, answer) = ask(site.address(0), ("POST", &path), &token(user), &forged).await;
        assert_eq!(status, 200, "{answer}");
    }
    // And nobody gets the worker's name. The same token with another name is good.
    let same = renamed(&token("kim"), "lee");
    let (status, answer) = ask(site.address(0), ("POST", &path), &same, &forged).await;
    assert_eq!(status, 200, "{answer}");
    let worker = renamed(&token("kim"), "$worker.scan");
    let (status, answer) = ask(site.address(0), ("POST", &path), &worker, &forged).await;
    assert_eq!((status, &answer["code"]), (401, &json!("unauthorized")));
    // Nor does another worker's word count.
    said_by_hand(mesh, ROOM, "image", ("i1", "kim/m1"), &said).await;

    // The verdict on a file that no message has named yet. It comes after those above, so they are written too.
    let early = site.upload("kim", ROOM, b"early").await;
    let clean = |id: &str| json!({ "scan": { "files": { id: "clean" } } });
    said_by_hand(mesh, ROOM, "scan", ("e1", "kim/early"), &clean(&early)).await;
    site.becomes(&early, "clean").await;
    site.answers(0, &early, 200, "").await;
    assert_eq!(site.name(0, "kim", ROOM, "early", &[&early]).await.0, 200);
    site.claimed(&early, "chat:lobby/kim/early").await;
    assert_eq!(site.state(&early).await, "clean");
    let path = format!("/v1/rooms/{ROOM}/messages?after=");
    eventually("what was forged is in history", LONG, async || {
        let page = mesh.get(0, &path).await?;
        match page["messages"][0]["annotations"]["scan"]["files"][&held] == "clean" {
            true => Ok(()),
            false => Err(page.to_string()),
        }
    })
    .await;
    assert_eq!(site.state(&held).await, "pending");
    assert_eq!(site.refusal(1, &held).await, pending());

    // A verdict of another room is none.
    let other = site.upload("kim", "chat:other", b"other").await;
    said_by_hand(mesh, ROOM, "scan", ("e2", "kim/early"), &clean(&other)).await;
    // Infected is the last word, in whatever order they come.
    let infected = json!({ "scan": { "files": { &early: "infected" } } });
    said_by_hand(mesh, ROOM, "scan", ("e3", "kim/early"), &infected).await;
    site.becomes(&early, "infected").await;
    said_by_hand(mesh, ROOM, "scan", ("e4", "kim/early"), &clean(&early)).await;
    said_by_hand(mesh, ROOM, "scan", ("e5", "kim/m1"), &clean(&held)).await;
    site.becomes(&held, "clean").await;
    assert_eq!(site.state(&other).await, "pending");
    assert_eq!(site.refusal(1, &early).await, (410, "infected".to_owned()));
    site.gone(&early).await;

    // What was granted before files were checked counts as clean.
    let registry = site.registry().await;
    let granted_before = doc! { "$unset": { "state": "" } };
    let of_other = doc! { "_id": &other };
    registry.update_one(of_other, granted_before).await.unwrap();
    let got = site.get(0, &token("lee"), "chat:other", &other).await;
    assert_eq!(got.body, b"other");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_verdict_or_somebody_to_ask_a_file_stays_back() {
    let endpoint = Endpoint::start(scan).await;
    let (mut site, _workers) = Box::pin(site(Kind::Local, 2, &endpoint)).await;
    let (busy, refused) = (
        site.upload("kim", ROOM, b"busy").await,
        site.upload("kim", ROOM, b"refused").await,
    );
    assert_eq!(site.name(0, "kim", ROOM, "busy", &[&busy]).await.0, 200);
    assert_eq!(
        site.name(0, "kim", ROOM, "refused", &[&refused]).await.0,
        200
    );
    // Also what the scanner refuses, which other workers only count.
    let letters = dead(&site.mesh, 2).await;
    assert!(
        letters.iter().all(|one| one["worker"] == "scan"),
        "{letters:?}"
    );
    for id in [&busy, &refused] {
        assert_eq!(site.refusal(0, id).await, pending());
    }
    let before = endpoint.asked().len();
    // With another secret than that of the edges no upload seems to be one. The letters stay.
    let mut command = site.mesh.command(&["worker", "retry"]).await;
    let other = "another secret of the tests, of more than 32 bytes";
    command.env("NATTER__UPLOADS__SECRET", other);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap());
    let output = output.await.unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        !output.status.success() && said.contains("uploads.secret"),
        "{output:?}"
    );
    dead(&site.mesh, 2).await;
    assert_eq!(endpoint.asked().len(), before);
    endpoint.behave(|asked| {
        let uploads = asked.body["uploads"].as_array().unwrap();
        let id = uploads[0]["upload"].as_str().unwrap().to_owned();
        Say::Json(json!({ "files": { id: "clean" } }))
    });
    let (is_done, said) = tool(&site.mesh, &["worker", "retry"]).await;
    assert!(is_done, "{said}");
    // Its URLs lead to the files.
    let asked = endpoint.asked().split_off(before);
    assert_eq!(asked.len(), 2);
    for one in &asked {
        let url = one.body["uploads"][0]["url"].as_str().unwrap();
        let path = url.strip_prefix("http://127.0.0.1:1/").unwrap();
        let fetched = request(site.address(1), "GET", &format!("/{path}"), "", b"").await;
        let body = String::from_utf8(fetched.body).unwrap();
        assert_eq!((fetched.status, &*body), (200, one.id()));
    }
    for id in [&busy, &refused] {
        site.answers(0, id, 200, "").await;
    }
    // Without the history service nothing is known of a file, except what was clean a moment ago.
    site.mesh.workers[0].process.kill().await;
    for _ in 0..2 {
        assert_eq!(
            site.refusal(1, &busy).await,
            (503, "unavailable".to_owned())
        );
    }
    assert_eq!(site.refusal(0, &busy).await.0, 200);
    site.mesh.workers[0].process.start().await.unwrap();
    site.answers(1, &busy, 200, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_never_comes_makes_no_letter_and_one_without_a_verdict_does() {
    let endpoint = Endpoint::start(scan).await;
    // Of the other one, the receiver has no business with files.
    let base = "scan = 'scan'\npublic_url = 'http://127.0.0.1:1'\n";
    let scanner = worker("scan", &endpoint, "attachments = true\nmax_deliver = 3\n");
    let others = Endpoint::start(|_| Say::Status(204)).await;
    let other = worker("other", &others, "");
    let site = Site::start(Kind::Local, 1, &format!("{base}{scanner}{other}")).await;
    let _workers = site.mesh.start_workers().await;
    let granted = site.grant("kim", ROOM, ("a.bin", "image/png", 4)).await;
    let missing = &granted.id;
    assert_eq!(
        site.name(0, "kim", ROOM, "missing", &[missing]).await.0,
        200
    );
    let unsure = site.upload("kim", ROOM, b"unsure").await;
    assert_eq!(site.name(0, "kim", ROOM, "unsure", &[&unsure]).await.0, 200);
    let letters = dead(&site.mesh, 1).await;
    let reason = letters[0]["reason"].as_str().unwrap();
    assert!(reason.contains(&unsure), "{letters:?}");
    let path = format!("/v1/rooms/{ROOM}/messages?after=");
    eventually("it is told that the file is missing", LONG, async || {
        let page = site.mesh.get(0, &path).await?;
        let mut messages = page["messages"].as_array().unwrap().iter();
        let found = messages.find(|one| one["id"] == "missing").unwrap();
        match found["annotations"]["scan"]["files"][missing] == "missing" {
            true => Ok(()),
            false => Err(page.to_string()),
        }
    })
    .await;
    let asked = endpoint.asked();
    let of = |id: &str| asked.iter().filter(|one| one.id() == id).count();
    assert_eq!((of("missing"), of("unsure")), (3, 1));
    assert_eq!(dead(&site.mesh, 1).await, letters);
    // When the file has come, another message that names it has it checked.
    assert_eq!(site.put(0, &granted, b"good").await.status, 200);
    assert_eq!(site.name(0, "kim", ROOM, "m2", &[missing]).await.0, 200);
    site.answers(0, missing, 200, "").await;
    let asked = others.asked_times(3).await;
    assert!(asked.iter().all(|one| one.body.get("uploads").is_none()));
}

#[tokio::test(flavor = "multi_thread")]
async fn with_full_dead_letters_an_old_message_is_skipped_after_some_attempts() {
    // Old at once, or else refused: a letter in any case.
    let endpoint = Endpoint::start(|_| Say::Status(503)).await;
    let base = "scan = 'scan'\npublic_url = 'http://127.0.0.1:1'\n";
    let more = "attachments = true\nmax_deliver = 1\nmax_age = '1ms'\n";
    let entry = worker("scan", &endpoint, more);
    let site = Site::start(Kind::Local, 1, &format!("{base}{entry}")).await;
    let stream = format!("UNDELIVERED_{}", site.mesh.config.region);
    update_named(nats_url(), &stream, |config| config["max_msgs"] = json!(1)).await;
    let workers = site.mesh.start_workers().await;
    for id in ["m1", "m2"] {
        let file = site.upload("kim", ROOM, id.as_bytes()).await;
        assert_eq!(site.name(0, "kim", ROOM, id, &[&file]).await.0, 200);
    }
    metric_is(&workers, "lost_total", 1).await;
    assert_eq!(dead(&site.mesh, 1).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_needs_files_says_what_it_lacks() {
    let endpoint = Endpoint::start(scan).await;
    let toml = worker("scan", &endpoint, "attachments = true\n");
    let mesh = Mesh::without_edges(nats_url(), &toml).await;
    let mut command = mesh.command(&["worker"]).await;
    let output = tokio::task::spawn_blocking(move || command.output().unwrap());
    let output = output.await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(said.contains("workers.scan.attachments = true"), "{said}");
    assert!(said.contains("uploads.public_url"), "{said}");
}
