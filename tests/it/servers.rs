//! Child processes, and servers that are killed and started again.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use natter::testing::servers::{Check, Process, Spec, StartError};

use crate::support::{self, LONG, eventually, is_running};

fn shell(folder: &Path, script: &str, ready: Check) -> Process {
    let spec = Spec {
        name: "stub".to_owned(),
        program: PathBuf::from("sh"),
        args: vec!["-c".into(), script.into()],
        env: vec![("GREETING".to_owned(), "hello".to_owned())],
        log: folder.join("logs/stub.log"),
        ready: Arc::clone(&ready),
        alive: ready,
        ready_within: Duration::from_millis(500),
        stop_within: Duration::from_millis(500),
    };
    Process::new(support::launcher(), spec)
}

/// Ready when the script has made this file.
fn file(path: PathBuf) -> Check {
    Arc::new(move |_pid| {
        let there = path.exists();
        Box::pin(async move {
            if there {
                Ok(())
            } else {
                Err("not there".into())
            }
        })
    })
}

fn long_enough(mut process: Process) -> Process {
    let mut spec = process.spec().clone();
    spec.ready_within = LONG;
    process = Process::new(support::launcher(), spec);
    process
}

#[tokio::test]
async fn a_process_that_ends_at_once_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let never = file(folder.path().join("never"));
    let mut process = long_enough(shell(
        folder.path(),
        "echo $GREETING; echo no luck >&2; exit 3",
        never,
    ));
    let error = process.start().await.unwrap_err();
    assert!(matches!(error, StartError::Exited { .. }));
    let said = error.to_string();
    assert!(
        said.contains("hello\n  no luck") && said.contains("exit status: 3"),
        "{said}"
    );
}

#[tokio::test]
async fn a_process_that_does_not_get_ready_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let never = file(folder.path().join("never"));
    let pid_file = folder.path().join("pid");
    let script = format!("echo $$ > {}; sleep 1000", pid_file.display());
    let mut process = shell(folder.path(), &script, never);
    let error = process.start().await.unwrap_err();
    assert!(matches!(error, StartError::NotReady { .. }), "{error}");
    let pid: u32 = fs::read_to_string(pid_file)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert!(!is_running(pid));
}

#[tokio::test]
async fn a_stop_is_asked_for_first_and_enforced_then() {
    let folder = tempfile::tempdir().unwrap();
    for (script, exit) in [
        (
            "trap 'exit 7' TERM; touch ready; while :; do sleep 0.01; done",
            Some(7),
        ),
        (
            "trap '' TERM; touch ready; while :; do sleep 0.01; done",
            None,
        ),
    ] {
        let ready = folder.path().join("ready");
        let script = script.replace("ready", &ready.to_string_lossy());
        let mut process = long_enough(shell(folder.path(), &script, file(ready.clone())));
        process.start().await.unwrap();
        let pid = process.pid().unwrap();
        let status = process.stop().await;
        assert_eq!(status.and_then(|status| status.code()), exit);
        assert!(!is_running(pid));
        assert_eq!(process.pid(), None);
        fs::remove_file(ready).unwrap();
    }
}

#[tokio::test]
async fn a_dropped_process_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let ready = folder.path().join("ready");
    let script = format!("touch {}; exec sleep 1000", ready.display());
    let mut process = long_enough(shell(folder.path(), &script, file(ready)));
    process.start().await.unwrap();
    let pid = process.pid().unwrap();
    drop(process);
    eventually("it is gone", LONG, async || {
        if is_running(pid) {
            Err("running".to_owned())
        } else {
            Ok(())
        }
    })
    .await;
}

#[tokio::test]
async fn servers_come_back_on_their_port_with_their_data() {
    let mut nats = support::dedicated_nats().await;
    let (url, pid) = (nats.url(), nats.server.pid());
    nats.server.kill().await;
    assert_eq!(nats.server.pid(), None);
    nats.server.restart().await.unwrap();
    assert_eq!(nats.url(), url);
    assert_ne!(nats.server.pid(), pid);

    let mut mongod = support::dedicated_mongod().await;
    let url = mongod.url();
    let find = async || {
        let client = mongodb::Client::with_uri_str(&url).await.unwrap();
        client
            .database("test")
            .collection::<mongodb::bson::Document>("c")
    };
    let document = mongodb::bson::doc! { "_id": 1 };
    find().await.insert_one(document.clone()).await.unwrap();
    mongod.server.kill().await;
    mongod.server.restart().await.unwrap();
    assert_eq!(mongod.url(), url);
    assert_eq!(
        find().await.find_one(document.clone()).await.unwrap(),
        Some(document)
    );
}

#[tokio::test]
async fn the_shared_servers_are_shared() {
    assert_eq!(support::nats_url(), support::nats_url());
    assert!(support::mongodb_url().contains("replicaSet="));
}
