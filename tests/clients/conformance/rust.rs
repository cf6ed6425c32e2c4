//! The driver of natter's own Rust client for the conformance suite. See README.md beside it.

#![expect(
    clippy::print_stdout,
    clippy::panic,
    reason = "it talks to the runner by lines on the standard output, and fails as tests do"
)]

use std::{io::BufRead, sync::Arc, thread, time::Duration};

use natter::testing::client::{
    Draft, Endpoint, Event, PublishError, Room, Silence, Stop, Target, Token,
};
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::{sync::mpsc, task::JoinHandle};

/// Operations, and messages to be written, that may wait.
const QUEUE: usize = 1024;

/// What the runner asks for.
#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
enum Operation {
    Connect {
        urls: Vec<String>,
        heartbeat_ms: Option<u64>,
    },
    Token {
        token: Option<String>,
    },
    Join {
        room: String,
        since: Option<String>,
    },
    Send {
        room: String,
        id: String,
        body: Value,
    },
    Close,
}

/// The answers of the runner to `token?`.
type Tokens = Arc<Mutex<std::sync::mpsc::Receiver<Option<String>>>>;

/// A room that is followed, and what is written there, one message after the other.
struct Followed {
    name: String,
    room: Room,
    drafts: mpsc::Sender<Draft>,
    writer: JoinHandle<()>,
}

struct Driver {
    tokens: Tokens,
    target: Option<Target>,
    followed: Option<Followed>,
    state: &'static str,
}

fn main() -> anyhow::Result<()> {
    println!(
        "{}",
        json!({"hello": 1, "name": "natter's Rust client", "can": ["edges", "heartbeat", "ordered"]})
    );
    let (operations, waiting) = mpsc::channel(QUEUE);
    let (answer, answers) = std::sync::mpsc::sync_channel(1);
    // Not on the runtime: reading the standard input can't be cancelled. The thread ends with the process.
    thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let line = line.expect("the runner writes text");
            let operation = serde_json::from_str(&line)
                .unwrap_or_else(|error| panic!("operation {line}: {error}"));
            // Nobody waits for it any more where this fails: the driver has ended.
            let taken = match operation {
                Operation::Token { token } => answer.send(token).is_ok(),
                other => operations.blocking_send(other).is_ok(),
            };
            if !taken {
                return;
            }
        }
    });
    let driver = Driver {
        tokens: Arc::new(Mutex::new(answers)),
        target: None,
        followed: None,
        state: "idle",
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let result = runtime.block_on(driver.run(waiting));
    // A client may be waiting for a token that nobody gives any more.
    runtime.shutdown_background();
    result
}

/// Asks the runner for a token, and waits for it: others who need one wait for their turn.
fn ask(tokens: &Tokens) -> Result<String, String> {
    tokio::task::block_in_place(|| {
        let answers = tokens.lock();
        tell("token?", json!({}));
        match answers.recv() {
            Ok(Some(token)) => Ok(token),
            Ok(None) => Err("the runner has no token".to_owned()),
            Err(_ended) => Err("the runner has ended".to_owned()),
        }
    })
}

fn tell(event: &str, mut line: Value) {
    line["event"] = json!(event);
    println!("{line}");
}

impl Driver {
    async fn run(mut self, mut waiting: mpsc::Receiver<Operation>) -> anyhow::Result<()> {
        loop {
            // Both are cancel-safe.
            tokio::select! {
                operation = waiting.recv() => match operation {
                    Some(operation) => self.carry_out(operation).await?,
                    None => return Ok(()),
                },
                Some(event) = next(&mut self.followed) => self.on_event(event),
            }
        }
    }

    async fn carry_out(&mut self, operation: Operation) -> anyhow::Result<()> {
        match operation {
            Operation::Connect { urls, heartbeat_ms } => {
                let endpoints = urls
                    .iter()
                    .map(|url| url.parse::<Endpoint>())
                    .collect::<Result<Vec<_>, _>>()?;
                let tokens = Arc::clone(&self.tokens);
                let mut target =
                    Target::new(endpoints, Token::Made(Arc::new(move || ask(&tokens))));
                if let Some(ms) = heartbeat_ms {
                    target.silence = Silence {
                        ask_after: Duration::from_millis(ms),
                        answer_within: Duration::from_millis(ms),
                    };
                }
                self.target = Some(target);
            }
            // The thread that reads has answered it.
            Operation::Token { .. } => {}
            Operation::Join { room, since } => self.join(room, since),
            Operation::Send { room, id, body } => {
                let mut draft = Draft::new(room, body);
                draft.id = id;
                match &self.followed {
                    Some(followed) => followed.drafts.send(draft).await?,
                    None => anyhow::bail!("this driver sends only after a join"),
                }
            }
            Operation::Close => {
                self.stop();
                self.turn("closed", None);
            }
        }
        Ok(())
    }

    fn join(&mut self, name: String, since: Option<String>) {
        let is_in = self.followed.as_ref().is_some_and(|old| old.name == name);
        let Some(target) = self.target.clone().filter(|_| !is_in || since.is_some()) else {
            return;
        };
        self.stop();
        self.turn("connecting", None);
        let room = Room::follow(target, &name, since);
        let publisher = room.publisher();
        let (drafts, mut waiting) = mpsc::channel::<Draft>(QUEUE);
        let writer = tokio::spawn(async move {
            while let Some(draft) = waiting.recv().await {
                let (room, id) = (&draft.room, &draft.id);
                match publisher.publish(&draft).await {
                    Ok(ack) => tell(
                        "acked",
                        json!({"room": room, "id": id, "cursor": ack.cursor, "dup": ack.dup}),
                    ),
                    Err(error) => {
                        let code = match &error {
                            PublishError::Refused(refusal) => refusal.code.clone(),
                            other => other.to_string(),
                        };
                        tell("failed", json!({"room": room, "id": id, "code": code}));
                    }
                }
            }
        });
        self.followed = Some(Followed {
            name,
            room,
            drafts,
            writer,
        });
    }

    fn stop(&mut self) {
        if let Some(followed) = self.followed.take() {
            followed.writer.abort();
        }
    }

    fn turn(&mut self, state: &'static str, reason: Option<String>) {
        if self.state != state {
            self.state = state;
            tell("state", json!({"name": state, "reason": reason}));
        }
    }

    fn on_event(&mut self, event: Event) {
        let name = self.followed.as_ref().map(|followed| followed.name.clone());
        match event {
            Event::Joined { cursor, reset, .. } => {
                self.turn("online", None);
                if let Some(reason) = &reset {
                    tell("reset", json!({"room": name, "reason": reason}));
                }
                tell(
                    "joined",
                    json!({"room": name, "cursor": cursor, "reset": reset.is_some()}),
                );
            }
            Event::Message(frame) => {
                let message: Map<String, Value> = frame.fields().unwrap_or_default();
                let told = ["room", "id", "from", "cursor", "body", "kind", "target"];
                let line = message
                    .into_iter()
                    .filter(|(field, _)| told.contains(&field.as_str()));
                tell("message", Value::Object(line.collect()));
            }
            Event::Typing { .. } | Event::Other(_) => {}
            Event::Disconnected { why, .. } => self.turn("offline", Some(why)),
            Event::Reconnected { .. } => self.turn("connecting", None),
            Event::Stopped(stop) => {
                match &stop {
                    Stop::Join(refusal) => tell("out", json!({"room": name, "code": refusal.code})),
                    Stop::Kicked(code) => tell("out", json!({"room": name, "code": code})),
                    Stop::Token(_) | Stop::Closed(_) | Stop::Unusable(_) => {}
                }
                self.turn("closed", Some(stop.to_string()));
                self.followed = None;
            }
        }
    }
}

/// The next event of the room that is followed; none where there is no room, or the room has ended.
async fn next(followed: &mut Option<Followed>) -> Option<Event> {
    match followed {
        Some(followed) => followed.room.next().await,
        None => None,
    }
}
