//! `natter provision`: creates and updates the streams and buckets of the region, or of all regions of a mesh.

use std::process::ExitCode;

use anyhow::ensure;

use super::connect::print_line;
use crate::{
    config::Config,
    mesh::provision::{
        Options, Provisioned, connect, known_regions, provision_mesh, remove_region,
    },
    model::Region,
};

/// Flags of `natter provision`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only print what would be done.
    #[arg(long)]
    dry_run: bool,
    /// Also do what may lose stored messages: shrink limits, replace or delete mirrors.
    #[arg(long)]
    allow_destructive: bool,
    /// Add this region to the mesh of the connected region: its streams, its mirrors in the other regions, and their
    /// mirrors in it.
    #[arg(long, value_name = "REGION", value_parser = region)]
    region: Option<Region>,
    /// Take this region out of the mesh. Its mirrors in the other regions are deleted later, when edges have followed;
    /// its own streams are left alone. It need not be reachable.
    #[arg(
        long,
        value_name = "REGION",
        value_parser = region,
        conflicts_with = "region",
        requires = "allow_destructive"
    )]
    remove_region: Option<Region>,
}

/// Prints one line per stream. The exit code is 1 if a stream still differs from its definition, or a region is away.
pub(super) fn run(args: &Args, config: &Config) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let provisioned = runtime.block_on(provision(args, config))?;
    for outcome in &provisioned.outcomes {
        print_line(&outcome.to_string())?;
    }
    for (region, error) in &provisioned.unreachable {
        eprintln!(
            "natter: region {region} does not answer ({}): its part was not done; repeat this when it is back",
            error.brief()
        );
    }
    if args.dry_run {
        eprintln!("natter: dry run, nothing was changed");
    }
    Ok(if provisioned.is_incomplete() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

async fn provision(args: &Args, config: &Config) -> anyhow::Result<Provisioned> {
    let options = Options {
        dry_run: args.dry_run,
        allow_destructive: args.allow_destructive,
        ..Options::default()
    };
    if let Some(gone) = &args.remove_region {
        ensure!(
            *gone != config.region(),
            "--remove-region {gone}: that is the connected region itself ; do it from another one",
        );
        ensure!(
            !config.regions().contains(gone),
            "--remove-region {gone}: the configuration's regions still name it, and the next natter provision would bring it back; take it out there first",
        );
    }
    let client = connect(&config.nats).await?;
    if let Some(gone) = &args.remove_region {
        let regions = known_regions(&client, config).await?;
        if !args.dry_run {
            eprintln!(
                "natter: {gone} was taken out of the lists of the other regions; its mirrors there are deleted {} later, when edges have followed",
                humantime::format_duration(options.edges_follow)
            );
        }
        return Ok(remove_region(&client, config, &regions, gone, options).await?);
    }
    let regions = match &args.region {
        None => config.regions(),
        Some(new) => {
            let mut regions = known_regions(&client, config).await?;
            regions.insert(new.clone());
            regions
        }
    };
    Ok(provision_mesh(&client, config, &regions, options).await?)
}

fn region(text: &str) -> Result<Region, String> {
    Region::parse(text).ok_or_else(|| "a region matches [a-z0-9-]{1,32}".to_owned())
}
