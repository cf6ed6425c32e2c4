//! `natter provision`: the region's streams and buckets, as configured.

use std::process::ExitCode;

use crate::{
    bus::provision::{Options, connect, provision},
    config::Config,
};

/// Flags of `natter provision`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only print what would be done.
    #[arg(long)]
    dry_run: bool,
    /// Also shrink limits, which may drop stored messages.
    #[arg(long)]
    allow_destructive: bool,
}

/// Prints one line a stream; exit code 1 when something was left different from its definition.
pub(super) fn run(args: &Args, config: &Config) -> anyhow::Result<ExitCode> {
    let options = Options {
        dry_run: args.dry_run,
        allow_destructive: args.allow_destructive,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let outcomes = runtime.block_on(async {
        let client = connect(&config.nats).await?;
        provision(&client, config, options).await
    })?;
    let mut incomplete = false;
    for outcome in outcomes {
        println!("{outcome}");
        incomplete |= outcome.is_incomplete();
    }
    if args.dry_run {
        eprintln!("natter: dry run, nothing was changed");
    }
    Ok(if incomplete {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}
