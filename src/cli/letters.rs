//! Dead letters of receivers: workers and hooks.

use std::process::ExitCode;

use serde_json::json;

use super::{
    connect::print_line,
    history::{letter_json, letter_line, letter_name},
};
use crate::{
    bus::{Connection, DeadLetter, DeadLetters, Reader},
    config::Config,
    history::dead_letters,
    taking::Retried,
};

/// Prints the letters of the receivers of a role.
pub(super) async fn list_letters(
    config: &Config,
    (role, client): (&'static str, &str),
    json: bool,
    body: bool,
) -> anyhow::Result<ExitCode> {
    let connection = Connection::open(&config.nats, client).await?;
    let reader = Reader::new(connection.clone(), &config.nats);
    let dead = DeadLetters::of_receivers(role, connection, reader, config);
    for letter in dead_letters(&dead).await? {
        let receiver = letter.receiver.clone().unwrap_or_default();
        let line = match json {
            true => {
                let mut line = letter_json(&letter, body);
                line[role] = json!(receiver);
                line.to_string()
            }
            false => format!("{receiver}\t{}", letter_line(&letter, body)),
        };
        if !print_line(&line)? {
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes another attempt at these letters, or at all.
pub(super) async fn retry_letters(
    dead: &DeadLetters,
    numbers: &[u64],
    retry: impl AsyncFn(&DeadLetter) -> Retried,
) -> anyhow::Result<ExitCode> {
    let mut letters = dead_letters(dead).await?;
    letters.retain(|letter| numbers.is_empty() || numbers.contains(&letter.number));
    for number in numbers {
        if !letters.iter().any(|letter| letter.number == *number) {
            eprintln!("natter: there is no dead letter {number}");
        }
    }
    let (mut done, mut left) = (0, 0);
    for letter in letters {
        let (number, name) = (letter.number, letter_name(&letter));
        let why = match retry(&letter).await {
            Retried::Done => {
                done += 1;
                continue;
            }
            Retried::Gone => {
                done += 1;
                print_line(&format!("{number}\t{name}\tthe message is gone"))?;
                continue;
            }
            Retried::NotRemoved(error) => format!("done, but not removed: {error}"),
            Retried::Refused(reason) => reason,
        };
        left += 1;
        print_line(&format!("{number}\t{name}\t{why}"))?;
    }
    eprintln!("natter: {done} done, {left} left");
    Ok(if left > 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}
