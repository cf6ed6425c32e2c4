//! `natter guard`: becomes another program that dies when its parent does.
//!
//! `natter up` starts every child through this, so that a SIGKILL of `up` leaves no process behind. The kernel's
//! parent-death signal must be set by the child itself, after the fork and before it executes the program.

use std::{ffi::OsString, os::unix::process::CommandExt, process::ExitCode};

use anyhow::{Context, bail};

/// Flags of `natter guard`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Process whose end must end this one.
    #[arg(long, value_name = "PID")]
    parent: u32,
    /// Program to execute, with its arguments.
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// Returns only if the program can't be started.
pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let (program, arguments) = args.command.split_first().context("no program given")?;
    // SIGKILL, since no process is left that could wait for a drain. All data is written such that this is safe.
    #[cfg(target_os = "linux")]
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .context("the parent-death signal can't be set")?;
    // If the parent died before the signal was set, the signal never arrives.
    if std::os::unix::process::parent_id() != args.parent {
        bail!("process {} is not the parent any more", args.parent);
    }
    let error = std::process::Command::new(program).args(arguments).exec();
    Err(error).with_context(|| format!("{} can't be started", program.display()))
}
