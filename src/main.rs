//! The one binary: `natter up`, `natter edge`, and the tools.

use std::process::ExitCode;

fn main() -> ExitCode {
    natter::main()
}
