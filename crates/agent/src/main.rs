//! `bulkhead-agent`: see the library of the same name, which is a library for the sake of its fuzz targets.

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_agent::main()
}
