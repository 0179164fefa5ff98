//! The `statera` program: reads its arguments, does what they say, and exits with the contract's code.

use std::process::ExitCode;

fn main() -> ExitCode {
    statera::cli::main()
}
