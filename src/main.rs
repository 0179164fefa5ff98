//! The `statera` program: runs the command in its arguments, and exits with the code of its result.

use std::process::ExitCode;

fn main() -> ExitCode {
    statera::cli::main()
}
