//! `natter doctor`: finds what is wrong with a deployment, and says what to do.

use std::process::ExitCode;

use super::connect::print_line;
use crate::{
    config::{Config, Secret},
    mesh::doctor::{Examination, Level, examine},
};

/// Flags of `natter doctor`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// One JSON object, for programs.
    #[arg(long)]
    json: bool,
    /// User of the system account. Only it can examine disk syncs, gateways and the clocks of servers.
    #[arg(long, value_name = "NAME")]
    sys_user: Option<String>,
    /// Password of that user.
    #[arg(long, value_name = "PASSWORD")]
    sys_password: Option<String>,
    /// Servers to ask as that user, if they are not those of `nats.url`.
    #[arg(long, value_name = "URL")]
    sys_url: Option<String>,
}

/// Prints the findings. The exit code is 1 if one of them is a problem.
pub(super) fn run(args: Args, mut config: Config) -> anyhow::Result<ExitCode> {
    let doctor = &mut config.doctor;
    if let Some(user) = args.sys_user {
        doctor.sys_user = user;
    }
    if let Some(password) = args.sys_password {
        doctor.sys_password = Secret::new(password);
    }
    if let Some(url) = args.sys_url {
        doctor.sys_url = url;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let examination = runtime.block_on(examine(&config))?;
    if args.json {
        print_line(&serde_json::to_string(&examination)?)?;
    } else {
        print(&examination)?;
    }
    Ok(if examination.count(Level::Problem) > 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn print(examination: &Examination) -> anyhow::Result<()> {
    for finding in &examination.findings {
        let level = match finding.level {
            Level::Problem => "problem",
            Level::Warning => "warning",
            Level::Note => "note",
        };
        let about = [finding.region.clone(), Some(finding.streams.join(" "))];
        let about: Vec<String> = about
            .into_iter()
            .flatten()
            .filter(|s| !s.is_empty())
            .collect();
        let colon = if about.is_empty() { "" } else { ": " };
        print_line(&format!(
            "{level:<8} {}{colon}{}\n{:<8} -> {}",
            about.join(" "),
            finding.what,
            "",
            finding.advice
        ))?;
    }
    print_line(&format!(
        "looked at: regions {}, streams {}, servers {}; found: problems {}, warnings {}",
        examination.regions,
        examination.streams,
        examination.servers,
        examination.count(Level::Problem),
        examination.count(Level::Warning)
    ))?;
    Ok(())
}
