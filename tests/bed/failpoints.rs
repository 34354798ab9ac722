//! The agent with failpoints, see `crates/support/src/failpoint.rs`. `--failpoints` lists them.

use strum::VariantArray;
use support::failpoint::Point;

fn main() -> std::process::ExitCode {
    if std::env::args().nth(1).as_deref() == Some("--failpoints") {
        Point::VARIANTS.iter().for_each(|point| println!("{}", point.name()));
        return std::process::ExitCode::SUCCESS;
    }
    node_image_pivot::cli::main()
}
