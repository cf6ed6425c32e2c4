//! `natter tail` and `natter send`: a person at a terminal in a room.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
};

use natter::testing::auth::{Grant, Right};
use serde_json::{Value, json};

use crate::support::{
    self,
    mesh::{Mesh, SECRET, token_with},
};

fn tool(mesh: &Mesh, tool: &str) -> Command {
    let mut command = Command::new(support::natter());
    command
        .arg(tool)
        .arg("chat:a")
        .env("NATTER__AUTH__HS256_SECRET", SECRET)
        .current_dir(mesh.dir())
        .stdin(Stdio::null());
    for edge in &mesh.edges {
        command.args(["--url", &format!("ws://{}", edge.address)]);
    }
    command
}

fn send(mesh: &Mesh, text: &str, arguments: &[&str]) -> String {
    let output = tool(mesh, "send")
        .arg(text)
        .args(arguments)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A `tail` that is ended when the test is over.
struct Tail(Child);

impl Drop for Tail {
    fn drop(&mut self) {
        // Both do nothing when it has ended.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tail_shows_everything_once_while_edges_die() {
    let mut mesh = Mesh::start(support::nats_url(), 2, "").await;
    let first = send(&mesh, "zero", &["--user", "kim"]);
    let tail = tool(&mesh, "tail")
        .args(["--json", "--since", &first])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut tail = Tail(tail);
    let mut lines = BufReader::new(tail.0.stdout.take().unwrap()).lines();
    let mut next = || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    let mut cursors = vec![first];
    for round in 0..4 {
        let text = format!("안녕 {round}");
        cursors.push(send(
            &mesh,
            &text,
            &["--user", "kim", "--id", &format!("m{round}")],
        ));
        let pushed = next();
        assert_eq!(
            (&pushed["body"]["text"], &pushed["from"]),
            (&json!(text), &json!("kim"))
        );
        assert_eq!(pushed["cursor"], json!(cursors[round + 1]));
        // The edge that tail is on, sooner or later.
        mesh.edges[round % 2].process.kill().await;
        // Said while it is gone, and said again: shown once.
        let again = send(
            &mesh,
            "repeated",
            &["--user", "kim", "--id", &format!("m{round}")],
        );
        assert_eq!(again, cursors[round + 1]);
        mesh.edges[round % 2].process.start().await.unwrap();
    }
    send(&mesh, "end", &[]);
    assert_eq!(next()["body"]["text"], "end");
}

#[tokio::test]
async fn what_a_person_does_wrong_is_said() {
    let mesh = Mesh::start(support::nats_url(), 1, "").await;
    let fails = |command: &mut Command| {
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code().unwrap(), text)
    };
    let (code, text) = fails(tool(&mesh, "send").args(["x", "--token", "not.a.token"]));
    assert!(code == 1 && text.contains("token"), "{code}: {text}");
    let read_only = token_with(
        "kim",
        support::LONG,
        vec![Grant::new("chat:*", &[Right::Read])],
    );
    let (code, text) = fails(tool(&mesh, "send").args(["x", "--token", &read_only]));
    assert!(code == 1 && text.contains("forbidden"), "{code}: {text}");
    let (code, text) = fails(Command::new(support::natter()).args(["tail", "no room"]));
    assert!(code == 64 && text.contains("no room"), "{code}: {text}");
    let folder = mesh.dir();
    let (code, text) = fails(
        Command::new(support::natter())
            .args(["send", "chat:a", "x"])
            .current_dir(folder),
    );
    assert!(
        code == 1 && text.contains("NATTER__AUTH__HS256_SECRET"),
        "{code}: {text}"
    );
}
