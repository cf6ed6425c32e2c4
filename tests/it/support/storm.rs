//! What storms share: their seed, the end of the waiting, and what is left of one that failed.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tokio::time::sleep;

use super::{
    checker::{Log, Violation},
    mesh::Mesh,
    sessions::Shared,
};

/// For the whole storm, and for everybody to have caught up after it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(240);

/// The seed of a run: one that is to be repeated, or any.
#[expect(
    clippy::disallowed_methods,
    reason = "the seed of a test is no configuration"
)]
pub(crate) fn seed() -> u64 {
    std::env::var("NATTER_TEST_SEED").map_or_else(
        |_absent| rand::random(),
        |text| text.parse().expect("NATTER_TEST_SEED is a number"),
    )
}

/// Says the seed when the test fails, wherever that is.
pub(crate) struct Seed(pub(crate) u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("storm: failed with NATTER_TEST_SEED={}", self.0);
        }
    }
}

/// Waits until all have everything; does not panic, so that the checker can say what is missing.
pub(crate) async fn caught_up(shared: &Shared) -> Result<(), String> {
    let started = Instant::now();
    loop {
        let behind = shared.board.lock().behind();
        if behind.is_ok() || started.elapsed() > PATIENCE {
            return behind;
        }
        // The pause of a poll.
        sleep(Duration::from_millis(50)).await;
    }
}

/// The violations, as a test that fails says them.
pub(crate) fn told(violations: &[Violation], kept: &Path) -> String {
    let mut text = format!(
        "{} violations (all of it is in {}):",
        violations.len(),
        kept.display()
    );
    for violation in violations.iter().take(20) {
        write!(text, "\n  {violation}").unwrap();
    }
    text
}

/// Writes down what is needed to find out what happened.
pub(crate) fn keep(seed: u64, mesh: &Mesh, log: &Log, violations: &[Violation]) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("storm-{seed}"));
    fs::create_dir_all(&folder).unwrap();
    for edge in 0..mesh.edges.len() {
        fs::copy(mesh.log(edge), folder.join(format!("edge-{edge}.log"))).unwrap();
    }
    let lines: String = violations.iter().map(|v| format!("{v}\n")).collect();
    fs::write(folder.join("violations.txt"), lines).unwrap();
    let mut text = String::new();
    for ack in &log.acks {
        writeln!(text, "{ack:?}").unwrap();
    }
    for session in &log.sessions {
        for event in &session.events {
            writeln!(text, "{:?} {event:?}", session.name).unwrap();
        }
    }
    fs::write(folder.join("operations.txt"), text).unwrap();
    folder
}
