//! The receivers of `deploy/examples`, as programs of their own, check the signatures of real requests.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use serde_json::Value;
use tokio::{net::TcpListener, sync::mpsc, time::timeout};

use super::{SECRET, start, text};
use crate::support::{LONG, eventually, mesh::http};

#[path = "../../../deploy/examples/hook.rs"]
mod in_rust;

/// A program that prints each event that it accepts; killed at the end.
struct Receiver(Child);

impl Drop for Receiver {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Whether a program is on this machine.
fn is_there(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok()
}

/// Runs a program until it has printed an event.
async fn try_out(mut command: Command) {
    let port = natter::testing::servers::free_port().unwrap();
    command
        .arg(port.to_string())
        .env("NATTER_HOOK_SECRET", format!("whsec_{SECRET}"))
        .stdout(Stdio::piped());
    let mut receiver = Receiver(command.spawn().unwrap());
    let printed = BufReader::new(receiver.0.stdout.take().unwrap());
    let (lines, told) = mpsc::channel(8);
    let read = tokio::task::spawn_blocking(move || {
        for line in printed.lines().map_while(Result::ok) {
            if lines.blocking_send(line).is_err() {
                return;
            }
        }
    });
    Box::pin(tell(port, told)).await;
    drop(receiver);
    read.await.unwrap();
}

/// Tells a receiver of a message, and sends it something that nobody has signed.
async fn tell(port: u16, mut told: mpsc::Receiver<String>) {
    let toml = format!(
        "[[hooks]]\nname = 'example'\nrooms = ['chat:*']\nurl = 'http://127.0.0.1:{port}/'\nsecret = 'whsec_{SECRET}'\nevents = ['message.created']\nallow = ['127.0.0.1']\n"
    );
    let (mesh, _hooks) = start(&toml).await;
    let address = ([127, 0, 0, 1], port).into();
    eventually("a forged request is refused", LONG, async || {
        let forged = "webhook-id: x\r\nwebhook-timestamp: 1\r\nwebhook-signature: v1,AAAA\r\n";
        match http(address, "POST", "/", forged, "{}").await {
            Ok((401, _)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    text(&mesh, "chat:a", "m1").await;
    let line = timeout(LONG, told.recv()).await.expect("an event").unwrap();
    let event: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(
        (&event["type"], &event["data"]["room"]),
        (&"message.created".into(), &"chat:a".into())
    );
}

fn example(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("deploy/examples")
        .join(name)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_receiver_in_python_checks_what_it_gets() {
    let mut command = Command::new("python3");
    command.arg("-u").arg(example("hook.py"));
    Box::pin(try_out(command)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_receiver_in_node_checks_what_it_gets() {
    if !is_there("node") {
        eprintln!("skipped: no Node.js");
        return;
    }
    let mut command = Command::new("node");
    command.arg(example("hook.mjs"));
    Box::pin(try_out(command)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_receiver_in_rust_checks_what_it_gets() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (lines, told) = mpsc::channel(8);
    let print = move |line: &str| lines.try_send(line.to_owned()).unwrap();
    let router = in_rust::receiver(&format!("whsec_{SECRET}"), print);
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    Box::pin(tell(port, told)).await;
}
